"""The attention of a run: without its package, with it, and what transformers and verl do not run."""

import importlib
import sys
from importlib.metadata import requires

import pytest
import torch
from omegaconf import open_dict
from support.flash_stand_in import linear_attention_of_packed_rows
from support.launch_config import refused, write_model
from transformers import Qwen3VLConfig
from verl.utils.model import update_model_config

import sayo_verl.launch.attention_check
from sayo_verl.launch.attention_check import DENSE_MASK, INSTALL_FLASH_ATTN, SLOW_LOG_PROBS
from sayo_verl.launch.preflight import preflight
from sayo_verl.models import qwen3_5

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
PACKED = "actor_rollout_ref.model.use_remove_padding"
NAME = "Qwen/Qwen3-VL-8B-Instruct"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """``installed(distribution, module, text)``: a package with one module, as pip would leave it."""
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(distribution="flash-attn", module="flash_attn", text=""):
        info = tmp_path / "site" / f"{distribution.replace('-', '_')}-2.8.3.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.8.3\n")
        for folder in (module, f"{module}/ops", f"{module}/ops/triton"):
            (tmp_path / "site" / folder).mkdir()
            (tmp_path / "site" / folder / "__init__.py").touch()
        (tmp_path / "site" / module / "__init__.py").write_text(text)
        (tmp_path / "site" / module / "ops" / "triton" / "cross_entropy.py").touch()
        importlib.invalidate_caches()  # an import may have found the folder missing

    yield install
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


@pytest.fixture
def on_gpu(make, tmp_path):
    """``on_gpu(model_type, attention, estimator=...)``: a configuration as on a GPU, verl's own attention if None."""

    def compose(model_type="qwen3_vl", attention=None, estimator="attn_region", **values):
        text = {"model_type": "qwen3"} if model_type == "internvl" else {}
        model = write_model(tmp_path / model_type, model_type=model_type, text_config={**text, "num_hidden_layers": 4})
        ours = {"actor_rollout_ref.model.path": str(model), "algorithm.adv_estimator": estimator}
        cuda = {
            "trainer.device": "cuda",
            "sayo.gpu_memory_gib": 10_000,
        }  # default sizes of a family; not the matter here
        config = make(**{**ours, **cuda, ATTENTION: attention, **values})
        if attention is None:
            with open_dict(config):
                del config.actor_rollout_ref.model.override_config["attn_implementation"]
        return config

    return compose


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe", "internvl", "qwen2_vl"])
def test_verls_default_attention_without_flash_attn(on_gpu, model_type, estimator):
    if (model_type, estimator) == ("qwen2_vl", "attn_region"):
        refused(on_gpu(model_type), "L18")
        return
    error = refused(on_gpu(model_type, estimator=estimator), "L26")
    assert error.got == "flash_attention_2, flash-attn is not installed"
    if model_type == "qwen2_vl":  # verl puts flash-attn's calls into its packed rows
        assert error.fix.startswith(f"{INSTALL_FLASH_ATTN}, or {PACKED}=False with ++{ATTENTION}=sdpa")
    else:
        assert error.fix.startswith(f"{INSTALL_FLASH_ATTN}, or ++{ATTENTION}=sdpa")
        assert f"({DENSE_MASK}; {SLOW_LOG_PROBS})" in error.fix
        plan = dict(preflight(on_gpu(model_type, "sdpa", estimator)))
        assert plan["attention"] == f"sdpa, {DENSE_MASK}; {SLOW_LOG_PROBS}"


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
@pytest.mark.parametrize("attention", [None, "sdpa"])
def test_packed_rows_of_qwen2_5_vl_run_on_flash_attn_only(on_gpu, attention, estimator):
    error = refused(on_gpu("qwen2_5_vl", attention, estimator), "L26")
    assert "packed rows of qwen2_5_vl, whatever attn_implementation is" in error.what
    padded = dict(preflight(on_gpu("qwen2_5_vl", "sdpa", estimator, **{PACKED: False})))
    assert padded["attention"] == f"sdpa; {SLOW_LOG_PROBS}"


def test_a_flash_attn_that_does_not_import(on_gpu, installed):
    installed(text="raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')")
    assert "flash-attn 2.8.3 does not import (ImportError: flash_attn_2_cuda" in refused(on_gpu(), "L26").got


def test_flash_attn_that_is_there_is_named_in_the_plan(on_gpu, installed):
    installed()
    for model_type in ("qwen3_vl", "qwen2_5_vl"):
        assert dict(preflight(on_gpu(model_type)))["attention"] == "flash_attention_2, flash-attn 2.8.3"
    assert dict(preflight(on_gpu(attention="sdpa")))["attention"] == f"sdpa, {DENSE_MASK}"


def test_a_dry_run_without_a_gpu_says_what_the_run_will_need(on_gpu, monkeypatch):
    line = dict(preflight(on_gpu(), dry_run=True))["attention"]
    assert line.startswith("flash_attention_2, needs flash-attn on the machine of the run (flash-attn is not installed")
    assert line.endswith(f"(flash-attn is not installed here): {INSTALL_FLASH_ATTN}"), "the price is in the refusal"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(on_gpu(), "L26", dry_run=True)


def test_the_plan_of_an_absent_model_names_flash_attn_but_not_sdpa(on_gpu):
    config = on_gpu(**{"actor_rollout_ref.model.path": "/not/there"})
    line = dict(preflight(config, dry_run=True))["attention"]
    assert "needs flash-attn" in line
    assert "sdpa" not in line, "whether sdpa can run depends on the family"


def test_transformers_takes_the_kernel_of_the_hub_where_the_package_kernels_is(on_gpu, monkeypatch):
    monkeypatch.setattr(sayo_verl.launch.attention_check, "is_kernels_available", lambda: True)
    line = dict(preflight(on_gpu()))["attention"]
    assert line.endswith(f"transformers takes its kernel from the hub; {SLOW_LOG_PROBS}")
    refused(on_gpu("qwen2_5_vl"), "L26")  # verl's own calls do not
    assert dict(preflight(on_gpu(attention="kernels-community/flash-attn2")))["attention"].startswith("kernels-comm")


def test_flash_attention_3_is_another_package(on_gpu, installed):
    assert "flash-attn-3 is not installed" in refused(on_gpu(attention="flash_attention_3"), "L26").got
    installed("flash-attn-3", "flash_attn_interface")
    assert dict(preflight(on_gpu(attention="flash_attention_3")))["attention"] == (
        f"flash_attention_3, flash-attn-3 2.8.3; {SLOW_LOG_PROBS}"
    )
    assert "flash-attn is not installed" in refused(on_gpu("qwen2_5_vl", "flash_attention_3"), "L26").got


@pytest.mark.parametrize("name", ["flash_attn_2", "paged|sdpa", "kernels-community/flash-attn2", "flex_attention"])
def test_an_attention_that_transformers_does_not_run(on_gpu, name):
    assert refused(on_gpu(attention=name), "L54", dry_run=True).got == name


def test_a_kernel_of_the_hub_without_the_package_kernels(on_gpu):
    assert refused(on_gpu(attention="kernels-community/flash-attn2"), "L54").fix.startswith("pip install 'kernels")


def test_an_attention_for_each_part_fails_in_verl(on_gpu):
    parts = {"text_config": "sdpa", "vision_config": "eager"}
    error = refused(on_gpu(attention=parts), "L54", dry_run=True)
    assert "verl fails on an attention for each part" in error.what
    assert error.got == str(parts)
    with pytest.raises(AttributeError, match="attn_implementation"):  # what verl/workers/config/model.py does with it
        update_model_config(Qwen3VLConfig(), {"attn_implementation": parts})


def test_packed_qwen2_5_vl_with_eager(on_gpu, installed):
    installed()
    assert "one of padding" in refused(on_gpu("qwen2_5_vl", "eager"), "L54").what
    preflight(on_gpu("qwen2_5_vl", "eager", **{PACKED: False}))
    preflight(on_gpu("qwen2_5_vl", "sdpa"))


def test_flex_attention_is_left_to_the_families_that_have_it(on_gpu):
    assert dict(preflight(on_gpu("internvl", "flex_attention")))["attention"] == f"flex_attention; {SLOW_LOG_PROBS}"


def test_another_engine_of_verl_needs_no_flash_attn_from_us(on_gpu):
    config = on_gpu(estimator="grpo", **{"actor_rollout_ref.actor.strategy": "megatron"})
    assert "megatron brings its own" in dict(preflight(config))["attention"]


def test_a_job_on_cpu_has_no_price(make):
    assert dict(preflight(make()))["attention"] == "sdpa"


def test_the_pin_of_flash_attn_is_verls():
    (pin,) = {line.partition(";")[0] for line in requires("verl") if line.startswith("flash-attn==")}
    assert INSTALL_FLASH_ATTN.endswith(f" {pin}")


def test_flash_attn_is_installed_by_one_command_wherever_it_is_named(repo):
    assert INSTALL_FLASH_ATTN in (repo / "docs" / "gpu.md").read_text()
    build = "FLASH_ATTENTION_FORCE_BUILD=TRUE pip_install --no-build-isolation"
    assert build.replace("pip_install", "pip install") in INSTALL_FLASH_ATTN
    assert build in (repo / "scripts" / "setup_env.sh").read_text()


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_packed_rows_of_qwen3_5_need_the_kernel_that_knows_their_ends(on_gpu, model_type, estimator, monkeypatch):
    error = refused(on_gpu(model_type, "sdpa", estimator), "C10")
    assert error.got.endswith("torch_chunk_gated_delta_rule")
    assert error.fix.endswith(f"{PACKED}=False")
    padded = dict(preflight(on_gpu(model_type, "sdpa", estimator, **{PACKED: False})))
    assert padded["linear attention"].startswith("padded rows in plain torch, slowly")
    dry = dict(preflight(on_gpu(model_type, "sdpa", estimator), dry_run=True))
    assert dry["linear attention"].startswith("packed rows need flash-linear-attention on the machine of the run: pip")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(on_gpu(model_type, "sdpa", estimator), "C10", dry_run=True)
    monkeypatch.setattr(qwen3_5, "installed", lambda: "0.6.0")
    refused(on_gpu(model_type, "sdpa", estimator), "C10")  # installed, but transformers does not take it
    with linear_attention_of_packed_rows():
        plan = dict(preflight(on_gpu(model_type, "sdpa", estimator)))
    assert plan["linear attention"] == "flash-linear-attention 0.6.0"


def test_qwen3_5_on_a_cpu_needs_padded_rows_and_rollouts_in_bfloat16(on_gpu):
    values = {"trainer.device": "cpu", "actor_rollout_ref.rollout.dtype": "bfloat16"}
    refused(on_gpu("qwen3_5", "sdpa", **values), "C10", dry_run=True)
    preflight(on_gpu("qwen3_5", "sdpa", **values, **{PACKED: False}))
    values["actor_rollout_ref.rollout.dtype"] = "float32"
    assert "takes bfloat16 only" in refused(on_gpu("qwen3_5", "sdpa", **values, **{PACKED: False}), "C11").what
