"""Every value of verl's loss settings and estimators: right with a method's weights, refused, or verl's own.

Shape suffixes: B responses, T tokens.
"""

import copy
from importlib.metadata import version

import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY, agg_loss
from verl.workers.config import ActorConfig, PolicyLossConfig

from sayo_verl.errors import SayoError
from sayo_verl.launch import training_check
from sayo_verl.launch.preflight import check_estimator
from sayo_verl.launch.training_check import LOSS_AGG_MODE, LOSS_AGG_MODES, LOSS_MODE, check_training
from sayo_verl.methods import METHODS, AnchorMethod, DualMethod, Mix, RegionMethod

RIGHT, REFUSED, OWN = "right", "refused", "verl's own"
# With a method that gives token weights.
LOSS_MODES = {
    "vanilla": RIGHT,
    "dppo_tv": RIGHT,
    "dppo_kl": RIGHT,
    "gspo": RIGHT,
    "sapo": RIGHT,
    "gpg": RIGHT,
    "clip_cov": RIGHT,
    "kl_cov": RIGHT,
    "dro": RIGHT,
    "cispo": RIGHT,
    "geo_mean": REFUSED,
    "bypass_mode": REFUSED,
}
AGG_MODES = dict.fromkeys(
    ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"), RIGHT
)
# verl's estimators run verl's code, whatever they need; our launcher takes nothing from them.
ESTIMATORS = dict.fromkeys(
    (
        "gae",
        "grpo",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "remax",
        "rloo",
        "opo",
        "grpo_passk",
        "gpg",
        "rloo_vectorized",
        "grpo_vectorized",
        "optimal_token_baseline",
        "tir_optimal_token_baseline",
        "gdpo",
    ),
    OWN,
)


def test_the_tables_hold_every_value_that_verl_has():
    assert set(LOSS_MODES) == set(POLICY_LOSS_REGISTRY)
    assert set(AGG_MODES) == set(LOSS_AGG_MODES)
    ours = {*METHODS, Mix.name}
    assert set(ESTIMATORS) == {str(getattr(name, "value", name)) for name in ADV_ESTIMATOR_REGISTRY} - ours
    for mode in LOSS_AGG_MODES:
        assert agg_loss(torch.ones(1, 2), torch.ones(1, 2), mode).item() > 0
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        ActorConfig(strategy="fsdp2", loss_agg_mode="token-average", use_dynamic_bsz=True, rollout_n=2)


def gradient(loss_mode, advantage, agg_mode="token-mean"):
    """[B, T] gradient of verl's loss at the policy that sampled."""
    torch.manual_seed(0)
    old = -torch.rand(advantage.shape) - 0.2
    new = old.clone().requires_grad_(True)
    config = ActorConfig(strategy="fsdp2", use_dynamic_bsz=True, rollout_n=2, policy_loss=PolicyLossConfig(dro_beta=1))
    mask = torch.ones_like(advantage)
    loss, _ = POLICY_LOSS_REGISTRY[loss_mode](
        old_log_prob=old, log_prob=new, advantages=advantage, response_mask=mask, loss_agg_mode=agg_mode, config=config
    )
    loss.backward()
    return new.grad


def token_weights(loss_mode, agg_mode="token-mean"):
    """([B, T] weights that were put on the advantages, [B, T] factor by which they changed the gradient)."""
    advantage = torch.tensor([1.0, -1.0])[:, None].expand(2, 6)
    weight = torch.tensor([[0.5, 1.5, 0.5, 1.5, 0.0, 2.0]]).expand(2, 6)  # mean one, as of attn_anchor
    return weight, gradient(loss_mode, advantage * weight, agg_mode) / gradient(loss_mode, advantage, agg_mode)


@pytest.mark.parametrize("mode", [mode for mode, verdict in LOSS_MODES.items() if verdict == RIGHT])
def test_a_right_loss_multiplies_each_tokens_gradient_by_its_weight(mode):
    weight, factor = token_weights(mode)
    # clip_cov takes a few tokens at random out of the update
    same = torch.isclose(factor, weight, atol=1e-5)
    assert same.float().mean() >= (0.8 if mode == "clip_cov" else 1.0), factor


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_every_aggregation_keeps_the_weights_of_a_response(mode):
    weight, factor = token_weights("vanilla", mode)
    assert torch.allclose(factor, weight, atol=1e-5)


def test_the_geometric_mean_cancels_weights_of_mean_one():
    """Why it is refused: of the weights 0.5, 1.5 and 2 nothing is left. Only a weight of 0 takes its token out."""
    weight, factor = token_weights("geo_mean")
    assert torch.allclose(factor, (weight > 0).float(), atol=1e-5)


def checked(base, method, **changes):
    config = copy.deepcopy(base)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    check_training(config, method)
    return config


def code_of(base, method, **changes):
    with pytest.raises(SayoError) as caught:
        checked(base, method, **changes)
    return caught.value


@pytest.mark.parametrize(("mode", "verdict"), LOSS_MODES.items())
def test_each_loss_is_taken_or_refused_with_token_weights(base, mode, verdict):
    changes = {LOSS_MODE: mode, "actor_rollout_ref.actor.policy_loss.dro_beta": 0.1}
    for method in (AnchorMethod(), DualMethod(), RegionMethod(per_token=True)):
        if verdict == RIGHT:
            checked(base, method, **changes)
        else:
            error = code_of(base, method, **changes)
            assert error.code == "L39"
            assert error.got == mode
            assert mode not in str(error.wanted).split(", ")


def test_the_geometric_mean_takes_rewards_and_trajectory_weights_and_verls_own(base):
    for method in (RegionMethod(), DualMethod(intra=False), AnchorMethod(strength=0.0), None):
        checked(base, method, **{LOSS_MODE: "geo_mean"})


def test_bypass_mode_is_refused_for_any_method_of_ours(base):
    assert code_of(base, RegionMethod(), **{LOSS_MODE: "bypass_mode"}).code == "L39"
    checked(base, None, **{LOSS_MODE: "bypass_mode"})


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        (LOSS_MODE, "vanila", "vanilla"),
        (LOSS_MODE, "geo-mean", "geo_mean"),
        (LOSS_AGG_MODE, "token_mean", "token-mean"),
    ],
)
def test_a_misspelt_loss_is_refused_with_the_nearest_name(base, key, value, near):
    for method in (RegionMethod(), None):
        error = code_of(base, method, **{key: value})
        assert (error.code, error.where) == ("L37", key)
        assert f"did you mean '{near}'?" in error.what


@pytest.mark.parametrize("beta", [None, 0.0, -1.0])
def test_dro_without_its_beta_is_refused(base, beta):
    changes = {LOSS_MODE: "dro", "actor_rollout_ref.actor.policy_loss.dro_beta": beta}
    assert code_of(base, None, **changes).code == "L38"


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verls_estimators_are_left_to_verl(base, estimator):
    from verl.trainer.ppo.utils import need_critic

    config = checked(base, None, **{"algorithm.adv_estimator": estimator})
    assert check_estimator(config) is None
    # as in stock verl: with a critic where the estimator has one
    assert need_critic(config) == (estimator == "gae")


def test_gae_without_a_critic_is_refused(base):
    assert code_of(base, None, **{"algorithm.adv_estimator": "gae", "critic.enable": False}).code == "L49"


@pytest.mark.parametrize("method", [RegionMethod(), None], ids=["ours", "verl's"])
def test_the_old_trainer_is_refused_for_every_estimator(base, method):
    assert code_of(base, method, **{"trainer.use_v1": False}).code == "L04"


def test_verl_reads_these_settings_late_still_needed():
    """verl looks the loss up when it first trains; a name that it does not know would cost a rollout."""
    import inspect

    from verl.workers.utils import losses

    assert "get_policy_loss_fn(loss_mode)" in inspect.getsource(losses.ppo_loss)


CUSTOM = {"trainer.v1.sampler.custom_sampler.path": "pkg://mine", "trainer.v1.sampler.custom_sampler.name": "Buffer"}


@pytest.mark.parametrize("key", ["algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups"])
def test_dynamic_sampling_beside_a_custom_sampler_is_refused(base, key):
    error = code_of(base, None, **CUSTOM, **{key: True, "algorithm.filter_groups.metric": "acc"})
    assert (error.code, error.where) == ("L52", key)
    checked(base, None, **CUSTOM)
    checked(base, None, **{key: True, "algorithm.filter_groups.metric": "acc"})


@pytest.mark.parametrize("metric", [None, "accuracy", "seq_reward"])
def test_dynamic_sampling_by_a_metric_that_our_reward_does_not_report_is_refused(base, metric):
    ours = {"reward.custom_reward_function.path": "pkg://sayo_verl.reward", "algorithm.filter_groups.enable": True}
    assert code_of(base, None, **ours, **{"algorithm.filter_groups.metric": metric}).code == "L52"
    for right in ("acc", "score", *(["reward"] if version("verl") != "0.9.0" else [])):
        checked(base, None, **ours, **{"algorithm.filter_groups.metric": right})


def test_verl_0_9_0_does_not_know_the_reward_itself_as_a_metric(base, monkeypatch):
    monkeypatch.setattr(training_check, "version", lambda name: "0.9.0")
    ours = {"reward.custom_reward_function.path": "pkg://sayo_verl.reward", "algorithm.filter_groups.enable": True}
    assert code_of(base, None, **ours, **{"algorithm.filter_groups.metric": "reward"}).code == "L52"
    checked(base, None, **ours, **{"algorithm.filter_groups.metric": "acc"})


def test_what_verl_itself_refuses_is_one_line(base):
    from sayo_verl.launch.training_check import check_by_verl

    changes = {
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": None,
    }
    with pytest.raises(SayoError, match=r"^SAYO-L50: verl refuses the configuration: .*ppo_micro_batch_size"):
        check_by_verl(checked(base, None, **changes))
