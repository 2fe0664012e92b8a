"""Settings of recorded rollouts: the plan, and what is refused before a run."""

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from support.launch_config import refused
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer

from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.record_check import observation, recorded_needs, recorded_steps
from sayo_verl.main_ppo import select_method
from sayo_verl.methods.dual import DualMethod
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.methods.region import RegionMethod
from sayo_verl.probe.statistics import Statistic
from sayo_verl.vision.intervention import Intervention

ESTIMATORS = ("attn_region", "grpo")
OFF = "sayo.viz_every=0"


@pytest.fixture
def recording(make, tmp_path, monkeypatch):
    """``make`` with recorded rollouts and a folder of the run."""

    def changed(**values):
        monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "run" / "metrics.jsonl"))
        return make(**{"sayo.viz_every": 5, "trainer.total_training_steps": 12, **values})

    return changed


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_plan_says_what_is_recorded_where_and_what_it_costs(recording, tmp_path, estimator):
    config = recording(**{"algorithm.adv_estimator": estimator})
    plan = dict(preflight(config))
    assert plan["recorded"] == (
        "2 held-out prompts x 4 rollouts of the policy after 0, 5, 10 and 12 steps, in "
        f"{tmp_path}/run/rollouts; each time 2 log-prob passes, 1 with a changed image, of 8 rows, "
        "about 25 % of one training log-prob pass (64 rows)"
    )
    assert "probing layer index 3, the last of 4" in plan["model"]
    assert select_method(config)
    assert config.trainer.v1.trainer_mode == "sayo_sync"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_recording_is_off_unless_a_job_turns_it_on(make, repo, estimator):
    config = make(**{"algorithm.adv_estimator": estimator})
    assert dict(preflight(config))["recorded"] == "nothing; sayo.viz_every=10 records 2 held-out prompts"
    assert select_method(config) == (estimator != "grpo"), "verl's own code for its own estimators"
    jobs = {
        file.stem: OmegaConf.load(file).get("sayo", {}).get("viz_every", 0)
        for file in (repo / "configs/job").glob("*.yaml")
    }
    assert {job for job, every in jobs.items() if every} == {"tiny"}


@pytest.mark.parametrize(("key", "value"), [("viz_every", -1), ("viz_prompts", 0)])
def test_a_number_that_is_too_small_is_refused(recording, key, value):
    error = refused(recording(**{f"sayo.{key}": value}), "L90")
    assert (error.where, error.got) == (f"sayo.{key}", value)


def test_a_run_without_a_folder_cannot_record(make, recording):
    assert OFF in refused(make(**{"sayo.viz_every": 5}), "L91").fix
    refused(recording(**{"trainer.logger": ["console"]}), "L91")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("trainer.val_only", True, "trains no step"),
        ("actor_rollout_ref.rollout.multi_turn.enable", True, "SAYO-L13"),
        ("algorithm.rollout_correction.bypass_mode", True, "SAYO-L06"),
    ],
)
def test_settings_under_which_verls_own_estimator_cannot_be_recorded_are_named(recording, key, value, named):
    error = refused(recording(**{"algorithm.adv_estimator": "grpo", key: value}), "L92")
    assert named in str(error)
    assert OFF in error.fix


def test_a_trainer_of_another_plug_in_cannot_record(recording, monkeypatch):
    monkeypatch.setattr("verl.trainer.ppo.v1.trainer_base.TRAINER_REGISTRY", dict(TRAINER_REGISTRY))
    register_trainer("theirs")(type("Theirs", (PPOTrainerSync,), {}))
    config = recording(**{"algorithm.adv_estimator": "grpo", "trainer.v1.trainer_mode": "theirs"})
    assert refused(config, "L92").got == "theirs"


def test_held_out_rows_without_an_image_are_refused(recording, tmp_path):
    config = recording(**{"algorithm.adv_estimator": "grpo"})
    table = pq.read_table(config.data.val_files)
    rows = table.to_pylist()
    for row in rows:
        row["images"], row["prompt"] = [], [{"role": "user", "content": "What colour?"}]
    file = tmp_path / "text.parquet"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), file)
    config.data.val_files = str(file)
    assert OFF in refused(config, "L93").fix


def test_what_is_measured_has_the_layers_the_rows_and_the_changed_image_of_the_method(make):
    config = make()
    faithful = FaithfulMethod(layers=(1, 2))
    seen = observation(config, faithful)
    assert (seen.layers, seen.query_row) == ((1, 2), "predicting")
    assert (seen.intervention,) == faithful.needs().interventions
    assert observation(config, RegionMethod()).intervention == Intervention()
    assert observation(config, DualMethod()).layers == (-1,), "hidden states have no attention"
    config.sayo.viz_causal = False
    assert observation(config, RegionMethod()).intervention is None
    assert observation(config, None).intervention is None
    assert observation(config, faithful).intervention is not None, "the method needs it"
    config.sayo.probe_path = "reference"
    needs = recorded_needs(config, RegionMethod(coverage=0.3))
    assert (needs.statistics.coverage, needs.statistics.path) == (0.3, "reference")
    assert Statistic("region_mass") in needs.statistics.statistics
    assert len(set(needs.statistics.statistics)) == len(needs.statistics.statistics)


@pytest.mark.parametrize(
    ("every", "total", "text"),
    [(1, 1, "0 and 1 steps"), (50, 30, "0 and 30 steps"), (10, 300, "0, 10, ... and 300 steps"),
     (10, None, "0, 10, 20, ... steps, and at the end")],
)  # fmt: skip
def test_the_recorded_steps_are_named(make, every, total, text):
    config = make(**{"sayo.viz_every": every, "trainer.total_training_steps": total})
    assert recorded_steps(config) == text
