"""Whether lengths and memory of a job fit its cards: refusals and the plan."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from support.launch_config import composed
from support.public_shapes import MODELS, write_config
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sayo_verl.errors import SayoError
from sayo_verl.launch.memory import Shapes, shapes_of
from sayo_verl.launch.memory_check import CARD, card_gib, check_memory
from sayo_verl.methods import AnchorMethod, RegionMethod
from sayo_verl.models.families import FAMILIES


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: write_config(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="module")
def base(repo) -> DictConfig:
    """The job of run_sayo_qwen3vl_8b.sh as far as memory goes."""
    return composed(
        repo,
        "data.max_prompt_length=6500",
        "data.max_response_length=110",
        "data.train_batch_size=24",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
        "actor_rollout_ref.actor.ppo_mini_batch_size=24",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.model.lora_rank=16",
        "actor_rollout_ref.model.exclude_modules=.*visual.*",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.n=16",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.6",
        "actor_rollout_ref.rollout.max_model_len=6610",
    )


@pytest.fixture
def make(base, models, tmp_path, monkeypatch):
    """``make(model, **{key: value})``; nvidia-smi is not there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def changed(model: str = "Qwen3-VL-8B", **values: Any) -> DictConfig:
        config = base.copy()
        for key, value in {"actor_rollout_ref.model.path": str(models.get(model, model)), **values}.items():
            OmegaConf.update(config, key, value)
        return config

    return changed


@pytest.fixture(autouse=True, scope="module")
def _each_model_is_built_once():
    """Building a model of full size on the meta device takes half a second."""
    known: dict[str, Shapes] = {}

    def cached(config: Any, **adapter: Any) -> Shapes:
        key = f"{config.to_json_string()} {adapter}"
        if key not in known:
            known[key] = shapes_of(config, **adapter)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sayo_verl.launch.memory_check.shapes_of", cached)
        yield


REGION = RegionMethod()


def plan(config: DictConfig, method: Any = REGION) -> str:
    return "\n".join(f"{name}: {value}" for name, value in check_memory(config, method, dry_run=True))


def refused(config: DictConfig, code: str, *words: str) -> None:
    with pytest.raises(SayoError) as caught:
        check_memory(config, RegionMethod(), dry_run=True)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_plan_shows_every_phase_and_its_terms(make):
    text = plan(make())
    assert "by arithmetic, in GiB of 79.0 (assumed: a card of 80 GB; sayo.gpu_memory_gib names another)" in text
    for phase in ("log-probs", "update", "optimizer step", "weight sync", "rollout"):
        assert f"memory per GPU: {phase} " in text
    assert "rollout 55.0: KV cache 29.7, vLLM weights 16.3, weights 4.1, CUDA 3.5, vLLM forward 1.4" in text
    assert "KV cache for 33 sequences of 6610 tokens" in text
    assert "TIGHT" not in text
    assert "reference model" not in text, "a LoRA's reference is the actor without its adapter"
    assert "memory per node: reference model 33 GiB" in plan(make(**{"actor_rollout_ref.model.lora_rank": 0}))


def test_one_card_holds_4b_with_an_adapter(make):
    text = plan(make("Qwen3-VL-4B", **{"trainer.n_gpus_per_node": 1}))
    assert "weights 16.7" in text
    assert "KV cache for 42 sequences" in text


def test_a_plan_close_to_the_card_is_marked(make):
    text = plan(make(**{"actor_rollout_ref.rollout.gpu_memory_utilization": 0.85}))
    (line,) = [line for line in text.splitlines() if "TIGHT" in line]
    assert line.startswith("memory per GPU: rollout 74.8")
    assert line.endswith("TIGHT, 95% of the card")


def test_a_kv_cache_too_small_for_the_models_positions_is_refused(make):
    config = make(**{"actor_rollout_ref.rollout.max_model_len": None})
    refused(config, "L58", "262144, the positions of the model", "36.0 GiB of 29.7", "set it to 6610")
    config = make("Qwen2.5-VL-7B", **{"actor_rollout_ref.rollout.max_model_len": None})
    assert "sequences of 128000 tokens" in plan(config), "6.8 GiB fit"
    config = make(**{"actor_rollout_ref.rollout.gpu_memory_utilization": 0.2})
    refused(config, "L58", "GiB of 0.0", "gpu_memory_utilization=0.8")


def test_lengths_that_contradict_each_other_are_refused(make):
    refused(make(**{"actor_rollout_ref.rollout.max_model_len": 6609}), "L58", "got 6609;", "set it to 6610")
    refused(make("Qwen2.5-VL-7B", **{"actor_rollout_ref.rollout.max_model_len": 128001}), "L58", "<= 128000")
    refused(
        make("Qwen2.5-VL-7B", **{"data.max_response_length": 130000, "actor_rollout_ref.rollout.max_model_len": None}),
        "L58",
        "lower data.max_prompt_length",
    )
    # on a CPU as well, where no memory is looked at
    refused(make(**{"actor_rollout_ref.rollout.max_model_len": 100, "trainer.device": "cpu"}), "L58")
    assert plan(make(**{"trainer.device": "cpu"})) == ""


def test_a_full_8b_on_one_card_is_refused(make):
    one = {"trainer.n_gpus_per_node": 1, "actor_rollout_ref.model.lora_rank": 0}
    refused(
        make(**one),
        "L60",
        "optimizer step needs more memory than a GPU has, most of it for Adam",
        "Adam 65.3",
        "offload_policy=True",
    )
    assert "update" in plan(make(**one, **{"actor_rollout_ref.actor.fsdp_config.offload_policy": True}))
    refused(
        make(
            **one,
            **{"actor_rollout_ref.actor.fsdp_config.offload_policy": True, "actor_rollout_ref.actor.strategy": "fsdp"},
        ),
        "L60",
    )
    assert "rollout" in plan(make(**one, **{"sayo.gpu_memory_gib": 260}))


def test_a_refusal_names_the_setting_of_the_largest_term(make):
    refused(
        make(**{"actor_rollout_ref.rollout.gpu_memory_utilization": 0.95}),
        "L60",
        "rollout needs more",
        "most of it for KV cache (rollout.gpu_memory_utilization)",
        "fix: actor_rollout_ref.rollout.gpu_memory_utilization=0.8",
    )
    refused(
        make(
            **{
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 200_000,
                "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 16384,
            }
        ),
        "L60",
        "update needs more",
        "actor.ppo_max_token_len_per_gpu",
        "from 200000 tokens",
    )
    refused(
        make(
            **{
                "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 300_000,
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 16384,
            }
        ),
        "L60",
        "log-probs needs more",
        "rollout.log_prob_max_token_len_per_gpu",
    )


FOUR = {"trainer.n_gpus_per_node": 1, "actor_rollout_ref.rollout.temperature": 1.0}


def test_the_changes_that_a_refusal_names_make_the_job_fit(make):
    config = make("Qwen3-VL-4B", **FOUR, **{"sayo.gpu_memory_gib": 24})
    refused(
        config,
        "L60",
        "most of it for weights (model_dtype, number of GPUs)",
        "fix: ",
        "param_offload=True",
        "model_dtype=bf16",
        "GPUs (NGPUS_PER_NODE, NNODES)",
    )
    with pytest.raises(SayoError) as caught:
        plan(config)
    ways = caught.value.fix.split("; or ")
    assert not any(way.startswith("actor_rollout_ref.rollout.gpu_memory_utilization") for way in ways), (
        "the utilization alone does not do it"
    )
    assert not any("offload_policy" in way or "lora_rank" in way for way in ways), "the job has an adapter"
    for way in ways:
        said = dict(re.findall(r"(actor_rollout_ref\.[\w.]+)=([\w.]+)", way))
        values = {key: yaml.safe_load(value) for key, value in said.items()}
        if cards := re.match(r"(\d+) GPUs", way):
            values["trainer.n_gpus_per_node"] = int(cards[1])
        changed = config.copy()
        for key, value in values.items():
            OmegaConf.update(changed, key, value, force_add=True)
        assert "KV cache for" in plan(changed), way


@pytest.mark.parametrize("card", [17, 20, 24, 28, 32, 36, 40, 44, 48])
def test_a_utilization_that_a_refusal_names_leaves_a_tenth_of_the_card(make, card):
    config = make("Qwen3-VL-4B", **FOUR, **{"sayo.gpu_memory_gib": card})
    OmegaConf.update(config, "actor_rollout_ref.rollout.gpu_memory_utilization", 0.9)
    with pytest.raises(SayoError) as caught:
        plan(config)
    if caught.value.fix.startswith("actor_rollout_ref.rollout.gpu_memory_utilization="):
        value = float(caught.value.fix.split("=")[1].split()[0])
        OmegaConf.update(config, "actor_rollout_ref.rollout.gpu_memory_utilization", value)
        line = next(line for line in plan(config).splitlines() if "rollout " in line)
        assert float(line.split("rollout ")[1].split(":")[0]) <= 0.9 * card + 0.05
    assert caught.value.fix.startswith("actor_rollout_ref.rollout.gpu_memory_utilization=") == (card >= 36)


def test_a_job_that_no_change_makes_fit_needs_a_smaller_model(make):
    refused(make("Qwen3-VL-8B", **{"sayo.gpu_memory_gib": 4}), "L60", "fix: a smaller model")


def test_the_plan_says_in_how_many_waves_a_card_samples(make):
    assert plan(make()).endswith(
        "KV cache for 33 sequences of 6610 tokens at once; 48 responses a card: 2 waves at most"
    )
    two = plan(make(**{"actor_rollout_ref.rollout.tensor_model_parallel_size": 2}))
    assert two.endswith("; 96 responses for 2 cards: 2 waves at most")
    assert "24 responses a card: 1 wave at most" in plan(make(**{"data.train_batch_size": 12}))
    assert plan(make(**{"actor_rollout_ref.rollout.max_num_seqs": 8})).endswith("48 responses a card: 6 waves at most")


def test_micro_batches_are_no_larger_than_the_batch(make):
    small = make(
        **{
            "data.train_batch_size": 1,
            "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
            "actor_rollout_ref.rollout.n": 2,
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 300_000,
        }
    )
    assert "kept activations 1.8" in plan(small)  # one row of 6,610 tokens
    fixed = {
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": False,
    }
    fixed |= {"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 2}
    assert "kept activations 3.6" in plan(
        make(**fixed, **{"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 2})
    )


@pytest.mark.parametrize(
    ("key", "value", "logits"),
    [
        ("rollout.temperature", 0.7, "9.3"),
        ("model.use_fused_kernels", True, ""),
        ("model.use_remove_padding", False, "9.3"),
        ("actor.fsdp_config.use_torch_compile", False, "32.5"),
    ],
)
def test_copies_of_the_logits(make, key, value, logits):
    line = next(line for line in plan(make(**{f"actor_rollout_ref.{key}": value})).splitlines() if "log-probs" in line)
    assert (f"logits {logits}" in line) if logits else ("logits" not in line)


def test_verl_0_9_0_copies_the_logits_at_any_temperature(make):
    config = make()
    with open_dict(config):
        config.actor_rollout_ref.actor.fsdp_config.pop("use_no_sync_for_gradient_accumulation", None)
    assert "logits 9.3" in next(line for line in plan(config).splitlines() if "log-probs" in line)


def test_without_flash_attn_logits_are_kept_in_float32(make, monkeypatch):
    monkeypatch.setattr("sayo_verl.launch.memory_check.flash_attn_problem", lambda: "not installed")
    lines = check_memory(make(), RegionMethod(), dry_run=False)
    assert "logits or one layer 23.2" in {value.split()[0]: value for _, value in lines}["update"]


def test_the_probe_of_a_method_is_counted(make):
    profile = plan(
        make(**{"data.max_response_length": 4000, "actor_rollout_ref.rollout.max_model_len": 10500}), AnchorMethod()
    )
    assert "probe 0.5" in profile
    assert "probe" not in plan(make(), None)


def test_what_is_not_estimated_is_said(make, tmp_path):
    assert plan(make("Qwen/not-at-hand")) == "memory per GPU: not estimated: the model is not on this machine"
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text('{"model_type": "qwen3"}')
    assert "not estimated: the shapes of qwen3 are unknown" in plan(make(str(text)), None)
    fp8 = make()
    for key, value in {"kv_cache_dtype": "fp8", "enable_log_requests": True}.items():
        OmegaConf.update(fp8, f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}", value, force_add=True)
    assert "not estimated: rollout.engine_kwargs.vllm=['kv_cache_dtype']" in plan(fp8)
    assert "not estimated: rollout.name=sglang" in plan(make(**{"actor_rollout_ref.rollout.name": "sglang"}))
    assert "trainer_mode=separate_async" in plan(make(**{"trainer.v1.trainer_mode": "separate_async"}))
    assert "not estimated: actor.strategy=megatron" in plan(
        make(**{"actor_rollout_ref.actor.strategy": "megatron"}), None
    )


# test_every_family_has_shapes has the others; the configuration of vision-encoder-decoder has no defaults
@pytest.mark.parametrize(
    "kind", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - FAMILIES.keys() - {"vision-encoder-decoder"})
)
def test_image_text_models_of_other_families_are_not_estimated(make, tmp_path, kind):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    config = make(str(tmp_path), **{"data.max_prompt_length": 100, "actor_rollout_ref.rollout.max_model_len": None})
    assert plan(config) == f"memory per GPU: not estimated: the shapes of {kind} are unknown"


def test_other_layers_than_full_attention_are_not_estimated(make, models, tmp_path):
    config = AutoConfig.from_pretrained(models["Qwen2.5-VL-7B"])
    config.get_text_config().layer_types = ["full_attention", "sliding_attention"] * 14
    config.save_pretrained(tmp_path)
    assert "not estimated: the text model has layers of sliding_attention" in plan(make(str(tmp_path)))


ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{ACTOR}.optim.optimizer", "AdamW8bit"),
        (f"{ACTOR}.optim.optimizer_impl", "bitsandbytes.optim"),
        (f"{ACTOR}.fsdp_config.reshard_after_forward", False),
        (f"{MODEL}.enable_activation_offload", True),
        (f"{MODEL}.lora_adapter_path", "/an/adapter"),
        (f"{ROLLOUT}.dtype", "float32"),
        (f"{ROLLOUT}.expert_parallel_size", 2),
        (f"{ROLLOUT}.max_num_seqs", None),
        (f"{ROLLOUT}.max_num_batched_tokens", None),
        ("reward.reward_model.enable", True),
    ],
)
def test_settings_that_the_arithmetic_does_not_know(make, key, value):
    shown = "null" if value is None else value
    assert f"not estimated: {key.removeprefix('actor_rollout_ref.')}={shown}" in plan(make(**{key: value}))


def test_a_critic_is_not_estimated_and_a_reward_model_on_cards_of_its_own_is(make):
    assert "not estimated: there is a critic" in plan(make(**{"algorithm.adv_estimator": "gae"}), None)
    assert "not estimated: there is a critic" in plan(make(**{"critic.enable": True}), None)
    apart = {"reward.reward_model.enable": True, "reward.reward_model.enable_resource_pool": True}
    assert "by arithmetic" in plan(make(**apart))


def test_adamw_makes_a_copy_of_what_it_trains_with_foreach_only(make):
    def step(**options: Any) -> str:
        text = plan(make(**{f"{MODEL}.lora_rank": 0, f"{ACTOR}.optim.override_optimizer_config": options}))
        return next((line for line in text.splitlines() if "optimizer step" in line), text)

    assert "a copy 4.1" in step()
    assert "a copy 4.1" in step(eps=1e-6)
    assert "a copy" not in step(fused=True)
    assert "a copy" not in step(foreach=False)
    assert "not estimated: actor.optim.override_optimizer_config=['amsgrad']" in step(amsgrad=True)


def test_weights_are_spread_over_no_more_devices_than_there_are(make):
    key = f"{ACTOR}.fsdp_config.fsdp_size"
    assert plan(make(**{key: 16})) == plan(make())
    assert plan(make(**{key: 4})) != plan(make())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{ROLLOUT}.gpu_memory_utilization", None),
        (f"{ROLLOUT}.gpu_memory_utilization", 1.2),
        (f"{ROLLOUT}.gpu_memory_utilization", 0),
        (f"{MODEL}.lora_rank", None),
    ],
)
def test_numbers_that_verl_or_vllm_cannot_use_are_refused(make, key, value):
    refused(make(**{key: value}), "L62", f"at {key}", f"got {'null' if value is None else value}")


@pytest.mark.parametrize(
    ("targets", "excluded"), [(["q_projj"], None), ("all-linear", ".*"), ("all-linear", "*visual*")]
)
def test_an_adapter_that_peft_does_not_build_is_refused(make, targets, excluded):
    refused(make(**{f"{MODEL}.target_modules": targets, f"{MODEL}.exclude_modules": excluded}), "L63", str(targets))


@pytest.fixture
def nvidia_smi(tmp_path):
    """``nvidia_smi(*lines, status=0)``: what the command prints."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"

    def install(*lines: str, status: int = 0) -> None:
        fake.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
        fake.chmod(0o755)

    return install


H100, A100 = "NVIDIA H100, 580.1, 81920, 0, 0, GPU-1a2b", "NVIDIA A100, 580.1, 40960, 0, 1, GPU-3c4d"


ONE = {"trainer.n_gpus_per_node": 1}


def test_memory_of_a_card_is_set_read_or_assumed(make, nvidia_smi):
    assumed = "assumed: a card of 80 GB{}; sayo.gpu_memory_gib names another"
    assert card_gib(make(), away=False) == (CARD, assumed.format(""))
    nvidia_smi(H100, A100)
    assert card_gib(make(), away=False) == (40.0, "nvidia-smi")
    assert card_gib(make(**ONE), away=False) == (80.0, "nvidia-smi"), "the largest"
    assert card_gib(make(), away=True) == (CARD, assumed.format(""))
    assert card_gib(make(**{"sayo.gpu_memory_gib": 141}), away=False) == (141.0, "sayo.gpu_memory_gib")
    nvidia_smi("NVIDIA-SMI has failed", status=9)
    assert card_gib(make(), away=False) == (
        CARD,
        assumed.format(", as nvidia-smi fails: NVIDIA-SMI has failed"),
    )
    nvidia_smi("NVIDIA GB10, 580.1, [N/A], [N/A], 0, GPU-5e")
    assert card_gib(make(), away=False) == (CARD, assumed.format(", as nvidia-smi shows no memory"))


@pytest.mark.parametrize(
    ("names", "gib"), [("1", 40.0), ("0", 80.0), ("0,1", 80.0), (" GPU-3c", 40.0), ("1,-1,0", 40.0), ("GPU-1a2b", 80.0)]
)
def test_CUDA_VISIBLE_DEVICES_selects_the_cards(make, nvidia_smi, monkeypatch, names, gib):
    nvidia_smi(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert card_gib(make(**ONE), away=False) == (gib, "nvidia-smi")


@pytest.mark.parametrize("names", ["", "-1", "7", "MIG-9f"])
def test_CUDA_VISIBLE_DEVICES_that_names_no_card(make, nvidia_smi, monkeypatch, names):
    nvidia_smi(H100, A100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    gib, source = card_gib(make(), away=False)
    assert gib == CARD
    assert "as CUDA_VISIBLE_DEVICES names no card that nvidia-smi lists" in source


@pytest.mark.parametrize("where", ["dry run", "two nodes", "a cluster"])
def test_a_run_on_other_machines_is_not_judged_by_this_one(make, nvidia_smi, monkeypatch, where):
    nvidia_smi("NVIDIA T4, 580.1, 15360, 0, 0, GPU-1")
    with pytest.raises(SayoError, match=r"L60.*15\.0 \(nvidia-smi\)"):
        check_memory(make(**ONE), REGION, dry_run=False)
    if where == "a cluster":
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    config = make(**{"trainer.nnodes": 2}) if where == "two nodes" else make()
    lines = check_memory(config, REGION, dry_run=where == "dry run")
    assert "GiB of 79.0 (assumed" in lines[0][1]


def test_what_others_hold_of_a_card_is_warned_of(make, nvidia_smi):
    def warned() -> list[str]:
        lines = check_memory(make("Qwen3-VL-4B", **{"trainer.n_gpus_per_node": 2}), REGION, dry_run=False)
        return [value for _, value in lines if "WARNING" in value]

    nvidia_smi(H100, "NVIDIA H100, 580.1, 81920, 412, 1, GPU-1")
    assert warned() == []
    nvidia_smi(H100, "NVIDIA H100, 580.1, 81920, 71680, 1, GPU-1")
    (line,) = warned()
    assert line.startswith("WARNING: 10.0 GiB of card 1 are free now, and the run needs ")


@pytest.mark.parametrize("wrong", [0, "much", True, float("inf"), float("nan")])
def test_a_memory_that_is_not_a_positive_number_is_refused(make, wrong):
    refused(make(**{"sayo.gpu_memory_gib": wrong}), "L61", f"got {wrong}")
