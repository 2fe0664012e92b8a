"""The family of a model: its layers, its processor, and the modes that verl cannot run it in."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.launch_config import refused, write_model
from transformers import CONFIG_MAPPING

from sayo_verl.launch.preflight import preflight
from sayo_verl.methods import RegionMethod
from sayo_verl.probe.statistics import Statistic, StatisticsRequest


def qwen2_5(folder: Path) -> dict[str, str]:
    text = {"num_hidden_layers": 4, "use_sliding_window": False}
    return {"actor_rollout_ref.model.path": str(write_model(folder, model_type="qwen2_5_vl", text_config=text))}


def test_another_model_family_passes_under_grpo(make, tmp_path):
    other = str(write_model(tmp_path / "other", model_type="llama", num_hidden_layers=2))
    plan = dict(preflight(make(**{"actor_rollout_ref.model.path": other, "algorithm.adv_estimator": "grpo"})))
    assert "(llama)" in plan["model"]


@pytest.mark.parametrize("path", ["/absent/model", "./absent", "../absent", "~/absent_model_folder", "absent", "a/b/c"])
def test_a_path_without_a_model_is_refused(make, path):
    error = refused(make(**{"actor_rollout_ref.model.path": path}), "L17")
    assert (error.where, error.got) == ("actor_rollout_ref.model.path", path)


def test_a_folder_without_a_configuration_is_refused(make, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(make(**{"actor_rollout_ref.model.path": str(tmp_path / "empty")}), "L17")
    assert "config.json" in str(error)


def test_an_unknown_model_family_is_refused(make, tmp_path):
    other = write_model(tmp_path / "other", model_type="llava", text_config={"num_hidden_layers": 4})
    error = refused(make(**{"actor_rollout_ref.model.path": str(other)}), "L18")
    assert (error.where, error.got) == ("actor_rollout_ref.model.path", "llava")
    assert "qwen3_vl" in str(error)


def test_a_family_that_verl_does_not_split_over_devices_is_refused_with_ulysses(make, tmp_path):
    model = write_model(
        tmp_path / "internvl", model_type="internvl", text_config={"model_type": "qwen3", "num_hidden_layers": 4}
    )
    flash = {"actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2"}
    values = {"actor_rollout_ref.model.path": str(model), **flash}
    assert "internvl, probing layer index 3, the last of 4" in dict(preflight(make(**values), dry_run=True))["model"]
    error = refused(make(**values, **{"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2}), "L09")
    assert error.got == "2, internvl"
    split = {"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2}
    preflight(make(**split, **flash), dry_run=True)  # verl splits Qwen3-VL


def test_a_processor_of_another_family_is_refused(make):
    config = make()
    folder = Path(config.actor_rollout_ref.model.path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "LlavaProcessor"}))
        error = refused(config, "L23")
        assert (error.got, error.wanted) == ("LlavaProcessor for a qwen3_vl model", "Qwen3VLProcessor")
        (folder / name).write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
        preflight(config)


def test_fused_kernels_are_refused_if_verl_cannot_run_them(make, tmp_path):
    values = {**qwen2_5(tmp_path / "qwen2_5"), "actor_rollout_ref.model.use_remove_padding": False}
    fused = {"actor_rollout_ref.model.use_fused_kernels": True}
    error = refused(make(**values, **fused, **{"actor_rollout_ref.actor.strategy": "fsdp2"}), "L25")
    assert "strategy=fsdp" in error.fix
    preflight(make(**values, **fused, **{"actor_rollout_ref.actor.strategy": "fsdp"}))
    preflight(make(**fused, **{"actor_rollout_ref.actor.strategy": "fsdp2"}))  # Qwen3-VL


def test_a_sliding_window_layer_is_refused(make, tmp_path):
    text = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    model = write_model(tmp_path / "sliding", model_type="qwen2_5_vl", text_config=text)
    values = {
        "actor_rollout_ref.model.path": str(model),
        "algorithm.attn.region.layers": [0, 3],
        "actor_rollout_ref.model.use_remove_padding": False,
    }
    error = refused(make(**values), "P11")
    assert "3: 'sliding_attention'" in str(error)
    values["algorithm.attn.region.layers"] = [0, 1]
    assert "probing layer index 0, 1 of 4 layers" in dict(preflight(make(**values)))["model"]


def qwen3_5(folder: Path, model_type: str = "qwen3_5", **text: Any) -> dict[str, Any]:
    """The released pattern: three layers of linear attention, then one of full attention."""
    text = {"num_hidden_layers": 8, "full_attention_interval": 4, **text}
    model = write_model(folder, model_type=model_type, text_config=text)
    return {
        "actor_rollout_ref.model.path": str(model),
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.rollout.dtype": "bfloat16",
    }


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_layers_of_linear_attention_are_refused_by_number(make, tmp_path, model_type):
    values = qwen3_5(tmp_path / "hybrid", model_type)
    assert f"({model_type}, probing layer index 7, the last of 8)" in dict(preflight(make(**values)))["model"]
    error = refused(make(**values, **{"algorithm.attn.region.layers": [-1, 0]}), "P11")
    assert error.what == "layer 0 is not a full-attention layer"
    assert (error.got, error.wanted) == ({0: "linear_attention"}, "one of [3, 7]")
    error = refused(make(**values, **{"algorithm.attn.region.layers": [2, 3, -3]}), "P11")
    assert error.what == "layers 2, 5 are not full-attention layers"
    assert (
        "probing layer index 3, 7 of 8 layers"
        in dict(preflight(make(**values, **{"algorithm.attn.region.layers": [3, -1]})))["model"]
    )


def test_a_model_without_an_image_tower_is_refused(make, tmp_path):
    text = write_model(tmp_path / "text", model_type="qwen3_5_text", num_hidden_layers=8)
    error = refused(make(**{"actor_rollout_ref.model.path": str(text)}), "L18")
    assert error.got == "qwen3_5_text"


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_a_transformers_without_the_family_is_one_line(make, tmp_path, monkeypatch, estimator):
    values = qwen3_5(tmp_path / "hybrid") | {"algorithm.adv_estimator": estimator}
    monkeypatch.delitem(CONFIG_MAPPING._mapping, "qwen3_5")
    assert refused(make(**values), "L75").got.startswith("qwen3_5, transformers ")


def test_the_released_qwen2_5_vl_configuration_has_no_text_config(make, tmp_path):
    model = write_model(tmp_path / "flat", model_type="qwen2_5_vl", num_hidden_layers=28, use_sliding_window=False)
    values = {"actor_rollout_ref.model.path": str(model), "actor_rollout_ref.model.use_remove_padding": False}
    plan = dict(preflight(make(**values)))
    assert "probing layer index 27, the last of 28" in plan["model"]


@pytest.mark.parametrize("layers", [[4], [-5], [-1, 3]], ids=str)
def test_a_layer_that_the_model_does_not_have_is_refused(make, layers):
    error = refused(make(**{"algorithm.attn.region.layers": layers}), "P03")
    assert error.where == "algorithm.attn.region.layers"
    assert "4 decoder layers" in str(error)


def test_statistics_that_compare_whole_sequences_are_refused_with_ulysses(make, monkeypatch):
    needs = RegionMethod().needs()
    statistics = StatisticsRequest((*needs.statistics.statistics, Statistic("neighbour_index", size=4)))
    monkeypatch.setattr(RegionMethod, "needs", lambda self: dataclasses.replace(needs, statistics=statistics))
    assert "neighbour_index" in str(
        refused(
            make(
                **{
                    "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2,
                    "actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2",
                }
            ),
            "L27",
        )
    )
