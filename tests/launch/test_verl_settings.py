"""Settings of verl under which attention statistics would be absent, wrong or without effect."""

import pytest
from support.launch_config import composed, refused

from sayo_verl.launch.preflight import check_estimator, check_settings, preflight

SETTINGS = [
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
    (
        "L10",
        {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"},
        "algorithm.filter_groups.enable",
    ),
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
def test_another_engine_of_verl_is_refused_although_its_configuration_has_other_keys(repo, engine):
    config = composed(
        repo, f"model_engine={engine}", "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.rollout.name=vllm"
    )
    assert "fsdp_config" not in config.actor_rollout_ref.actor
    error = refused(config, "L08", dry_run=True)
    assert (error.where, error.got) == ("actor_rollout_ref.actor.strategy", engine)
    config.algorithm.adv_estimator = "grpo"
    preflight(config, dry_run=True)


def test_group_filtering_is_allowed_at_weight_zero(make):
    filtered = {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "acc"}
    preflight(make(**filtered, **{"algorithm.attn.region.weight": 0.0}))


@pytest.mark.parametrize(
    "values",
    [
        {"trainer.v1.trainer_mode": "colocate_async"},
        {"actor_rollout_ref.model.external_lib": "sayo_verl.hooks.engine"},
        {"actor_rollout_ref.actor.strategy": "fsdp"},
        {"algorithm.rollout_correction": None},
    ],
    ids=str,
)
def test_settings_that_are_fine_pass(make, values):
    config = make(**values)
    check_settings(config, check_estimator(config))


def test_an_unknown_path_of_the_probe_is_refused(make):
    error = refused(make(**{"sayo.probe_path": "quick"}), "P14")
    assert (error.where, error.got) == ("sayo.probe_path", "quick")


def test_the_log_sum_exp_of_flash_attention_needs_flash_attention_and_whole_packed_rows(make):
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
