"""Folders that cannot be written, and a disk without room for checkpoints, are refused before anything is loaded."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.launch_config import add, write_model

from sayo_verl.errors import SayoError
from sayo_verl.launch.disk_check import check_disk, check_writable, checkpoint_bytes, nearest
from sayo_verl.launch.preflight import preflight

NUMBERS = 1000 * 1000 + 24


@pytest.fixture
def run(make, tmp_path, monkeypatch):
    """A run that saves checkpoints of a model with a million numbers; ``free`` bytes are left on the disk."""

    def changed(free=2**40, **values):
        config = make(**{"trainer.save_freq": 10, "trainer.total_training_steps": 100, **values})
        weights = {"a": torch.zeros(1000, 1000, dtype=torch.bfloat16), "b": torch.zeros(24)}
        save_file(weights, tmp_path / "model" / "model.safetensors")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        return config

    return changed


SAVE = "actor_rollout_ref.actor.checkpoint.save_contents"


def test_the_size_of_a_checkpoint_follows_from_what_is_saved(run):
    sizes = checkpoint_bytes(run(**{SAVE: ["model", "optimizer", "extra", "hf_model"]}))
    sizes.pop("tokenizer")
    assert sizes == {"model": 4 * NUMBERS, "optimizer": 8 * NUMBERS, "hf_model": 4 * NUMBERS}
    sizes = checkpoint_bytes(run(**{"actor_rollout_ref.actor.fsdp_config.model_dtype": "bf16"}))
    assert (sizes["model"], sizes["optimizer"]) == (2 * NUMBERS, 4 * NUMBERS)
    assert "optimizer" not in checkpoint_bytes(run(**{SAVE: ["hf_model"]}))
    assert checkpoint_bytes(run(**{"actor_rollout_ref.actor.strategy": "megatron"})) is None


LORA = {"actor_rollout_ref.model.lora_rank": 4, "actor_rollout_ref.model.target_modules": ["q_proj"]}
TEXT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def test_moments_of_an_adapter_count_and_those_of_frozen_weights_do_not(run, tmp_path):
    config = run(**LORA, **{SAVE: ["model", "optimizer", "hf_model"]})
    write_model(tmp_path / "model", model_type="qwen3_vl", text_config={**TEXT, "intermediate_size": 64})
    adapter = 2 * (4 * 32 + 32 * 4)  # layers x (rank x inputs + outputs x rank)
    sizes = checkpoint_bytes(config)
    sizes.pop("tokenizer")
    whole = 4 * (NUMBERS + adapter)
    assert sizes == {"model": whole, "optimizer": 8 * adapter, "hf_model": whole}
    add(config, "actor_rollout_ref.actor.checkpoint.save_lora_only", True)
    assert checkpoint_bytes(config)["model"] == 4 * adapter


def test_a_critic_has_weights_and_moments_of_its_own(run, tmp_path):
    critic = tmp_path / "critic"
    write_model(critic, model_type="qwen3_vl")
    save_file({"a": torch.zeros(500, 10)}, critic / "model.safetensors")
    config = run(**{"critic.model.path": str(critic), "critic.enable": True, "critic.fsdp.model_dtype": "bf16"})
    sizes = checkpoint_bytes(config)
    assert (sizes["model"], sizes["critic model"], sizes["critic optimizer"]) == (4 * NUMBERS, 2 * 5000, 4 * 5000)
    assert "critic optimizer" in check_disk(config, dry_run=False)[0][1]
    config.critic.model.path = str(tmp_path / "absent")
    assert checkpoint_bytes(config) is None
    config.critic.enable = False
    assert not [name for name in checkpoint_bytes(config) if name.startswith("critic")]


def test_a_disk_without_room_for_two_checkpoints_is_refused(run):
    with pytest.raises(SayoError, match=r"^SAYO-L98: the disk has no room for 2.2 checkpoints") as caught:
        preflight(run(free=2 * 12 * NUMBERS))
    assert "22.9 MiB free, a checkpoint takes about 11." in caught.value.got
    plan = dict(preflight(run(free=3 * 12 * NUMBERS)))
    assert "a checkpoint takes about 11." in plan["disk"]
    assert plan["disk"].endswith("WARNING: all 10 are kept, 114.4 MiB: set trainer.max_actor_ckpt_to_keep=2")
    assert "disk" not in dict(preflight(run(free=0, **{"trainer.save_freq": -1})))
    (line,) = check_disk(run(free=0), dry_run=True)
    assert "WARNING: a run is refused" in line[1]


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SayoError, match=r"^SAYO-L98: the folder of the run cannot be written") as caught:
        preflight(run(**{"trainer.default_local_dir": str(tmp_path / "file" / "checkpoints")}))
    assert caught.value.got == f"{tmp_path / 'file'}: it is a file"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", "/proc/run/metrics.jsonl")  # root cannot write there either
    with pytest.raises(SayoError, match=r"SAYO-L98.* at the metrics file \(/proc/run\) \| got /proc: "):
        preflight(run())


def test_nothing_is_left_of_the_trial(tmp_path):
    check_writable(tmp_path / "a" / "b", "x", try_it=True)
    assert list(tmp_path.iterdir()) == []
    assert nearest(tmp_path / "a" / "b") == tmp_path
