"""A checkpoint of another run is refused with the differences; what may differ is said."""

import json
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from support.launch_config import add, composed, write_rows
from support.saved import save

from sayo_verl.errors import SayoError
from sayo_verl.launch import fingerprint as f
from sayo_verl.launch import fingerprint_check, fingerprint_files
from sayo_verl.launch.checkpoints import FINGERPRINT, SCHEMA
from sayo_verl.launch.fingerprint import fingerprint_of
from sayo_verl.launch.fingerprint_check import NAMES, place_fingerprint
from sayo_verl.models import location

ADVANTAGE = "algorithm.adv_estimator"
LR = "actor_rollout_ref.actor.optim.lr"


@pytest.fixture
def config(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DictConfig:
    """A run of the tiny task that resumes step 2 of a run with the same settings."""
    monkeypatch.setattr(fingerprint_files, "BLOCK", 64)
    config = composed(repo, "+job=tiny", "+method=region")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(5000))
    config.actor_rollout_ref.model.path = str(tmp_path / "model")
    names = [str(write_rows(tmp_path / f"train-{n}.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]], rows=3)) for n in range(2)]
    config.data.train_files = names
    config.trainer.default_local_dir = str(tmp_path / "checkpoints")
    config.trainer.save_freq = 2
    save(tmp_path / "checkpoints", 2, tracker=2, fingerprint=fingerprint_of(config))
    return config


def changed(config: DictConfig, **values: object) -> DictConfig:
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    return config


def refused(config: DictConfig, code: str = "L94", **options: bool) -> SayoError:
    with pytest.raises(SayoError) as caught:
        place_fingerprint(config, **options)
    assert caught.value.code == code
    return caught.value


def edit_rows(file: Path, edit) -> None:
    rows = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist(edit(rows)), file)


# -------------------------------------------------------------------------------------------------------- what passes


def test_the_same_run_resumes_and_carries_its_own_record(config):
    assert place_fingerprint(config) == ""
    assert json.loads(config.sayo.fingerprint) == fingerprint_of(config)
    assert "fingerprint" not in fingerprint_of(config)["compared"]["method"]


def test_a_dry_run_compares_and_leaves_the_configuration_alone(config):
    assert place_fingerprint(config, dry_run=True) == ""
    assert "fingerprint" not in config.sayo
    refused(changed(config, **{"data.seed": 7}), dry_run=True)


FILES = {
    "data.custom_cls.path": "data",
    "trainer.v1.sampler.custom_sampler.path": "data",
    "reward.custom_reward_function.path": "reward",
    "reward.reward_manager.module.path": "reward",
    "actor_rollout_ref.model.lora_adapter_path": "model",
    "actor_rollout_ref.model.tokenizer_path": "model",
    "actor_rollout_ref.model.hf_config_path": "model",
    "critic.model.path": "model",
    "reward.reward_model.model_path": "reward",
}


def write(config: DictConfig, key: str, path: Path, content: str) -> None:
    """Make the file or the folder of a model that ``key`` names."""
    if key.endswith(("_path", "model.path")):
        path.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "adapter_model.safetensors"):
            (path / name).write_text(content)
    else:
        path.write_text(content)
    OmegaConf.update(config, key, str(path), force_add=True)


def test_files_of_settings_may_move_and_may_not_change(config, tmp_path):
    changed(config, **{"critic.enable": True, "reward.reward_model.enable": True})
    for key in FILES:
        write(config, key, tmp_path / key, "1")
    config.trainer.default_local_dir = str(tmp_path / "files")
    save(tmp_path / "files", 2, tracker=2, fingerprint=fingerprint_of(config))
    for key in FILES:
        write(config, key, tmp_path / f"{key}-moved", "1")
    assert "differ" not in place_fingerprint(config)
    for key, name in FILES.items():
        write(config, key, tmp_path / f"{key}-moved", "2")
        error = refused(config)
        assert key in error.got
        assert named(error) == [name]
        write(config, key, tmp_path / f"{key}-moved", "1")


def test_a_sentencepiece_tokenizer_belongs_to_the_model(config, tmp_path):
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"1")
    assert "tokenizer.model absent -> sha256" in refused(config).got


def test_a_hub_name_and_the_folder_of_its_snapshot_are_one_model(config, tmp_path, monkeypatch):
    snapshot, other = (tmp_path / "snapshots" / (digit * 40) for digit in "ab")
    for folder in (snapshot, other):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(location, "_hub_folder", {"owner/model": snapshot}.get)
    config.actor_rollout_ref.model.path = "owner/model"
    config.trainer.default_local_dir = str(tmp_path / "hub")
    save(tmp_path / "hub", 2, tracker=2, fingerprint=fingerprint_of(config))
    for folder in (snapshot, other):  # verl downloads the weights, and files that the launcher does not need
        (folder / "model.safetensors").write_bytes(b"1")
        (folder / "tokenizer.model").write_bytes(b"1")
    assert place_fingerprint(config) == ""
    config.actor_rollout_ref.model.path = str(snapshot)
    assert "model differ" not in place_fingerprint(config)
    config.actor_rollout_ref.model.path = str(other)
    assert f"revision {'a' * 40} -> {'b' * 40}" in refused(config).got
    save(tmp_path / "folder", 2, tracker=2, fingerprint=fingerprint_of(config))
    config.trainer.default_local_dir = str(tmp_path / "folder")
    config.actor_rollout_ref.model.path = str(other.rename(tmp_path / "copy"))
    assert "model differ" not in place_fingerprint(config)


def test_data_and_model_may_move(config, tmp_path):
    for name in ("model", "train-0.parquet"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    config.actor_rollout_ref.model.path = str(tmp_path / "moved-model")
    config.data.train_files[0] = str(tmp_path / "moved-train-0.parquet")
    remark = place_fingerprint(config)
    assert remark.startswith("; changed: ")
    assert "data.train_files" in remark
    assert "actor_rollout_ref.model.path" in remark


def test_length_and_versions_may_change_and_are_named(config, monkeypatch):
    monkeypatch.setattr(f, "__version__", "99.0")
    remark = place_fingerprint(changed(config, **{"trainer.total_training_steps": 60, "trainer.logger": []}))
    assert "trainer.total_training_steps 30 -> 60" in remark
    assert "version of sayo-verl" in remark
    assert "logger" not in remark


def test_settings_of_methods_that_do_not_run_and_limits_of_time_may_change(config):
    values = {"algorithm.attn.dual.beta": 0.9, "algorithm.filter_groups.max_num_gen_batches": 7, "critic.optim.lr": 1.0}
    assert place_fingerprint(changed(config, **values)) == ""


def test_a_setting_of_a_newer_version_may_have_its_default(config):
    add(config, "algorithm.new_setting", False)
    assert "algorithm.new_setting absent -> false" in refused(config).got
    defaults = config.copy()
    assert "does not know: algorithm.new_setting false" in place_fingerprint(config, defaults=defaults, dry_run=True)
    config.algorithm.new_setting = True
    with pytest.raises(SayoError, match=r"algorithm\.new_setting absent -> true"):
        place_fingerprint(config, defaults=defaults)


PINNED = {  # one setting of each pattern that no other test changes
    "method": """policy_loss.loss_mode clip_ratio_high tau_pos loss_agg_mode loss_scale_factor entropy_coeff
        kl_loss_coef ppo_epochs""",
    "data": """data.filter_overlong_prompts data.max_prompt_length data.truncation data.prompt_key data.custom_cls.name
        data.apply_chat_template_kwargs.thinking data.mm_processor_kwargs.fps trainer.v1.sampler.custom_sampler.name""",
    "reward": "reward.reward_manager.name reward.reward_model.enable",
    "model": "model.lora_alpha model.target_modules model.exclude_modules model.custom_chat_template strategy "
    "freeze_vision_tower",
    "seed": "sayo.repeatable_rollouts",
    "batch": "data.gen_batch_size ppo_mini_batch_size",
    "optimizer": "optim.weight_decay optim.betas optim.optimizer optim.optimizer_impl optim.override_optimizer_config",
}


def test_every_pattern_compares_a_setting_and_none_is_lost(config):
    for key in ("data.apply_chat_template_kwargs.thinking", "data.mm_processor_kwargs.fps"):
        add(config, key, 1)
    changed(config, **{"critic.enable": True})
    known = [key for key, _ in f.settings_of(config)]
    assert not [p for patterns in f.COMPARED.values() for p in patterns if not any(fnmatch(key, p) for key in known)]
    compared = fingerprint_of(config)["compared"]
    for name, ends in PINNED.items():
        assert not [end for end in ends.split() if not any(key.endswith(end) for key in compared[name])], name


def test_what_is_not_on_this_machine_is_not_compared(config):
    config.data.train_files[1] = "hdfs://data/train.parquet"
    assert "changed: data.train_files" in place_fingerprint(config, dry_run=True)
    config.actor_rollout_ref.model.path = "/nowhere/model"
    assert "actor_rollout_ref.model.path " in place_fingerprint(config, dry_run=True)


def test_a_run_that_saves_no_checkpoint_reads_no_data(config, tmp_path, monkeypatch):
    config.trainer.default_local_dir = str(tmp_path / "new")
    config.trainer.save_freq = -1
    monkeypatch.setattr(fingerprint_check, "fingerprint_of", None)
    assert place_fingerprint(config) == ""


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("method", ADVANTAGE, "grpo"),
        ("method", "algorithm.attn.region.coverage", 0.25),
        ("method", "actor_rollout_ref.actor.use_kl_loss", True),
        ("method", "sayo.correct_from", 0.5),
        ("reward", "reward.custom_reward_function.reward_kwargs.accuracy_weight", 0.0),
        ("data", "data.shuffle", False),
        ("data", "data.train_max_samples", 4),
        ("model", "actor_rollout_ref.model.lora_rank", 8),
        ("seed", "data.seed", 1),
        ("seed", "actor_rollout_ref.rollout.seed", 1),
        ("batch", "data.train_batch_size", 8),
        ("batch", "data.dataloader_num_workers", 2),
        ("batch", "actor_rollout_ref.rollout.n", 4),
        ("mode", "trainer.v1.trainer_mode", "colocate_async"),
        ("optimizer", LR, 1e-6),
    ],
)
def test_a_difference_is_refused_until_it_is_named(config, name, key, value):
    before = OmegaConf.select(config, key)
    error = refused(changed(config, **{key: value}))
    assert f"{key} {before if isinstance(before, str) else json.dumps(before)} -> " in error.got
    assert f"sayo.resume_anyway=[{name}" in error.fix
    needed = error.fix.partition("resume_anyway=[")[2].partition("]")[0].split(",")
    remark = place_fingerprint(changed(config, **{"sayo.resume_anyway": needed}))
    assert f"{name} differ as accepted: " in remark
    for other in needed:  # each one is needed
        refused(changed(config, **{"sayo.resume_anyway": [one for one in needed if one != other]}))


def test_all_differences_are_listed_with_the_words_that_accept_them(config):
    error = refused(changed(config, **{ADVANTAGE: "attn_dual", "data.seed": 3, LR: 1e-6}))
    assert named(error) == ["method", "seed", "optimizer"]
    assert error.got.startswith("method: algorithm.adv_estimator attn_region -> attn_dual; seed: ")
    assert "data.seed 0 -> 3" in error.got
    assert "no effect" in error.got
    assert error.where.endswith(f"global_step_2/{FINGERPRINT}")


def named(error: SayoError) -> list[str]:
    return error.fix.partition("resume_anyway=[")[2].partition("]")[0].split(",")


def test_a_long_list_of_differences_is_counted(config):
    for n in range(10):
        add(config, f"reward.custom_reward_function.reward_kwargs.weight_{n}", n)
    error = refused(config)
    assert error.got.count("absent -> ") == 8
    assert error.got.endswith(" and 2 more")


def _box(rows):
    rows[1]["extra_info"]["boxes"][0][0][3] = 0.5001
    return rows


@pytest.mark.parametrize("edit", [_box, lambda rows: rows[:-1], lambda rows: [*rows, rows[0]]])
def test_one_changed_box_or_another_number_of_rows_is_other_data(config, tmp_path, edit):
    edit_rows(tmp_path / "train-1.parquet", edit)
    error = refused(config)
    assert error.got.startswith("data: data.train_files[1] 3 rows, ")
    assert named(error) == ["data"]


def test_another_order_of_rows_or_files_is_other_data(config, tmp_path):
    config.data.train_files = config.data.train_files[::-1]
    assert named(refused(config)) == ["data"]
    config.data.train_files = config.data.train_files[::-1]
    edit_rows(tmp_path / "train-0.parquet", lambda rows: [r | {"data_source": str(n)} for n, r in enumerate(rows)])
    config.trainer.default_local_dir = str(tmp_path / "ordered")
    save(tmp_path / "ordered", 2, tracker=2, fingerprint=fingerprint_of(config))
    assert place_fingerprint(config) == ""
    edit_rows(tmp_path / "train-0.parquet", lambda rows: rows[::-1])
    assert named(refused(config)) == ["data"]


@pytest.mark.parametrize("at", [0, 2500, 4999])
def test_other_weights_of_the_same_shape_are_another_model(config, tmp_path, at):
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[at : at + 300] = b"x" * len(content[at : at + 300])
    file.write_bytes(content)
    assert "weights 5000 bytes in 1 files" in refused(config).got


def test_another_template_is_another_model(config, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja absent -> sha256" in refused(config).got


def test_an_edited_reward_file_is_another_reward(config, tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("def compute_score(): ...\n")
    config.reward.custom_reward_function.path = str(file)
    assert "reward.custom_reward_function.path" in refused(config).got
    config.trainer.default_local_dir = str(tmp_path / "own")
    save(tmp_path / "own", 2, tracker=2, fingerprint=fingerprint_of(config))
    assert place_fingerprint(config) == ""
    file.write_text("def compute_score(): return 1\n")
    assert named(refused(config)) == ["reward"]


def test_an_edited_file_of_an_own_method_is_another_method(config, tmp_path, monkeypatch):
    own = type("Own", (), {"__module__": "mine"})
    code = tmp_path / "mine.py"
    code.write_text("1")
    monkeypatch.setattr(f.inspect, "getfile", lambda cls: str(code))
    monkeypatch.setitem(f.METHODS, "attn_own", own)
    config.algorithm.adv_estimator = "attn_own"
    before = fingerprint_of(config)["compared"]["method"]["code of Own"]
    code.write_text("2")
    assert fingerprint_of(config)["compared"]["method"]["code of Own"] != before


def test_secrets_and_variables_of_the_environment_are_digests(config, monkeypatch):
    monkeypatch.setenv("JUDGE", "https://judge.example")
    kwargs = "reward.custom_reward_function.reward_kwargs"
    add(config, f"{kwargs}.api_key", "hunter2")
    add(config, f"{kwargs}.url", "${oc.env:JUDGE}")
    text = json.dumps(fingerprint_of(config))
    assert "hunter2" not in text
    assert "judge.example" not in text
    assert f"{kwargs}.api_key absent -> sha256" in refused(config).got


# ---------------------------------------------------------------------------------------------------------- the record


def test_a_checkpoint_without_a_record_is_refused_until_it_is_accepted(config, tmp_path):
    (tmp_path / "checkpoints" / "global_step_2" / FINGERPRINT).unlink()
    error = refused(config, "L95")
    assert "sayo.resume_anyway=[fingerprint]" in error.fix
    assert "not compared" in place_fingerprint(changed(config, **{"sayo.resume_anyway": ["fingerprint"]}))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "damaged"),
        (b'{"schema": 1', "damaged"),
        (b"\xff", "damaged"),
        (b"[]", "damaged"),
        (b'{"schema": "1"}', "damaged"),
        (b'{"schema": 1, "step": 2}', "damaged"),
        (b'{"schema": 1, "step": 2, "said": {}, "compared": {"data": 1}}', "damaged"),
        (b'{"schema": 1, "step": 4, "said": {}, "compared": {}}', "another checkpoint"),
        (b'{"schema": %d}' % (SCHEMA + 1), "newer sayo-verl"),
    ],
)
def test_a_record_that_cannot_be_compared_is_refused(config, tmp_path, content, what):
    (tmp_path / "checkpoints" / "global_step_2" / FINGERPRINT).write_bytes(content)
    assert what in refused(config, "L95").what


@pytest.mark.parametrize("given", [["dta"], "data", ["data", "all"], [1]])
def test_an_unknown_difference_is_refused(config, tmp_path, given):
    config.trainer.default_local_dir = str(tmp_path / "new")  # also where nothing is resumed
    error = refused(changed(config, **{"sayo.resume_anyway": given}), "L96")
    assert all(name in error.wanted for name in NAMES)
    if given == ["dta"]:
        assert "did you mean 'data'?" in error.what
