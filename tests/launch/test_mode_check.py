"""verl's trainer mode: its name, and what verl would refuse or do wrong in separate_async, for every estimator."""

import pytest
from support.launch_config import composed, refused
from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY, register_trainer

from sayo_verl.launch.mode_check import MODES, check_mode, prompts_per_update, rollout_devices
from sayo_verl.launch.preflight import check_estimator, preflight
from sayo_verl.launch.resources import describe_machines

MODE, SYNC_STEP = "trainer.v1.trainer_mode", "trainer.v1.separate_async.parameter_sync_step"
ROLLOUT = "actor_rollout_ref.rollout"
SEPARATE = {
    MODE: "separate_async",
    SYNC_STEP: 2,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
    f"{ROLLOUT}.nnodes": 1,
    f"{ROLLOUT}.checkpoint_engine.backend": "cpu_file",
    f"{ROLLOUT}.checkpoint_engine.custom_backend_module": "sayo_verl.hooks.cpu.weights",
    "ray_kwargs.ray_init.num_cpus": 14,
}
OLD = "attention statistics are of the old policy, not of older weights that generated"
LORA = {"actor_rollout_ref.model.lora_rank": 8, "actor_rollout_ref.model.lora.merge": True}
ESTIMATORS = ("attn_region", "grpo")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("name", "meant"),
    [("seperate_async", "separate_async"), ("colocate-async", "colocate_async"), ("sayo_sync", "sync"), ("v0", None)],
)
def test_a_mode_that_does_not_exist_is_refused_with_the_nearest_name(make, estimator, name, meant):
    error = refused(make(**{MODE: name, "algorithm.adv_estimator": estimator}), "L05")
    assert (error.where, error.got) == (MODE, name)
    assert (f"(did you mean {meant!r}?)" in error.what) == (meant is not None)


def test_the_modes_are_those_of_verl():
    assert set(MODES) == {name for name in TRAINER_REGISTRY if not name.startswith("sayo_")}


def test_verls_own_estimators_may_use_a_trainer_that_a_plug_in_registered(make, monkeypatch):
    monkeypatch.setattr("verl.trainer.ppo.v1.trainer_base.TRAINER_REGISTRY", dict(TRAINER_REGISTRY))
    register_trainer("theirs")(type("Theirs", (PPOTrainerSeparateAsync,), {}))
    config = make(**{MODE: "theirs", "algorithm.adv_estimator": "grpo"})
    check_mode(config, check_estimator(config), here=True)
    refused(make(**{MODE: "theirs"}), "L05")


@pytest.mark.parametrize("mode", MODES)
def test_the_launcher_selects_verls_trainer_of_the_mode_with_attention(make, mode):
    import sayo_verl.hooks.modes  # noqa: F401 (registers the trainers)
    from sayo_verl.main_ppo import select_method

    config = make(**{MODE: mode})
    assert select_method(config)
    cls = TRAINER_REGISTRY[config.trainer.v1.trainer_mode]
    assert cls.base_mode == mode
    assert [c.__name__ for c in cls.__mro__[1:4]] == [TRAINER_REGISTRY[mode].__name__, "AttentionTrainer", "PPOTrainer"]
    grpo = make(**{MODE: mode, "algorithm.adv_estimator": "grpo"})
    assert not select_method(grpo)
    assert grpo.trainer.v1.trainer_mode == mode


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("values", [{MODE: "colocate_async"}, SEPARATE], ids=["colocate_async", "separate_async"])
def test_an_asynchronous_mode_that_fits_passes(make, estimator, values):
    preflight(make(**values, **{"algorithm.adv_estimator": estimator}))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "sync"),
        ({MODE: "colocate_async"}, f"colocate_async, groups over 8 versions old are dropped, {OLD}"),
        (
            SEPARATE | LORA | {"trainer.v1.sampler.max_off_policy_strategy": "wait"},
            "separate_async, 2 update(s) of 8 prompts between transfers of weights, groups over 8 versions old are "
            f"waited for, {OLD}, LoRA is sent merged into the model",
        ),
        ({MODE: "colocate_async", "trainer.v1.sampler.max_off_policy_threshold": None}, f"colocate_async, {OLD}"),
        (
            {MODE: "colocate_async", "algorithm.adv_estimator": "grpo"},
            "colocate_async, groups over 8 versions old are dropped",
        ),
    ],
    ids=["sync", "colocate_async", "separate_async", "no limit", "grpo"],
)
def test_the_plan_names_the_mode_and_how_old_rollouts_may_be(make, values, line):
    assert ("trainer", line) in preflight(make(**values))


BROKEN = [
    ("L77", {"trainer.v1.sampler.max_off_policy_strategy": "dropp"}, "trainer.v1.sampler.max_off_policy_strategy"),
    ("L77", {SYNC_STEP: 0}, SYNC_STEP),
    ("L77", {"data.train_batch_size": None}, SYNC_STEP),
    ("L77", {SYNC_STEP: 4}, SYNC_STEP),
    ("L77", {f"{ROLLOUT}.nnodes": 0}, f"{ROLLOUT}.nnodes"),
    ("L77", {f"{ROLLOUT}.n_gpus_per_node": 0}, f"{ROLLOUT}.n_gpus_per_node"),
    ("L77", {f"{ROLLOUT}.checkpoint_engine.backend": "naive"}, f"{ROLLOUT}.checkpoint_engine.backend"),
    ("L77", {"reward.reward_model.enable": True}, "reward.reward_model.enable_resource_pool"),
    ("L78", {"actor_rollout_ref.model.lora_rank": 8}, "actor_rollout_ref.model.lora.merge"),
    ("L78", {"actor_rollout_ref.hybrid_engine": False}, "actor_rollout_ref.hybrid_engine"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("code", "change", "key"), BROKEN, ids=[str(c) for _, c, _ in BROKEN])
def test_what_separate_async_needs_is_asked_for_before_the_run(make, monkeypatch, estimator, code, change, key):
    monkeypatch.delenv("VERL_LOGGING_LEVEL", raising=False)
    config = make(**SEPARATE | change, **{"algorithm.adv_estimator": estimator})
    with pytest.raises(Exception, match=rf"SAYO-{code}") as caught:
        check_mode(config, check_estimator(config), here=True)
    assert caught.value.where == key


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({f"{ROLLOUT}.checkpoint_engine.backend": "nccl"}, "No module named 'cupy'"),
        ({f"{ROLLOUT}.checkpoint_engine.backend": "ncll"}, "ncll not registered"),
        ({f"{ROLLOUT}.checkpoint_engine.custom_backend_module": "my_transfer"}, "my_transfer"),
    ],
    ids=["its package is missing", "unknown", "its module is missing"],
)
def test_a_backend_that_this_machine_cannot_load_is_refused_here(make, change, reason):
    config = make(**SEPARATE | change)
    check_mode(config, None, here=False)
    assert reason in refused(config, "L77").got
    preflight(config, dry_run=True)


@pytest.mark.parametrize("change", [change for code, change, _ in BROKEN if code == "L77"], ids=str)
def test_verl_asserts_the_same(make, change):
    """It does when it builds its trainer, after Ray has started."""
    with pytest.raises((AssertionError, TypeError)):
        PPOTrainerSeparateAsync(make(**SEPARATE | change))


def test_an_adapter_is_sent_if_it_is_merged(make):
    check_mode(make(**SEPARATE | LORA), None, here=False)


def test_verls_log_message_fails_at_its_default_level_only(make, monkeypatch):
    from verl.trainer.ppo.v1 import trainer_separate_async

    with pytest.raises(TypeError, match="flush"):
        trainer_separate_async.logger.critical("as _setup does", flush=True)
    monkeypatch.setenv("VERL_LOGGING_LEVEL", "WARNING")
    check_mode(make(**SEPARATE | {"actor_rollout_ref.hybrid_engine": False}), None, here=False)


def test_devices_of_rollouts_count_in_this_mode_only(make):
    separate = make(**SEPARATE | {f"{ROLLOUT}.nnodes": 2, f"{ROLLOUT}.n_gpus_per_node": 4})
    assert (rollout_devices(separate), prompts_per_update(separate)) == (8, 8)
    separate.trainer.v1.trainer_mode = "colocate_async"
    assert (rollout_devices(separate), prompts_per_update(separate)) == (0, 16)


def test_ray_needs_cpus_for_the_devices_of_rollouts(make):
    error = refused(make(**SEPARATE | {"ray_kwargs.ray_init.num_cpus": 7}), "L14")
    assert error.wanted == ">= 8 (1 storage units + 3 x 1 devices + 2 + 2 for devices of rollouts only)"
    assert ("machines", "1 x 1 cpu and 1 x 1 for rollouts only, 2 devices in all; Ray needs 8 CPUs") in preflight(
        make(**SEPARATE)
    )


def test_the_mode_by_its_name_alone_is_answered_with_the_file_of_the_mode(make):
    fix = "replace trainer.v1.trainer_mode=separate_async by +mode=separate_async, which sets all of it"
    assert refused(make(**{MODE: "separate_async"}), "L77").fix == fix
    assert refused(make(**SEPARATE | {SYNC_STEP: 4}), "L77").fix == (
        f"set {SYNC_STEP}=2 and data.train_batch_size=2 x the mini-batch"
    )


def test_the_plan_gives_the_total_of_gpus(make):
    config = make(**SEPARATE | {"trainer.device": "cuda", "trainer.n_gpus_per_node": 8})
    config.actor_rollout_ref.rollout.n_gpus_per_node = 8
    assert describe_machines(config) == "1 x 8 cuda and 1 x 8 for rollouts only, 16 GPUs in all"


@pytest.mark.parametrize("mode", ["separate_async", "separate_async_cpu"])
@pytest.mark.parametrize("job", ["tiny", "sayo_qwen3vl_8b", "qwen2_5vl_7b"])
def test_the_file_of_the_mode_fits_every_job(repo, job, mode):
    config = composed(repo, f"+job={job}", "+method=region", f"+mode={mode}")
    check_mode(config, None, here=False)
    assert rollout_devices(config) == config.trainer.n_gpus_per_node
    assert prompts_per_update(config) == config.actor_rollout_ref.actor.ppo_mini_batch_size
