"""The model of a run before it is loaded: its folder or hub name, and its configuration."""

import json

import httpx
import huggingface_hub.errors
import pytest
from huggingface_hub import constants
from support.launch_config import refused, write_model

import sayo_verl.models.location
from sayo_verl.launch.model_check import load_config
from sayo_verl.launch.preflight import preflight
from sayo_verl.models.location import is_hub_name

ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"
PACKED = "actor_rollout_ref.model.use_remove_padding"
NAME = "Qwen/Qwen3-VL-8B-Instruct"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(**config)`` puts a model into the hub's cache, as a download leaves it; the hub itself is out of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    sayo_verl.models.location._hub_folder.cache_clear()

    def download(**config):
        stored = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("0" * 40)
        (stored / "snapshots").mkdir()
        return write_model(stored / "snapshots" / ("0" * 40), **config)

    yield download
    sayo_verl.models.location._hub_folder.cache_clear()


@pytest.fixture
def hub_says(hub, monkeypatch):
    """``hub_says(error)``: what the hub answers instead of files. Calls are counted in what is returned."""

    def answer(error):
        calls = []

        def download(*args, **kwargs):
            calls.append(args)
            raise error

        monkeypatch.setattr(sayo_verl.models.location, "snapshot_download", download)
        return calls

    return answer


@pytest.fixture
def of_hub(make):
    return lambda **values: make(**{"actor_rollout_ref.model.path": NAME, **values})


@pytest.mark.parametrize("path", [".sayo/policy", "./a", "../a/b", "~/a", "/a", "a", "a/b/c"])
def test_a_path_is_not_taken_for_a_name_of_the_hub(path):
    assert not is_hub_name(path)
    assert is_hub_name("Qwen/Qwen3-VL-8B-Instruct")


def test_the_family_and_layers_of_a_hub_name_are_checked(of_hub, hub):
    folder = hub(model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
    assert "qwen3_vl, probing layer index 3, the last of 4" in dict(preflight(of_hub()))["model"]
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
    sayo_verl.models.location._hub_folder.cache_clear()
    preflight(of_hub())


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_name_that_the_hub_does_not_know(of_hub, hub_says, dry_run):
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    hub_says(huggingface_hub.errors.RepositoryNotFoundError("404", response=response))
    assert "hub has no such model" in refused(of_hub(), "L17", dry_run=dry_run).what


def test_a_folder_of_the_owners_name_does_not_hide_the_hub(of_hub, hub, tmp_path):
    hub(model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
    (tmp_path / "Qwen").mkdir()  # as `hf download Qwen/another --local-dir Qwen/another` leaves it
    assert "probing layer index 3, the last of 4" in dict(preflight(of_hub()))["model"]
    write_model(tmp_path / NAME, model_type="qwen3_vl", text_config={"num_hidden_layers": 5})
    assert "of 5" in dict(preflight(of_hub()))["model"]


def test_a_path_that_may_be_a_hub_name_is_refused_as_both_and_planned_by_a_dry_run(of_hub, hub_says, tmp_path):
    (tmp_path / "Qwen").mkdir()
    neither = "and the folder Qwen here has none of this name"
    hub_says(httpx.ConnectError("no route"))
    assert neither in refused(of_hub(), "L53").what
    assert "NOT THERE YET as a folder" in dict(preflight(of_hub(), dry_run=True))["model"]
    sayo_verl.models.location._hub_folder.cache_clear()
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
    hub_says(huggingface_hub.errors.RepositoryNotFoundError("404", response=response))
    error = refused(of_hub(), "L17")
    assert neither in error.what
    assert "the path or the name" in error.fix
    assert "NOT THERE YET as a folder" in dict(preflight(of_hub(), dry_run=True))["model"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_on_hdfs_is_not_checked(make, dry_run):
    plan = dict(preflight(make(**{"actor_rollout_ref.model.path": "hdfs://store/qwen"}), dry_run=dry_run))
    assert plan["model"] == "hdfs://store/qwen - not checked: verl copies it from HDFS when the run starts"
    refused(make(**{"actor_rollout_ref.model.path": "s3://store/qwen"}), "L17")  # verl does not copy it


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "qwen3_vl", "text_config": 4}'])
def test_a_configuration_that_cannot_be_read(make, tmp_path, text):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(text)
    refused(make(**{"actor_rollout_ref.model.path": str(tmp_path / "broken")}), "L17", dry_run=True)


def test_a_configuration_that_transformers_does_not_know_is_given_as_it_is(tmp_path):
    model = load_config(str(write_model(tmp_path / "new", model_type="from_2027", num_hidden_layers=3)), dry_run=False)
    assert (model.model_type, model.num_hidden_layers) == ("from_2027", 3)
