"""Every refusal before a run, on the real configuration of verl: its code, the key it names, and what passes."""

import copy
import dataclasses
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

import sayo_verl.launch.data_check
import sayo_verl.launch.memory
import sayo_verl.launch.memory_check
import sayo_verl.launch.model_check
import sayo_verl.launch.preflight
import sayo_verl.launch.resources
import sayo_verl.launch.settings
import sayo_verl.models.families
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.preflight import check_estimator, check_settings, preflight, show
from sayo_verl.launch.resources import CPUS_FIXED, CPUS_PER_DEVICE
from sayo_verl.launch.settings import load_methods, method_from_config, settings_from_config
from sayo_verl.methods import METHODS, DualConfig, Mix, RegionMethod, register_method
from sayo_verl.methods.group import SPREAD_FLOOR
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

MESSAGE = re.compile(r"SAYO-[A-Z]\d\d: .+ \| at .+ \| (.* \| )?fix: .+")


def composed(repo: Path, *overrides: str) -> DictConfig:
    """The configuration that `python -m sayo_verl.main_ppo --config-dir configs` composes."""
    with initialize_config_dir(str(repo / "sayo_verl" / "config"), version_base=None):
        return compose(
            "sayo_trainer",
            overrides=[f"hydra.searchpath=[pkg://verl.trainer.config,file://{repo / 'configs'}]", *overrides],
        )


@pytest.fixture(scope="module")
def base(repo: Path) -> DictConfig:
    return composed(repo, "+hardware=cpu", "actor_rollout_ref.rollout.n=4")


ROWS = 16  # of a file: at least data.train_batch_size


def write_rows(path: Path, *, boxes: list | None, question: str = "What colour?") -> Path:
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (zlib.crc32(path.name.encode()) % 256, 0, 0)).save(png, "PNG")  # held out by name
    row = {
        "data_source": "sayo/scenes",
        "prompt": [{"role": "user", "content": f"<image>{question}"}],
        "images": [{"bytes": png.getvalue(), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": "red"},
        "extra_info": {"index": 0} if boxes is None else {"index": 0, "boxes": boxes},
    }
    pq.write_table(pa.Table.from_pylist([row] * ROWS), path)
    return path


def write_model(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make(base: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """``make(**{key: value})``: a configuration that passes, with some keys changed; unknown keys are an error."""
    for name in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    good = {
        "actor_rollout_ref.model.path": str(
            write_model(tmp_path / "model", model_type="qwen3_vl", text_config={"num_hidden_layers": 4})
        ),
        "data.train_files": str(write_rows(tmp_path / "train.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]])),
        "data.val_files": str(write_rows(tmp_path / "val.parquet", boxes=[[[0.5, 0.5, 1.0, 1.0]]])),
        "reward.custom_reward_function.path": "pkg://sayo_verl.reward",
        "trainer.default_local_dir": str(tmp_path / "checkpoints"),
        "data.train_batch_size": ROWS,
        "sayo.preflight_prompts": 0,  # the folder of the model holds no processor
    }

    def changed(**values: Any) -> DictConfig:
        config = copy.deepcopy(base)
        for key, value in (good | values).items():
            OmegaConf.update(config, key, value)
        return config

    return changed


def refused(config: DictConfig, code: str, *, dry_run: bool = False) -> SayoError:
    with pytest.raises(SayoError) as caught:
        preflight(config, dry_run=dry_run)
    assert caught.value.code == code
    assert MESSAGE.fullmatch(str(caught.value)), str(caught.value)
    return caught.value


# ---------------------------------------------------------------------------------------------------------- what passes


def test_the_default_configuration_of_a_run_passes(make):
    plan = dict(preflight(make()))
    assert plan["estimator"] == "attn_region"
    settings = vars(RegionMethod())
    assert list(settings)[:3] == ["weight", "entropy_fraction", "layers"]
    assert plan["method"].startswith("attn_region: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    assert "qwen3_vl, probing layer 3 of 4" in plan["model"]
    assert "train.parquet: 16 rows, 16 with boxes, 16 images decoded" in plan["train data"]
    assert "val.parquet: 16 rows, 16 with boxes" in plan["val data"]
    assert plan["reward"].startswith("pkg://sayo_verl.reward")
    assert "x 4" in plan["rollouts"]
    assert "1 x 1 cpu" in plan["machines"]


def test_the_composed_settings_are_the_methods_defaults(base):
    assert check_estimator(base) == RegionMethod()
    attn = OmegaConf.to_container(base.algorithm.attn)
    assert attn.pop("mix") == []
    assert attn.pop("spread_floor") == SPREAD_FLOOR
    shipped = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.")}
    assert set(attn) == {name.removeprefix("attn_") for name in shipped}
    for name, method in shipped.items():
        assert set(attn[name.removeprefix("attn_")]) == set(vars(method()))  # `--cfg job` shows every key
        assert method_from_config(name, attn) == method()


def test_a_file_of_configs_method_holds_only_what_differs_from_the_class(repo):
    """``mix`` is not a setting of a class. A copied default in a file would win over a changed class."""
    files = sorted((repo / "configs" / "method").glob("*.yaml"))
    assert {f"attn_{file.stem}" for file in files} >= set(METHODS)
    for file in files:
        attn = OmegaConf.to_container(OmegaConf.load(file).algorithm).get("attn", {})
        for node, values in attn.items():
            if node != "mix":
                default = dataclasses.asdict(METHODS[f"attn_{node}"]())
                assert [key for key, value in values.items() if value == default[key]] == [], file.name


@pytest.mark.parametrize("name", ["dual", "dual_released", "dapo"])
def test_vgpo_and_its_baseline_train_on_dapo_unless_another_is_named_after_it(repo, name):
    config = composed(repo, f"+method={name}")
    assert config.algorithm.adv_estimator == ("grpo" if name == "dapo" else "attn_dual")
    assert (config.algorithm.filter_groups.enable, config.actor_rollout_ref.actor.clip_ratio_high) == (True, 0.28)
    other = composed(repo, f"+method={name}", "+rl=grpo")
    assert other.algorithm.adv_estimator == config.algorithm.adv_estimator
    assert (other.algorithm.filter_groups.enable, other.actor_rollout_ref.actor.clip_ratio_high) == (False, 0.2)


def test_the_released_form_of_vgpo_is_that_of_its_class(repo):
    released = method_from_config(
        "attn_dual", OmegaConf.to_container(composed(repo, "+method=dual_released").algorithm.attn)
    )
    assert {key: vars(released)[key] for key in vars(DualConfig())} == vars(DualConfig.released())


def test_a_method_of_ones_own_is_composed_and_overridden_without_a_plus(repo):
    load_methods([str(repo / "recipe" / "example" / "sensitivity.py")])
    config = composed(repo, "+method=sensitivity", "algorithm.attn.sensitivity.share=0.2")
    assert check_estimator(config) == METHODS["attn_sensitivity"](share=0.2)
    with pytest.raises(SayoError, match=r"^SAYO-L02: unknown setting 'shaer' \(did you mean 'share'\?\)"):
        check_estimator(composed(repo, "+method=sensitivity", "algorithm.attn.sensitivity.shaer=0.2"))


def test_the_plan_is_printed_line_by_line(make):
    lines: list[str] = []
    plan = preflight(make())
    show(plan, lines.append)
    assert len(lines) == len(plan)
    for (name, value), line in zip(plan, lines, strict=True):
        assert line.split(maxsplit=1)[0] == name.split()[0]
        assert line.endswith(value)


def test_the_plan_wraps_to_a_terminal_under_its_names(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    lines: list[str] = []
    show([("length", "word " * 30 + "end"), ("a name", "x" * 100)], lines.append)
    assert len(lines) > 3
    assert all(len(line) <= 60 for line in lines[:-1])
    assert all(line.startswith(" " * 10) and line[10] != " " for line in lines[1:-1])
    assert lines[-1].endswith("x" * 100), "a path is not cut"
    assert " ".join(line.strip() for line in lines[:-1]).split() == ["length", *["word"] * 30, "end"]


def test_the_plan_says_why_the_number_of_steps_is_unknown(make):
    absent = make(**{"data.train_files": "/not/there.parquet", "trainer.total_training_steps": None})
    assert dict(preflight(absent, dry_run=True))["length"].endswith("steps unknown: the data is not there yet")
    there = make(**{"trainer.total_training_steps": None})
    assert "steps unknown: verl counts them" in dict(preflight(there, dry_run=True))["length"]
    assert dict(preflight(make(**{"trainer.total_training_steps": 7}), dry_run=True))["length"].startswith("7 steps, ")


def test_settings_reach_the_method(make):
    config = make(**{"algorithm.attn.region": {"weight": 2, "layers": [-1, 0], "coverage": 1, "entropy_fraction": 1}})
    assert check_estimator(config) == RegionMethod(weight=2.0, layers=(-1, 0), coverage=1.0, entropy_fraction=1.0)
    assert "probing layer 3, 0 of 4" in dict(preflight(config))["model"]


def test_grpo_passes_the_same_files_without_boxes(make, tmp_path):
    bare = [str(write_rows(tmp_path / name, boxes=None)) for name in ("bare.parquet", "bare_val.parquet")]
    values = {"data.train_files": bare[0], "data.val_files": bare[1]}
    refused(make(**values), "D04")
    plan = dict(preflight(make(**values, **{"algorithm.adv_estimator": "grpo"})))
    assert plan["estimator"] == "grpo (verl's own code, untouched)"
    assert plan["method"] == "-"
    assert plan["train data"].endswith("bare.parquet: 16 rows, 16 images decoded")
    assert "0 with boxes" in dict(preflight(make(**values, **{"algorithm.attn.region.weight": 0.0})))["train data"]


@pytest.mark.parametrize(
    "values",
    [
        {"trainer.v1.trainer_mode": "colocate_async"},
        {"algorithm.rollout_correction.bypass_mode": True},
        {"algorithm.use_pf_ppo": True},
        {"actor_rollout_ref.actor.strategy": "megatron"},
        {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
        {"algorithm.filter_groups.enable": True},
        {"actor_rollout_ref.rollout.multi_turn.enable": True},
        {"actor_rollout_ref.model.external_lib": "my_models"},
    ],
    ids=lambda v: next(iter(v)),
)
def test_under_grpo_verls_own_settings_are_verls_business(make, values):
    preflight(make(**values, **{"algorithm.adv_estimator": "grpo"}))


def test_the_plan_says_when_prompts_do_not_ask_for_what_the_reward_reads(make, tmp_path):
    assert dict(preflight(make()))["instruction"].startswith("32 of 32 prompts do not ask for <answer>")
    asking = write_rows(
        tmp_path / "asking.parquet", boxes=[[[0.0, 0.0, 0.5, 0.5]]], question="What? <answer> ... </answer>"
    )
    plan = dict(preflight(make(**{"data.train_files": str(asking)})))
    assert plan["instruction"].startswith("16 of 32")
    assert "instruction" not in dict(preflight(make(**{"reward.custom_reward_function.path": None})))


def test_training_rows_without_an_image_are_refused_for_a_method_that_acts(make, tmp_path):
    text = tmp_path / "text.parquet"
    bare = {"images": None, "prompt": [{"role": "user", "content": "What?"}], "extra_info": {"index": 0}}
    rows = [row | bare for row in pq.read_table(make()["data"]["train_files"]).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), text)
    for estimator in ("attn_dual", "attn_region"):
        changed = {"data.train_files": str(text), "algorithm.adv_estimator": estimator, "sayo.held_out": False}
        assert "no training row has an image" in refused(make(**changed), "D04").what
    preflight(make(**{"data.train_files": str(text), "algorithm.adv_estimator": "grpo", "sayo.held_out": False}))


def test_another_model_family_passes_under_grpo(make, tmp_path):
    other = str(write_model(tmp_path / "other", model_type="llama", num_hidden_layers=2))
    plan = dict(preflight(make(**{"actor_rollout_ref.model.path": other, "algorithm.adv_estimator": "grpo"})))
    assert "(llama)" in plan["model"]


# ------------------------------------------------------------------- the estimator and its settings: L01, L02, L03, A05


@pytest.mark.parametrize("name", ["attn_regoin", "atn_region", "attention_region", "attn-region"])
def test_L01_a_misspelt_estimator_suggests_ours(make, name):
    error = refused(make(**{"algorithm.adv_estimator": name}), "L01")
    assert error.where == "algorithm.adv_estimator"
    assert "did you mean 'attn_region'?" in str(error)
    assert "grpo" in str(error)


def test_L01_a_misspelt_estimator_of_verl_suggests_verls(make):
    assert "did you mean 'grpo'?" in str(refused(make(**{"algorithm.adv_estimator": "grp"}), "L01"))


def add(config: DictConfig, key: str, value: Any) -> DictConfig:
    """As ``+key=value`` does on the command line."""
    with open_dict(config):
        OmegaConf.update(config, key, value, force_add=True)
    return config


def test_L02_an_unknown_key_suggests_the_right_one(repo):
    error = refused(composed(repo, "+hardware=cpu", "algorithm.attn.region.wieght=0.5"), "L02")
    assert error.where == "algorithm.attn.region"
    assert "'wieght' (did you mean 'weight'?)" in str(error)


def test_L02_an_unknown_node_suggests_the_right_one(repo):
    error = refused(composed(repo, "+hardware=cpu", "algorithm.attn.regoin.weight=0.5"), "L02")
    assert error.where == "algorithm.attn"
    assert "'regoin' (did you mean 'region'?)" in str(error)


@pytest.mark.parametrize("estimator", ["grpo", "attn_dual"])
def test_L02_an_unknown_key_of_a_method_that_does_not_run_is_refused_too(repo, estimator):
    for key in ("regoin.weight", "region.wieght"):
        config = composed(repo, "+hardware=cpu", f"algorithm.adv_estimator={estimator}", f"algorithm.attn.{key}=0.5")
        refused(config, "L02")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", "1.0"),
        ("weight", True),
        ("weight", None),
        ("weight", [1.0]),
        ("entropy_fraction", "30%"),
        ("coverage", False),
        ("layers", -1),
        ("layers", "last"),
        ("layers", ["-1"]),
        ("layers", [1.5]),
        ("layers", [True]),
        ("layers", None),
    ],
)
def test_L03_a_value_of_the_wrong_type_is_refused(make, key, value):
    error = refused(make(**{f"algorithm.attn.region.{key}": value}), "L03")
    assert error.where == f"algorithm.attn.region.{key}"
    assert repr(value) in str(error)


@pytest.mark.parametrize("value", [0.5, None, "on", [1]])
def test_L03_a_node_that_is_no_group_of_settings_is_refused(value):
    with pytest.raises(SayoError, match="SAYO-L03") as caught:
        method_from_config("attn_region", {"region": value})
    assert caught.value.where == "algorithm.attn.region"
    assert MESSAGE.fullmatch(str(caught.value))


def test_A05_a_value_out_of_range_is_refused(make):
    error = refused(make(**{"algorithm.attn.region.entropy_fraction": 30}), "A05")
    assert error.where == "algorithm.attn.region.entropy_fraction"


def test_no_settings_are_the_defaults_and_whole_numbers_are_numbers():
    assert method_from_config("attn_region", {}) == RegionMethod()
    assert method_from_config("attn_region", {"region": {"weight": 1}}) == RegionMethod()
    assert isinstance(method_from_config("attn_region", {"region": {"weight": 1}}).weight, float)
    assert method_from_config("grpo", {"region": {"weight": 0.5}}) is None


# ------------------------------------------------------------------------------------ settings of verl: L04 to L13, L20

SETTINGS = [
    ("L05", {"trainer.v1.trainer_mode": "colocate_async"}, "trainer.v1.trainer_mode"),
    ("L05", {"trainer.v1.trainer_mode": "separate_async"}, "trainer.v1.trainer_mode"),
    ("L06", {"algorithm.rollout_correction.bypass_mode": True}, "algorithm.rollout_correction.bypass_mode"),
    ("L07", {"algorithm.use_pf_ppo": True}, "algorithm.use_pf_ppo"),
    ("L08", {"actor_rollout_ref.actor.strategy": "megatron"}, "actor_rollout_ref.actor.strategy"),
    (
        "L09",
        {
            "actor_rollout_ref.model.use_remove_padding": False,
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2,
        },
        "actor_rollout_ref.model.use_remove_padding",
    ),
    (
        "L09",
        {
            "actor_rollout_ref.model.use_remove_padding": False,
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2,
        },
        "actor_rollout_ref.model.use_remove_padding",
    ),
    (
        "L24",
        {
            "actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2,
        },
        "actor_rollout_ref.model.override_config.attn_implementation",
    ),
    ("L10", {"algorithm.filter_groups.enable": True}, "algorithm.filter_groups.enable"),
    ("L12", {"actor_rollout_ref.rollout.n": 1}, "actor_rollout_ref.rollout.n"),
    ("L13", {"actor_rollout_ref.rollout.multi_turn.enable": True}, "actor_rollout_ref.rollout.multi_turn.enable"),
    ("L20", {"actor_rollout_ref.model.external_lib": "my_models"}, "actor_rollout_ref.model.external_lib"),
]


@pytest.mark.parametrize(("code", "values", "key"), SETTINGS, ids=[f"{c} {next(iter(v))}" for c, v, _ in SETTINGS])
def test_a_setting_that_defeats_the_method_is_refused(make, code, values, key):
    error = refused(make(**values), code)
    assert error.where == key
    assert str(next(iter(values.values()))) in str(error)  # what was found
    refused(make(**values), code, dry_run=True)


@pytest.mark.parametrize("engine", ["megatron", "veomni", "torchtitan"])
def test_L08_another_engine_of_verl_is_refused_although_its_configuration_has_other_keys(repo, engine):
    config = composed(repo, f"model_engine={engine}", "actor_rollout_ref.rollout.n=4")
    assert "fsdp_config" not in config.actor_rollout_ref.actor
    error = refused(config, "L08", dry_run=True)
    assert (error.where, error.got) == ("actor_rollout_ref.actor.strategy", engine)
    config.algorithm.adv_estimator = "grpo"
    preflight(config, dry_run=True)


def test_L10_group_filtering_is_allowed_at_weight_zero(make):
    preflight(make(**{"algorithm.filter_groups.enable": True, "algorithm.attn.region.weight": 0.0}))


@pytest.mark.parametrize(
    "values",
    [
        {"trainer.v1.trainer_mode": "sayo_sync"},
        {"actor_rollout_ref.model.external_lib": "sayo_verl.hooks.engine"},
        {"actor_rollout_ref.actor.strategy": "fsdp"},
        {"algorithm.rollout_correction": None},
    ],
    ids=str,
)
def test_settings_that_are_fine_pass(make, values):
    config = make(**values)
    check_settings(config, check_estimator(config))


def test_the_first_mistake_is_told_settings_before_files(make):
    absent = {"data.train_files": "absent.parquet", "actor_rollout_ref.model.path": "/absent"}
    refused(make(**absent, **{"trainer.use_v1": False, "actor_rollout_ref.rollout.n": 1}), "L04")
    refused(make(**absent, **{"actor_rollout_ref.rollout.n": 1}), "L12")
    refused(make(**absent), "L17")


@pytest.mark.parametrize(
    ("key", "dynamic"),
    [
        ("rollout.log_prob_micro_batch_size_per_gpu", "rollout.log_prob_use_dynamic_bsz"),
        ("actor.ppo_micro_batch_size_per_gpu", "actor.use_dynamic_bsz"),
    ],
)
def test_L22_micro_batches_that_do_not_divide_the_batch(make, key, dynamic):
    key, dynamic = f"actor_rollout_ref.{key}", f"actor_rollout_ref.{dynamic}"
    rows = {"data.train_batch_size": 8, "actor_rollout_ref.actor.ppo_mini_batch_size": 8}  # x 4 responses
    error = refused(make(**rows, **{key: 5}), "L22")
    assert error.where == key
    assert "32 rows" in str(error)
    preflight(make(**rows, **{key: 5, dynamic: True}))
    preflight(make(**rows, **{key: 8}))


def test_L22_counts_mini_batches_in_the_update(make):
    rows = {"data.train_batch_size": 8, "actor_rollout_ref.actor.ppo_mini_batch_size": 2}  # 32 rows, 8 a mini-batch
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    assert "8 rows (actor.ppo_mini_batch_size x rollout.n)" in str(refused(make(**rows, **{micro: 16}), "L22"))
    preflight(make(**rows, **{micro: 4}))
    # the log-prob pass sees the batch padded to whole mini-batches: 3 prompts x 4 become 16 rows
    preflight(make(**{**rows, "data.train_batch_size": 3}, **{LOG_PROB_MICRO: 16, micro: 4}))


LOG_PROB_MICRO = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"


# -------------------------------------------------- machine: L14; what is overwritten or resumed is in test_resume.py


def test_L14_too_few_cpus_for_ray(make, monkeypatch):
    wanted = 1 + CPUS_PER_DEVICE + CPUS_FIXED  # one storage unit, one device
    error = refused(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}), "L14")
    assert error.where == "ray_kwargs.ray_init.num_cpus"
    assert f"num_cpus={wanted}" in error.fix
    refused(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1, "algorithm.adv_estimator": "grpo"}), "L14")
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted}))
    # another machine will run it
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}), dry_run=True)
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1, "trainer.nnodes": 2}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": wanted - 1}))


def test_L14_counts_the_machine_when_ray_is_not_told(make, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert refused(make(**{"ray_kwargs.ray_init.num_cpus": None}), "L14").got == 5
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    preflight(make(**{"ray_kwargs.ray_init.num_cpus": None}))


# ------------------------------------------------------ files: L17, L18, L19, P03, D01, D04 and those of the data check


@pytest.mark.parametrize("path", ["/absent/model", "./absent", "../absent", "~/absent_model_folder", "absent", "a/b/c"])
def test_L17_no_model_at_the_path(make, path):
    error = refused(make(**{"actor_rollout_ref.model.path": path}), "L17")
    assert (error.where, error.got) == ("actor_rollout_ref.model.path", path)


def test_L17_a_folder_that_is_no_model(make, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(make(**{"actor_rollout_ref.model.path": str(tmp_path / "empty")}), "L17")
    assert "config.json" in str(error)


def test_L18_an_unknown_model_family(make, tmp_path):
    other = write_model(tmp_path / "other", model_type="llava", text_config={"num_hidden_layers": 4})
    error = refused(make(**{"actor_rollout_ref.model.path": str(other)}), "L18")
    assert (error.where, error.got) == ("actor_rollout_ref.model.path", "llava")
    assert "qwen3_vl" in str(error)


def test_L09_a_family_that_verl_does_not_split_over_devices(make, tmp_path):
    model = write_model(
        tmp_path / "internvl", model_type="internvl", text_config={"model_type": "qwen3", "num_hidden_layers": 4}
    )
    flash = {"actor_rollout_ref.model.override_config.attn_implementation": "flash_attention_2"}
    values = {"actor_rollout_ref.model.path": str(model), **flash}
    assert "internvl, probing layer 3 of 4" in dict(preflight(make(**values), dry_run=True))["model"]
    error = refused(make(**values, **{"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2}), "L09")
    assert error.got == "2, internvl"
    split = {"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2}
    preflight(make(**split, **flash), dry_run=True)  # verl splits Qwen3-VL


def test_L23_a_processor_of_another_family(make):
    config = make()
    folder = Path(config.actor_rollout_ref.model.path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "LlavaProcessor"}))
        error = refused(config, "L23")
        assert (error.got, error.wanted) == ("LlavaProcessor for a qwen3_vl model", "Qwen3VLProcessor")
        (folder / name).write_text(json.dumps({"processor_class": "Qwen3VLProcessor"}))
        preflight(config)


def qwen2_5(folder: Path) -> dict[str, str]:
    text = {"num_hidden_layers": 4, "use_sliding_window": False}
    return {"actor_rollout_ref.model.path": str(write_model(folder, model_type="qwen2_5_vl", text_config=text))}


def test_L25_fused_kernels_that_do_not_run(make, tmp_path):
    values = {**qwen2_5(tmp_path / "qwen2_5"), "actor_rollout_ref.model.use_remove_padding": False}
    fused = {"actor_rollout_ref.model.use_fused_kernels": True}
    error = refused(make(**values, **fused, **{"actor_rollout_ref.actor.strategy": "fsdp2"}), "L25")
    assert "strategy=fsdp" in error.fix
    preflight(make(**values, **fused, **{"actor_rollout_ref.actor.strategy": "fsdp"}))
    preflight(make(**fused, **{"actor_rollout_ref.actor.strategy": "fsdp2"}))  # Qwen3-VL


def test_P11_a_sliding_window_layer(make, tmp_path):
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
    assert "probing layer 0, 1 of 4" in dict(preflight(make(**values)))["model"]


def test_the_released_qwen2_5_vl_configuration_has_no_text_config(make, tmp_path):
    model = write_model(tmp_path / "flat", model_type="qwen2_5_vl", num_hidden_layers=28, use_sliding_window=False)
    values = {"actor_rollout_ref.model.path": str(model), "actor_rollout_ref.model.use_remove_padding": False}
    plan = dict(preflight(make(**values)))
    assert "probing layer 27 of 28" in plan["model"]


def test_P14_an_unknown_path_of_the_probe(make):
    error = refused(make(**{"sayo.probe_path": "quick"}), "P14")
    assert (error.where, error.got) == ("sayo.probe_path", "quick")


def test_P31_the_log_sum_exp_of_flash_attention_needs_flash_attention_and_whole_packed_rows(make):
    attention = "actor_rollout_ref.model.override_config"
    ok = {
        "sayo.probe_path": "fast_lse",
        "actor_rollout_ref.model.use_remove_padding": True,
        attention: {"attn_implementation": "flash_attention_2"},
    }
    for broken in (
        {"actor_rollout_ref.model.use_remove_padding": False},
        {attention: {"attn_implementation": "sdpa"}},
        {"actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": 2},
    ):
        error = refused(make(**{**ok, **broken}), "P31")
        assert (error.where, error.fix) == ("sayo.probe_path", "set sayo.probe_path=fast, which computes its own")


@pytest.mark.parametrize("layers", [[4], [-5], [-1, 3]], ids=str)
def test_P03_a_layer_the_model_does_not_have(make, layers):
    error = refused(make(**{"algorithm.attn.region.layers": layers}), "P03")
    assert error.where == "algorithm.attn.region.layers"
    assert "4 decoder layers" in str(error)


@pytest.mark.parametrize("split", ["train_files", "val_files"])
def test_D01_an_absent_parquet(make, split):
    error = refused(make(**{f"data.{split}": "absent.parquet"}), "D01")
    assert (error.where, error.got) == (f"data.{split}", "absent.parquet")


def test_D65_validation_on_what_is_trained(make, tmp_path):
    same = str(tmp_path / "train.parquet")
    error = refused(make(**{"data.val_files": same}), "D65")
    assert "sayo.held_out=false" in error.fix
    plan = dict(preflight(make(**{"data.val_files": same, "sayo.held_out": False})))
    assert "not compared" in plan["held out"]
    assert "1 images of validation are not among 0 and 1 of training" in dict(preflight(make()))["held out"]


def test_every_file_of_a_list_is_checked(make, tmp_path):
    good = str(tmp_path / "train.parquet")
    assert dict(preflight(make(**{"data.train_files": [good, good]})))["train data"].count("16 rows") == 2
    refused(make(**{"data.train_files": [good, "absent.parquet"]}), "D01")


def test_D04_boxes_are_asked_for_over_all_training_files_together(make, tmp_path):
    bare, good = str(write_rows(tmp_path / "bare.parquet", boxes=[[]])), str(tmp_path / "train.parquet")
    error = refused(make(**{"data.train_files": bare}), "D04")
    assert error.where == "data.train_files"
    assert "algorithm.adv_estimator=grpo" in error.fix
    assert "0 with boxes" in dict(preflight(make(**{"data.train_files": [bare, good]})))["train data"]
    preflight(make(**{"data.val_files": bare}))


def test_boxes_are_nothing_to_verls_own_estimators(make, tmp_path):
    bad = str(write_rows(tmp_path / "bad.parquet", boxes=[[[0.5, 0.5, 0.25, 0.25]]]))
    refused(make(**{"data.train_files": bad}), "V02")
    preflight(make(**{"data.train_files": bad, "algorithm.adv_estimator": "grpo"}))


def test_the_columns_are_those_of_the_configuration(make):
    assert "'questions'" in str(refused(make(**{"data.prompt_key": "questions"}), "D03"))
    for estimator in ("attn_region", "grpo"):
        error = refused(make(**{"data.image_key": "pictures", "algorithm.adv_estimator": estimator}), "D09")
        assert "data.image_key" in error.fix


@pytest.mark.parametrize("split", ["train_files", "val_files"])
@pytest.mark.parametrize("files", [None, [], "", [None]], ids=str)
def test_L40_no_data_file_is_named(make, split, files):
    for estimator in ("attn_region", "grpo"):
        error = refused(make(**{f"data.{split}": files, "algorithm.adv_estimator": estimator}), "L40")
        assert error.where == f"data.{split}"
        refused(make(**{f"data.{split}": files, "algorithm.adv_estimator": estimator}), "L40", dry_run=True)


def test_L41_a_kind_of_file_that_verl_does_not_read(make, tmp_path):
    error = refused(make(**{"data.train_files": str(tmp_path / "rows.csv")}), "L41")
    assert (error.where, error.got) == ("data.train_files", str(tmp_path / "rows.csv"))
    for other in ("rows.jsonl", "hdfs://there/rows.parquet"):
        plan = dict(preflight(make(**{"data.train_files": other})))
        assert plan["train data"] == f"{other} - not checked: only local parquet files are"
        assert plan["held out"].startswith("not checked")


def test_a_data_set_class_of_ones_own_reads_the_files_in_its_own_way(make):
    values = {"data.custom_cls.path": "pkg://mine", "data.train_files": "absent.parquet"}
    plan = dict(preflight(make(**values, **{"algorithm.adv_estimator": "grpo"})))
    assert plan["data"].startswith("not checked: pkg://mine")
    refused(make(**values), "D01")  # a method of ours needs the row contract


def test_D75_fewer_rows_than_a_batch(make, tmp_path):
    for estimator in ("attn_region", "grpo"):
        few = {"data.train_batch_size": ROWS + 1, "algorithm.adv_estimator": estimator}
        assert f"{ROWS} rows" in str(refused(make(**few), "D75"))
        preflight(make(**few, **{"data.train_files": [str(tmp_path / "train.parquet")] * 2}))
    assert "8 rows" in str(refused(make(**{"data.train_max_samples": 8}), "D75"))


def test_D64_training_files_that_verl_cannot_join(make, tmp_path):
    good, other = tmp_path / "train.parquet", tmp_path / "other.parquet"
    rows = [{**row, "extra_info": "{}"} for row in pq.read_table(write_rows(other, boxes=None)).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), other)
    error = refused(make(**{"data.train_files": [str(good), str(other)]}), "D64")
    assert "extra_info: string" in str(error.got)


def test_D74_the_judge_of_the_run_says_which_truths_can_be_graded(make, tmp_path):
    config, rows = make(), pq.read_table(tmp_path / "train.parquet").to_pylist()
    for row in rows:
        row["reward_model"]["ground_truth"] = "\\boxed{3}"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    error = refused(config, "D74")
    assert "row 0, reward_model.ground_truth" in error.where
    refused(make(**{"data.val_files": config.data.train_files, "data.train_files": config.data.val_files}), "D74")
    (tmp_path / "mine.py").write_text("def compute_score(**kwargs): ...\n")
    preflight(make(**{"reward.custom_reward_function.path": "mine.py"}))


# ----------------------------------------------------------------------------------- rows through the model's processor


def write_sizes(path: Path, *sizes: tuple[int, int], text: str = "<image>What colour?") -> str:
    """A row for each size of an image; (0, 0) is a row without one."""
    rows = []
    for i, size in enumerate(sizes):
        png = io.BytesIO()
        Image.new("RGB", (max(1, size[0]), max(1, size[1])), (i, zlib.crc32(path.name.encode()) % 256, 0)).save(
            png, "PNG"
        )
        rows.append(
            {
                "data_source": "sayo/scenes",
                "prompt": [{"role": "user", "content": text if size[0] else text.replace("<image>", "")}],
                "images": [{"bytes": png.getvalue(), "path": None}] if size[0] else [],
                "reward_model": {"style": "rule", "ground_truth": "red"},
                "extra_info": {"index": i, "boxes": [[[0.0, 0.0, 0.5, 0.5]]] if size[0] else []},
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def through(make, random_policy, tmp_path):
    """``through((width, height), ..., **values)``: a configuration whose rows go through a processor."""

    def composed_with(*sizes: tuple[int, int], text: str = "<image>What colour?", **values: Any) -> DictConfig:
        return make(
            **{
                "actor_rollout_ref.model.path": str(random_policy),
                "sayo.preflight_prompts": 8,
                "actor_rollout_ref.model.use_remove_padding": False,
                "data.train_batch_size": 2,
                "data.train_files": write_sizes(tmp_path / "some.parquet", *sizes, text=text),
            }
            | values
        )

    return composed_with


SMALL, LARGE = (64, 64), (640, 640)  # 4 and 64 visual tokens of the tiny policy


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_prompts_that_fit_are_told_in_the_plan(through, estimator):
    plan = dict(preflight(through(*[SMALL] * 20, **{"algorithm.adv_estimator": estimator})))
    assert re.match(r"train: [4-8] rows tried, up to \d+ tokens of \d+; val: ", plan["prompts"])


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_D68_the_largest_image_is_tried_wherever_it_is(through, estimator):
    sizes = [SMALL] * 77
    sizes[41] = LARGE
    values = {"algorithm.adv_estimator": estimator, "data.max_prompt_length": 60}
    error = refused(through(*sizes, **values), "D68")
    assert error.where.endswith("some.parquet row 41")
    assert "data.max_prompt_length" in error.fix
    plan = dict(preflight(through(*sizes, **values, **{"data.filter_overlong_prompts": True})))
    assert "verl's filter drops 0 of 4 evenly spread rows" in plan["prompts"]


def test_D68_D75_verls_length_filter_leaves_no_row_or_less_than_a_batch(through):
    drops = {"data.max_prompt_length": 60, "data.filter_overlong_prompts": True}
    error = refused(through(LARGE, LARGE, LARGE, **drops), "D68")
    assert "3 of 3 rows" in str(error.got)
    error = refused(through(LARGE, SMALL, LARGE, **drops), "D75")
    assert "1 rows" in str(error.got)
    preflight(through(LARGE, SMALL, SMALL, **drops))


def test_D77_a_narrow_image_is_refused_or_left_to_verls_filter(through):
    assert "row 1" in refused(through(SMALL, (402, 2), SMALL), "D77").where
    told = dict(preflight(through(SMALL, (402, 2), SMALL, **{"data.filter_overlong_prompts": True})))
    assert "1 rows too narrow" in told["train data"]
    assert "drops 1 of" in told["prompts"]
    refused(through(SMALL, (402, 2), (402, 2), **{"data.filter_overlong_prompts": True}), "D75")


def test_long_text_prompts_are_counted_since_verl_cuts_them(through):
    config = through(SMALL, (0, 0), SMALL, text="<image>" + "What colour? " * 40, **{"data.max_prompt_length": 120})
    config.algorithm.adv_estimator = "grpo"
    images = refused(config, "D68")
    assert "row 0" in images.where
    OmegaConf.update(
        config,
        "data.train_files",
        write_sizes(Path(config.data.train_files), (0, 0), (0, 0), text="What colour? " * 400),
    )
    assert "2 text prompts are cut on the left" in dict(preflight(config))["prompts"]


def test_the_chat_template_of_the_run_is_used(through):
    longer = "{% for m in messages %}" + "what " * 300 + "{% endfor %}"
    config = through((0, 0), (0, 0), SMALL, **{"actor_rollout_ref.model.custom_chat_template": longer})
    config.algorithm.adv_estimator = "grpo"
    refused(config, "D68")


def test_D68_a_model_without_its_processor(make):
    assert "cannot be loaded" in str(refused(make(**{"sayo.preflight_prompts": 8}), "D68"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sayo.preflight_prompts": 0}, "sayo.preflight_prompts"),
        ({"sayo.preflight_images": -1}, "preflight_images"),
        ({"actor_rollout_ref.model.path": "Qwen/Qwen3-VL-8B-Instruct"}, "not on this machine"),
    ],
    ids=str,
)
def test_what_was_not_checked_is_told(through, values, says):
    told = dict(preflight(through(SMALL, SMALL, **values), dry_run=True))["prompts"]
    assert told.startswith("not checked")
    assert says in told


def test_a_model_of_another_family_is_not_asked_for_prompts(through, tmp_path):
    other = str(write_model(tmp_path / "other", model_type="llama", num_hidden_layers=2))
    values = {"actor_rollout_ref.model.path": other, "algorithm.adv_estimator": "grpo"}
    assert "not checked: the processor of llama" in dict(preflight(through(SMALL, SMALL, **values)))["prompts"]


def test_a_dry_run_lists_absent_files_instead_of_refusing(make):
    config = make(
        **{
            "actor_rollout_ref.model.path": "/absent/model",
            "data.train_files": ["one.parquet", "two.parquet"],
            "data.val_files": "three.parquet",
        }
    )
    plan = dict(preflight(config, dry_run=True))
    told = " ".join([plan["model"], plan["train data"], plan["val data"]])
    for name in ("/absent/model", "one.parquet", "two.parquet", "three.parquet"):
        assert re.search(rf"{name} - NOT THERE YET", told), name
    refused(config, "L17")


def test_a_dry_run_still_checks_what_is_there(make, tmp_path):
    bare = str(write_rows(tmp_path / "bare.parquet", boxes=[[]]))
    refused(make(**{"data.train_files": bare}), "D04", dry_run=True)
    refused(make(**{"algorithm.attn.region.layers": [9]}), "P03", dry_run=True)


def test_preflight_changes_nothing(make):
    config = make()
    before = OmegaConf.to_yaml(config)
    preflight(config)
    assert OmegaConf.to_yaml(config) == before


# --------------------------------------------------------------------------------------------------------- all refusals


def test_L27_statistics_that_compare_whole_sequences(make, monkeypatch):
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


def test_L28_a_package_the_method_needs(make, monkeypatch):
    needs = RegionMethod().needs()
    packages = (("no_such_package", "pip install 'sayo-verl[anchor]'"),)
    monkeypatch.setattr(RegionMethod, "needs", lambda self: dataclasses.replace(needs, packages=packages))
    assert "pip install" in refused(make(), "L28").fix


@pytest.mark.parametrize(
    ("file", "says"), [("absent.py", "absent.py"), ("broken.py", "invalid syntax"), ("no.such.module", "No module")]
)
def test_L29_a_module_of_ones_own_that_cannot_be_loaded(tmp_path, file, says):
    (tmp_path / "broken.py").write_text("def :")
    with pytest.raises(SayoError, match=r"^SAYO-L29: ") as caught:
        load_methods([str(tmp_path / file) if file.endswith(".py") else file])
    assert says in str(caught.value)


def test_a_method_of_ones_own_is_known_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("sayo_verl.methods.METHODS", METHODS.copy())
    monkeypatch.setattr("sayo_verl.launch.settings.METHODS", sayo_verl.methods.METHODS)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from sayo_verl.methods import RegionMethod, register_method\n"
        "@register_method\n"
        "@dataclass(frozen=True)\n"
        "class Mine(RegionMethod):\n"
        "    weight: float = 0.25\n"
        "    name = 'attn_mine'\n"
    )
    assert load_methods([str(tmp_path / "mine.py")]) == [str(tmp_path / "mine.py")]
    method = method_from_config("attn_mine", {"mine": {"coverage": 1.0}})
    assert method is not None
    assert (method.name, vars(method)["weight"], vars(method)["coverage"]) == ("attn_mine", 0.25, 1.0)
    assert load_methods([str(tmp_path / "mine.py")])  # a second time does nothing


@pytest.mark.parametrize("name", ["attn_region", "attn_mix", "attn_spread_floor", "mine", None])
def test_a_class_that_cannot_be_a_method_is_refused(name):
    cls = dataclasses.make_dataclass("Mine", [], frozen=True, namespace={"name": name})
    with pytest.raises(SayoError, match=r"^SAYO-A14: "):
        register_method(cls)
    with pytest.raises(SayoError, match=r"^SAYO-A14: "):
        register_method(dataclasses.make_dataclass("Mine", [], namespace={"name": "attn_mine"}))


@pytest.mark.parametrize(
    ("estimator", "attn", "code"),
    [
        ("attn_mix", {}, "A12"),
        ("attn_mix", {"mix": ["region", "region"]}, "A12"),
        ("attn_mix", {"mix": ["regoin"]}, "L02"),
        ("attn_mix", {"mix": "region"}, "L03"),
        ("attn_region", {"mix": ["region"]}, "A12"),
        ("grpo", {"mix": ["region"]}, "A12"),
        ("attn_region", {"spread_floor": -1}, "L03"),
        ("attn_region", {"spread_floor": True}, "L03"),
        ("attn_region", {"spread_floor": 1.0}, "L03"),
    ],
)
def test_a_mix_or_floor_that_makes_no_sense_is_refused(estimator, attn, code):
    with pytest.raises(SayoError, match=f"^SAYO-{code}: "):
        settings_from_config(estimator, attn)


def test_a_mix_of_one_is_that_method():
    settings = settings_from_config("attn_mix", {"mix": ["region"], "region": {"weight": 2}, "spread_floor": None})
    assert settings.spread_floor is None
    assert isinstance(settings.method, Mix)
    assert settings.method.methods == (RegionMethod(weight=2.0),)
    assert settings.method.needs() == RegionMethod(weight=2.0).needs()


def test_near_names():
    assert did_you_mean("attn_regoin", ["attn_region", "grpo"]) == " (did you mean 'attn_region'?)"
    assert did_you_mean("xyz", ["attn_region", "grpo"]) == ""
