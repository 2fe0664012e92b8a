"""The engine of the rollouts, checked before Ray starts."""

import importlib.util

import pytest
from support.launch_config import add, refused

import sayo_verl.launch.rollout_check
from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.rollout_check import NAME, PACKAGES

GRPO = {"algorithm.adv_estimator": "grpo"}


@pytest.fixture
def installed(monkeypatch):
    """``installed("sglang")``: these packages are found, and no other engine."""
    find_spec = importlib.util.find_spec

    def only(*names):
        monkeypatch.setattr(
            sayo_verl.launch.rollout_check,
            "find_spec",
            lambda name: (name in names or None) if name in PACKAGES.values() else find_spec(name),
        )

    return only


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("values", [{}, GRPO])
def test_the_plan_names_the_engine(make, installed, engine, values):
    installed(engine)
    line = dict(preflight(make(**{NAME: engine}, **values)))["engine"]
    assert line.startswith(engine)
    assert ("not run" in line) == (engine == "sglang")


def test_an_engine_that_is_not_installed_is_refused_in_one_line(make, installed):
    installed("vllm")
    for engine, how in (("sglang", "an image of verl"), ("trtllm", "an image of verl")):
        error = refused(make(**{NAME: engine}, **GRPO), "L84")
        assert (error.where, error.got) == (NAME, engine)
        assert how in error.fix
        assert dict(preflight(make(**{NAME: engine}, **GRPO), dry_run=True))["engine"].startswith(
            f"{engine} - NOT THERE YET, needed before the run"
        )
    installed("sglang")
    assert "sayo-verl[gpu]" in refused(make(), "L84").fix


def test_a_misspelt_engine_suggests_the_right_one(make):
    assert "did you mean 'sglang'?" in str(refused(make(**{NAME: "sglan"}), "L84"))
    assert refused(make(**{NAME: "???"}), "L84").fix == f"set {NAME}=vllm"


def test_an_engine_that_another_plugin_registered_is_left_to_it(make, monkeypatch):
    from verl.workers.rollout import base

    monkeypatch.setitem(base._ROLLOUT_REGISTRY, ("mine", "async"), "mine.Server")
    assert dict(preflight(make(**{NAME: "mine"})))["engine"] == "mine - not checked: an engine of your own"


def test_tensorrt_llm_is_refused_for_attention_methods_only(make, installed):
    installed("tensorrt_llm")
    assert refused(make(**{NAME: "trtllm"}), "L85").wanted == "vllm or sglang"
    assert dict(preflight(make(**{NAME: "trtllm"}, **GRPO)))["engine"] == "trtllm"


def test_image_sizes_that_verls_sglang_server_does_not_take_are_refused(make, installed):
    installed("sglang", "vllm")
    for engine in ("vllm", "sglang"):
        config = add(make(**{NAME: engine}), "data.mm_processor_kwargs", {"max_pixels": 1000})
        if engine == "vllm":
            preflight(config)
        else:
            assert refused(config, "L85").where == "data.mm_processor_kwargs"
