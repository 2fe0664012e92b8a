"""The model of a run before it is loaded: hub names are looked up, and attention that cannot run is refused."""

import json
import sys
from importlib.metadata import requires

import httpx
import huggingface_hub.errors
import pytest
import torch
from huggingface_hub import constants
from omegaconf import open_dict
from support.launch_config import refused, write_model
from transformers import Qwen3VLConfig
from verl.utils.model import update_model_config

import sayo_verl.launch.model_check
from sayo_verl.launch.model_check import DENSE_MASK, INSTALL_FLASH_ATTN, SLOW_LOG_PROBS, is_hub_name, load_config
from sayo_verl.launch.preflight import preflight

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
PACKED = "actor_rollout_ref.model.use_remove_padding"
NAME = "Qwen/Qwen3-VL-8B-Instruct"


@pytest.fixture
def config_of(make):
    """``config_of(**{key: value})``: a configuration that passes, with some keys changed."""
    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(**config)`` puts a model into the hub's cache, as a download leaves it; the hub itself is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    sayo_verl.launch.model_check._hub_folder.cache_clear()

    def download(**config):
        stored = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("0" * 40)
        (stored / "snapshots").mkdir()
        return write_model(stored / "snapshots" / ("0" * 40), **config)

    yield download
    sayo_verl.launch.model_check._hub_folder.cache_clear()


@pytest.fixture
def hub_says(hub, monkeypatch):
    """``hub_says(error)``: what the hub answers instead of files. Calls are counted in what is returned."""

    def answer(error):
        calls = []

        def download(*args, **kwargs):
            calls.append(args)
            raise error

        monkeypatch.setattr(sayo_verl.launch.model_check, "snapshot_download", download)
        return calls

    return answer


@pytest.fixture
def of_hub(config_of):
    return lambda **values: config_of(**{"actor_rollout_ref.model.path": NAME, **values})


@pytest.mark.parametrize("path", [".sayo/policy", "./a", "../a/b", "~/a", "/a", "a", "a/b/c"])
def test_a_path_is_not_taken_for_a_name_of_the_hub(path):
    assert not is_hub_name(path)
    assert is_hub_name("Qwen/Qwen3-VL-8B-Instruct")


def test_the_family_and_layers_of_a_hub_name_are_checked(of_hub, hub):
    folder = hub(model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
    assert "qwen3_vl, probing layer 3 of 4" in dict(preflight(of_hub()))["model"]
    refused(of_hub(**{"algorithm.attn.region.layers": [4]}), "P03")
    (folder / "preprocessor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    refused(of_hub(), "L23")


@pytest.mark.parametrize(
    ("code", "model", "values"),
    [
        ("L18", {"model_type": "llava"}, {}),
        (
            "L25",
            {"model_type": "qwen2_5_vl", "num_hidden_layers": 4},
            {"actor_rollout_ref.model.use_fused_kernels": True, "actor_rollout_ref.actor.strategy": "fsdp2"},
        ),
        (
            "P11",
            {
                "model_type": "qwen2_5_vl",
                "text_config": {
                    "num_hidden_layers": 4,
                    "use_sliding_window": True,
                    "sliding_window": 64,
                    "max_window_layers": 2,
                },
            },
            {"actor_rollout_ref.model.use_remove_padding": False},
        ),
    ],
    ids=["L18", "L25", "P11"],
)
def test_what_is_refused_of_a_folder_is_refused_of_a_hub_name(of_hub, hub, code, model, values):
    hub(**model)
    refused(of_hub(**values), code)
    refused(of_hub(**values), code, dry_run=True)


def test_a_hub_out_of_reach_stops_a_run_and_stands_in_the_plan_of_a_dry_run(of_hub, hub):
    error = refused(of_hub(), "L53")
    assert "OfflineModeIsEnabled" in error.got
    assert f"hf download {NAME}" in error.fix
    plan = dict(preflight(of_hub(), dry_run=True))
    assert "cannot be reached from here, so its family and layers were not checked" in plan["model"]
    assert load_config(NAME, dry_run=True) is None


def test_the_hub_is_tried_once_and_a_model_in_the_cache_does_without(of_hub, hub, hub_says):
    calls = hub_says(httpx.ProxyError("no route"))
    preflight(of_hub(), dry_run=True)
    assert "ProxyError: no route" in refused(of_hub(), "L53").got
    assert len(calls) == 1
    hub(model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
    sayo_verl.launch.model_check._hub_folder.cache_clear()
    preflight(of_hub())


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_name_that_the_hub_does_not_know(of_hub, hub_says, dry_run):
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    hub_says(huggingface_hub.errors.RepositoryNotFoundError("404", response=response))
    assert "hub has no such model" in refused(of_hub(), "L17", dry_run=dry_run).what


def test_a_folder_of_the_owners_name_does_not_hide_the_hub(of_hub, hub, tmp_path):
    hub(model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
    (tmp_path / "Qwen").mkdir()  # as `hf download Qwen/another --local-dir Qwen/another` leaves it
    assert "probing layer 3 of 4" in dict(preflight(of_hub()))["model"]
    write_model(tmp_path / NAME, model_type="qwen3_vl", text_config={"num_hidden_layers": 5})
    assert "of 5" in dict(preflight(of_hub()))["model"]


def test_a_path_that_may_be_a_hub_name_is_refused_as_both_and_planned_by_a_dry_run(of_hub, hub_says, tmp_path):
    (tmp_path / "Qwen").mkdir()
    neither = "and the folder Qwen here has none of this name"
    hub_says(httpx.ConnectError("no route"))
    assert neither in refused(of_hub(), "L53").what
    assert "NOT THERE YET as a folder" in dict(preflight(of_hub(), dry_run=True))["model"]
    sayo_verl.launch.model_check._hub_folder.cache_clear()
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    hub_says(huggingface_hub.errors.RepositoryNotFoundError("404", response=response))
    error = refused(of_hub(), "L17")
    assert neither in error.what
    assert "the path or the name" in error.fix
    assert "NOT THERE YET as a folder" in dict(preflight(of_hub(), dry_run=True))["model"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_on_hdfs_is_not_checked(config_of, dry_run):
    plan = dict(preflight(config_of(**{"actor_rollout_ref.model.path": "hdfs://store/qwen"}), dry_run=dry_run))
    assert plan["model"] == "hdfs://store/qwen - not checked: verl copies it from HDFS when the run starts"
    refused(config_of(**{"actor_rollout_ref.model.path": "s3://store/qwen"}), "L17")  # verl does not copy it


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "qwen3_vl", "text_config": 4}'])
def test_a_configuration_that_cannot_be_read(config_of, tmp_path, text):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(text)
    refused(config_of(**{"actor_rollout_ref.model.path": str(tmp_path / "broken")}), "L17", dry_run=True)


def test_a_configuration_that_transformers_does_not_know_is_given_as_it_is(tmp_path):
    model = load_config(str(write_model(tmp_path / "new", model_type="from_2027", num_hidden_layers=3)), dry_run=False)
    assert (model.model_type, model.num_hidden_layers) == ("from_2027", 3)


# ------------------------------------------------------------------------------------------------------ flash attention


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

    yield install
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        del sys.modules[name]


@pytest.fixture
def on_gpu(config_of, tmp_path):
    """``on_gpu(model_type, attention, estimator=...)``: a configuration as on a GPU, verl's own attention if None."""

    def compose(model_type="qwen3_vl", attention=None, estimator="attn_region", **values):
        text = {"model_type": "qwen3"} if model_type == "internvl" else {}
        model = write_model(tmp_path / model_type, model_type=model_type, text_config={**text, "num_hidden_layers": 4})
        ours = {"actor_rollout_ref.model.path": str(model), "algorithm.adv_estimator": estimator}
        cuda = {
            "trainer.device": "cuda",
            "sayo.gpu_memory_gib": 10_000,
        }  # default sizes of a family; not the matter here
        config = config_of(**{**ours, **cuda, ATTENTION: attention, **values})
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
    assert "packed rows of qwen2_5_vl, whatever attn_implementation says" in error.what
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
    told = dict(preflight(on_gpu(), dry_run=True))["attention"]
    assert told.startswith("flash_attention_2, needs flash-attn on the machine of the run (flash-attn is not installed")
    assert told.endswith(f"(flash-attn is not installed here): {INSTALL_FLASH_ATTN}"), "the price is in the refusal"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(on_gpu(), "L26", dry_run=True)


def test_the_plan_of_an_absent_model_names_flash_attn_but_not_sdpa(on_gpu):
    config = on_gpu(**{"actor_rollout_ref.model.path": "/not/there"})
    told = dict(preflight(config, dry_run=True))["attention"]
    assert "needs flash-attn" in told
    assert "sdpa" not in told, "whether sdpa can run depends on the family"


def test_transformers_takes_the_kernel_of_the_hub_where_the_package_kernels_is(on_gpu, monkeypatch):
    monkeypatch.setattr(sayo_verl.launch.model_check, "is_kernels_available", lambda: True)
    told = dict(preflight(on_gpu()))["attention"]
    assert told.endswith(f"transformers takes its kernel from the hub; {SLOW_LOG_PROBS}")
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


def test_a_job_on_cpu_has_no_price(config_of):
    assert dict(preflight(config_of()))["attention"] == "sdpa"


def test_the_pin_of_flash_attn_is_verls():
    (pin,) = {line.partition(";")[0] for line in requires("verl") if line.startswith("flash-attn==")}
    assert INSTALL_FLASH_ATTN.endswith(f" {pin}")


def test_flash_attn_is_installed_by_one_command_wherever_it_is_named(repo):
    assert INSTALL_FLASH_ATTN in (repo / "docs" / "gpu.md").read_text()
    build = "FLASH_ATTENTION_FORCE_BUILD=TRUE pip_install --no-build-isolation"
    assert build.replace("pip_install", "pip install") in INSTALL_FLASH_ATTN
    assert build in (repo / "scripts" / "setup_env.sh").read_text()
