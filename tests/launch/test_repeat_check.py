"""Which runs can have rollouts that repeat."""

import pytest
from support.launch_config import refused

from sayo_verl.launch.preflight import preflight
from sayo_verl.launch.repeat_check import KEY, check_repeatable


@pytest.mark.parametrize("estimator", ["attn_region", "grpo"])
def test_a_synchronous_run_with_vllm_can_and_its_plan_says_so(make, estimator):
    plan = dict(preflight(make(**{KEY: True, "algorithm.adv_estimator": estimator}), dry_run=True))
    assert plan["rollouts repeat"].startswith("from seed ")


def test_the_default_is_off(make):
    assert check_repeatable(make()) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.v1.trainer_mode", "colocate_async"),
        ("actor_rollout_ref.rollout.name", "sglang"),
        ("actor_rollout_ref.rollout.multi_turn.enable", True),
        ("algorithm.filter_groups.enable", True),
    ],
)
def test_a_run_whose_rollouts_cannot_repeat_is_refused(make, key, value):
    grpo = {"algorithm.adv_estimator": "grpo", "algorithm.filter_groups.metric": "acc"}
    error = refused(make(**{**grpo, KEY: True, key: value}), "L97", dry_run=True)
    assert (error.where, error.got) == (key, value)
