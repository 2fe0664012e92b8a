"""The plan of a run, the order of the checks, and dry runs."""

import re

import pytest
from omegaconf import OmegaConf
from support.launch_config import composed, refused, write_rows

from sayo_verl.launch.preflight import preflight, show
from sayo_verl.methods import RegionMethod


def test_the_default_configuration_of_a_run_passes(make):
    plan = dict(preflight(make()))
    assert plan["estimator"] == "attn_region"
    settings = vars(RegionMethod())
    assert list(settings)[:3] == ["weight", "entropy_fraction", "layers"]
    assert plan["method"].startswith("attn_region: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    assert "qwen3_vl, probing layer index 3, the last of 4" in plan["model"]
    assert "train.parquet: 16 rows, 16 with boxes, 16 images decoded" in plan["train data"]
    assert "val.parquet: 16 rows, 16 with boxes" in plan["val data"]
    assert plan["reward"].startswith("pkg://sayo_verl.reward")
    assert "x 4" in plan["rollouts"]
    assert "1 x 1 cpu" in plan["machines"]


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
    assert dict(preflight(absent, dry_run=True))["length"].endswith("steps unknown: the data does not exist yet")
    there = make(**{"trainer.total_training_steps": None})
    assert "steps unknown: verl counts them" in dict(preflight(there, dry_run=True))["length"]
    assert dict(preflight(make(**{"trainer.total_training_steps": 7}), dry_run=True))["length"].startswith("7 steps, ")


@pytest.mark.parametrize(
    "values",
    [
        {"trainer.v1.trainer_mode": "colocate_async"},
        {"algorithm.rollout_correction.bypass_mode": True},
        {"algorithm.use_pf_ppo": True},
        {"actor_rollout_ref.actor.strategy": "megatron"},
        {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
        {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"},
        {"actor_rollout_ref.rollout.multi_turn.enable": True},
        {"actor_rollout_ref.model.external_lib": "my_models"},
    ],
    ids=lambda v: next(iter(v)),
)
def test_under_grpo_verls_own_settings_are_verls_business(make, values):
    preflight(make(**values, **{"algorithm.adv_estimator": "grpo"}))


def test_settings_are_checked_before_files(make):
    absent = {"data.train_files": "absent.parquet", "actor_rollout_ref.model.path": "/absent"}
    refused(make(**absent, **{"trainer.use_v1": False, "actor_rollout_ref.rollout.n": 1}), "L04")
    refused(make(**absent, **{"actor_rollout_ref.rollout.n": 1}), "L12")
    refused(make(**absent), "L17")


def test_a_dry_run_lists_absent_files_instead_of_refusing(make):
    config = make(
        **{
            "actor_rollout_ref.model.path": "/absent/model",
            "data.train_files": ["one.parquet", "two.parquet"],
            "data.val_files": "three.parquet",
        }
    )
    plan = dict(preflight(config, dry_run=True))
    line = " ".join([plan["model"], plan["train data"], plan["val data"]])
    for name in ("/absent/model", "one.parquet", "two.parquet", "three.parquet"):
        assert re.search(rf"{name} - NOT THERE YET", line), name
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


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        (
            "dual",
            "vanilla loss, token-mean, clip 0.2 to 0.28, dual clip 3.0, no KL loss, entropy 0, advantages over the "
            "spread of their group, groups filtered by acc",
        ),
        (
            "grpo",
            "vanilla loss, token-mean, clip 0.2 to 0.2, dual clip 3.0, KL loss 0.001 (low_var_kl), entropy 0, "
            "advantages over the spread of their group, all groups kept",
        ),
    ],
)
def test_the_plan_says_what_the_actor_minimises(repo, method, objective):
    config = composed(repo, "+job=qwen2_5vl_7b", f"+method={method}")
    assert dict(preflight(config, dry_run=True))["objective"] == objective
