"""From credit to advantages: weights, the floor on the spread, mixes of methods, the metrics every method gets.

Shape suffixes: B rows, T response tokens.
"""

import dataclasses
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from sayo_verl.errors import SayoError
from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.methods import Credit, Mix, Needs, RegionMethod, RewardTerm, Signals, advantages
from sayo_verl.methods.base import CreditKind, blend, masked_mean
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.methods.signals import join_needs
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.vision.intervention import Intervention

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def refused_at(code: str, place: str):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .* \| at .*{place}.* \| fix: .+\Z")


def grpo(rewards: list[float], uid: str) -> torch.Tensor:
    """verl's advantages [B]."""
    column = torch.tensor(rewards)[:, None]
    return compute_grpo_outcome_advantage(column, torch.ones_like(column), np.array(list(uid), dtype=object))[0][:, 0]


def ours(rewards: list[float], uid: str, credit: Credit | None = None, **options) -> torch.Tensor:
    return advantages(torch.tensor(rewards), torch.ones(len(rewards), 1), list(uid), credit, **options)[0][:, 0]


# ---------------------------------------------------------------------------------------- the floor on a group's spread


def test_the_one_place_where_it_differs_from_verls_grpo():
    same, tell_apart = [0.95] * 8, [0.95] * 7 + [0.9]
    assert grpo(same, "a" * 8).abs().max() > 0.05  # float32: the mean of eight 0.95 is not 0.95
    assert (ours(same, "a" * 8) == 0).all()
    assert torch.equal(ours(same, "a" * 8, spread_floor=None), grpo(same, "a" * 8))
    assert torch.equal(ours(tell_apart, "a" * 8), grpo(tell_apart, "a" * 8))
    large = [10000.1] * 6
    assert grpo(large, "a" * 6).abs().max() > 0.5
    assert (ours(large, "a" * 6) == 0).all()


def test_the_floor_is_relative_to_large_rewards_and_absolute_for_small_ones():
    assert (ours([1000.0, 1000.0005], "aa") == 0).all()
    assert (ours([1000.0, 1000.01], "aa") != 0).all()
    assert (ours([0.0, 5e-7], "aa") == 0).all()
    assert (ours([0.0, 1.5e-6], "aa") != 0).all()
    assert (ours([0.0, 5e-6], "aa") != 0).all()
    assert (ours([0.0, 5e-6], "aa", spread_floor=1e-3) == 0).all()


@PROPERTY
@given(reward=st.floats(-1e6, 1e6, width=32), n=st.integers(2, 16), others=st.lists(st.floats(-2, 2), max_size=4))
def test_identical_rewards_get_exactly_zero(reward, n, others):
    rewards = [reward] * n + others
    assert (ours(rewards, "a" * n + "b" * len(others))[:n] == 0).all()


def test_a_group_of_one_keeps_verls_rule():
    assert torch.equal(ours([0.5, 1.0, 0.0], "abb"), grpo([0.5, 1.0, 0.0], "abb"))
    assert ours([0.5, 1.0, 0.0], "abb")[0] == pytest.approx(0.5, abs=1e-5)


# ------------------------------------------------------------------------------------- groups that carry a term in part


def term(values: list[float], valid: list[bool]) -> Credit:
    return Credit((RewardTerm("t", torch.tensor(values), torch.tensor(valid), 1.0),))


def test_one_row_with_a_term_has_nothing_to_compare_it_with():
    credit = term([0.7, NAN, NAN], [True, False, False])
    assert torch.equal(ours([1.0, 0.0, 0.5], "aaa", credit), grpo([1.0, 0.0, 0.5], "aaa"))


def test_carrying_rows_that_are_all_alike_do_not_blow_up_the_others():
    credit = term([0.5, 0.5, NAN], [True, True, False])
    out = ours([1.0, 1.0, 0.0], "aaa", credit)
    assert out.abs().max() < 2
    assert out[2] < 0 < out[0]


# -------------------------------------------------------------------------------------------------------------- weights


def test_weights_multiply_the_advantage_within_the_mask():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    token = torch.tensor([[0.5, 2.0, NAN], [1.5, NAN, NAN]])
    trajectory = torch.tensor([2.0, 0.5])
    plain, _ = advantages(torch.tensor([1.0, 0.0]), mask, ["a", "a"])
    out, reward = advantages(torch.tensor([1.0, 0.0]), mask, ["a", "a"], Credit((), token, trajectory))
    expected = plain * torch.tensor([[1.0, 4.0, 0.0], [0.75, 0.0, 0.0]])
    assert torch.allclose(out, expected, atol=1e-7)
    assert reward.tolist() == [1.0, 0.0]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_weights_of_one_change_no_bit():
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    rewards = torch.tensor([1.0, 0.25, 0.5])
    plain, _ = advantages(rewards, mask, list("aab"))
    weighted, _ = advantages(rewards, mask, list("aab"), Credit((), torch.ones(3, 2), torch.ones(3)))
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("bad", [NAN, float("inf"), -0.1])
@pytest.mark.parametrize("kind", ["token", "trajectory"])
def test_a_weight_that_would_poison_or_turn_a_sign_is_refused(kind, bad):
    token, trajectory = torch.ones(2, 2), torch.ones(2)
    (token if kind == "token" else trajectory)[1] = bad
    with refusal("A11", kind) as caught:
        advantages(torch.zeros(2), torch.ones(2, 2), ["a", "a"], Credit((), token, trajectory))
    assert caught.value.where == "row 1 of the batch"


@pytest.mark.parametrize("credit", [Credit((), torch.ones(2)), Credit((), None, torch.ones(2, 2))])
def test_a_weight_of_the_wrong_shape_is_refused(credit):
    with refusal("A02", "weight"):
        advantages(torch.zeros(2), torch.ones(2, 2), ["a", "a"], credit)


def test_blend_and_masked_mean():
    weight = torch.tensor([0.5, 2.0])
    assert blend(weight, 0.5).tolist() == [0.75, 1.5]
    assert torch.equal(blend(weight, 1.0), weight)
    per_token = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, NAN]])
    selected = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(per_token, selected).tolist() == [2.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------- mixes


@dataclass(frozen=True)
class Fixed:
    """A method that gives what it is told."""

    name: str
    gives: frozenset[CreditKind]
    intervention: Intervention | None = None
    coverage: float = 0.5
    metric: str = ""
    boxes: bool = False

    def needs(self) -> Needs:
        statistics = StatisticsRequest((Statistic("image_mass"),), coverage=self.coverage)
        interventions = () if self.intervention is None else (self.intervention,)
        return Needs(statistics, interventions, boxes=self.boxes, packages=(("torch", "pip install torch"),))

    def credit(self, signals: Signals) -> Credit:
        B, T = signals.response_mask.shape
        return Credit(
            (RewardTerm(self.name, torch.arange(float(B)), torch.ones(B, dtype=torch.bool), 1.0),)
            if "reward" in self.gives
            else (),
            torch.full((B, T), 2.0) if "token" in self.gives else None,
            torch.full((B,), 3.0) if "trajectory" in self.gives else None,
            {self.metric or self.name: 1.0},
        )


def signals() -> Signals:
    B, T = 4, 3
    return Signals(
        response_mask=torch.ones(B, T, dtype=torch.long),
        entropy=torch.rand(B, T, generator=torch.Generator().manual_seed(0)),
        log_probs=torch.full((B, T), -1.0),
        statistics={
            Statistic("image_mass"): torch.full((B, T), 0.4),
            Statistic("region_mass"): torch.full((B, T), 0.1),
        },
        image_tokens=torch.full((B,), 10),
        region_tokens=torch.tensor([1, 2, 0, 4]),
        is_padding=torch.tensor([False, False, False, True]),
        uid=("a", "b", "a", "b"),
    )


REWARD, WEIGHTS = frozenset({"reward"}), frozenset({"token", "trajectory"})


def test_a_mix_adds_rewards_and_carries_weights():
    mix = Mix((Fixed("attn_one", REWARD), Fixed("attn_two", REWARD), Fixed("attn_three", WEIGHTS)))
    assert mix.gives == {"reward", "token", "trajectory"}
    credit = mix.credit(signals())
    assert [term.name for term in credit.terms] == ["attn_one", "attn_two"]
    assert credit.token_weight is not None
    assert credit.trajectory_weight is not None
    assert set(credit.metrics) == {"attn_one", "attn_two", "attn_three"}
    both, _ = advantages(torch.zeros(4), torch.ones(4, 3), ["a"] * 4, credit)
    alone, _ = advantages(torch.arange(4.0) * 2, torch.ones(4, 3), ["a"] * 4)
    assert torch.allclose(both, alone * 6, atol=1e-5)


def test_a_mix_is_that_of_its_parts_in_any_order():
    one, two = RegionMethod(), Fixed("attn_two", WEIGHTS)
    a, b = Mix((one, two)).credit(signals()), Mix((two, one)).credit(signals())
    left, _ = advantages(torch.arange(4.0), torch.ones(4, 3), list(signals().uid), a)
    right, _ = advantages(torch.arange(4.0), torch.ones(4, 3), list(signals().uid), b)
    assert torch.equal(left, right)


@pytest.mark.parametrize("gift", ["token", "trajectory"])
def test_two_weightings_of_one_kind_are_refused(gift):
    with refusal("A12", f"weight each {gift}"):
        Mix((Fixed("attn_one", frozenset({gift})), Fixed("attn_two", frozenset({gift, "reward"}))))


def test_an_empty_mix_and_a_doubled_method_are_refused():
    with refusal("A12"):
        Mix(())
    with refusal("A12"):
        Mix((RegionMethod(), RegionMethod(weight=2.0)))


def test_parts_with_different_changed_images_get_a_pass_each_and_share_equal_ones():
    grey, blur = Intervention(kind="grey"), Intervention(kind="blur")
    same = Intervention(kind="grey", share=0.3)  # grey does not use the share
    mix = Mix((Fixed("attn_one", REWARD, grey), Fixed("attn_two", REWARD, blur), Fixed("attn_three", REWARD, same)))
    assert mix.needs().interventions == (grey, blur)
    assert Needs(StatisticsRequest(()), (blur, grey, same)).interventions == (blur, grey)


def test_names_of_an_earlier_version_say_the_new_one():
    grey = Intervention(kind="grey")
    with refused_at("A19", "interventions"):
        Needs(StatisticsRequest(()), intervention=grey)
    with refused_at("A19", "interventions"):
        Needs(StatisticsRequest(()), grey)
    with refused_at("A19", "interventions"):
        Needs(StatisticsRequest(()), None)
    with refused_at("A19", "interventions"):
        _ = Needs(StatisticsRequest(())).intervention
    with refused_at("A19", "counterfactual"):
        signals().required("counterfactual_log_probs")
    with refused_at("A19", "counterfactual"):
        _ = signals().counterfactual_log_probs


def test_a_changed_image_that_was_not_measured_is_refused():
    grey, blur = Intervention(kind="grey"), Intervention(kind="blur")
    measured = dataclasses.replace(signals(), counterfactuals={grey: torch.full((4, 3), -2.0)})
    assert torch.equal(measured.counterfactual(Intervention(kind="grey", seed=3)), torch.full((4, 3), -2.0))
    with refused_at("A10", "blur"):
        measured.counterfactual(blur)
    measured.check()
    with refusal("A03", "grey"):
        dataclasses.replace(measured, counterfactuals={grey: torch.full((4, 3), 2.0)}).check()
    with refusal("A02", "grey"):
        dataclasses.replace(measured, counterfactuals={grey: torch.full((4, 2), -2.0)}).check()


def test_parts_that_need_different_passes_are_refused():
    with refusal("P15"):
        Mix((Fixed("attn_one", REWARD, coverage=0.5, boxes=True), RegionMethod(coverage=1.0)))
    assert Mix((Fixed("attn_one", REWARD), RegionMethod(coverage=1.0))).needs().statistics.coverage == 1.0


def test_metrics_of_one_name_are_refused():
    with refusal("A12", "same name"):
        Mix((Fixed("attn_one", REWARD, metric="m"), Fixed("attn_two", REWARD, metric="m"))).credit(signals())


def test_needs_are_joined_without_repeating():
    needs = join_needs([RegionMethod().needs(), Fixed("attn_one", REWARD).needs(), Fixed("attn_two", REWARD).needs()])
    assert needs.statistics.statistics == (Statistic("image_mass"), Statistic("region_mass"))
    assert needs.boxes
    assert needs.packages == (("torch", "pip install torch"),)


# ----------------------------------------------------------------------------- what the estimator logs for every method


def estimate(method, **changes) -> AdvantageContext:
    opened = AdvantageContext(method, signals(), True, None)
    token = CURRENT.set(opened)
    try:
        make_estimator(method.name)(torch.rand(4, 3), torch.ones(4, 3), index=list(signals().uid), **changes)
    finally:
        CURRENT.reset(token)
    return opened


def test_neutral_rows_and_mean_weights_are_counted_for_any_method():
    opened = estimate(Fixed("attn_weights", WEIGHTS))
    assert opened.metrics["token_weight/mean"] == 2.0
    assert opened.metrics["trajectory_weight/mean"] == 3.0
    assert opened.metrics["neutral_rows/padding"] == 1
    assert "neutral_rows/no_box" not in opened.metrics  # this method needs no boxes
    assert estimate(RegionMethod()).metrics["neutral_rows/no_box"] == 1
    assert "token_weight/mean" not in estimate(RegionMethod()).metrics


def test_tokens_masked_since_the_credit_was_begun_make_it_anew():
    """Rejection sampling of verl takes tokens out of the mask after the signals were fetched."""
    method, begun = Fixed("attn_weights", WEIGHTS), Future()
    begun.set_result((Credit(token_weight=torch.full((4, 3), 7.0)), 0.5))
    opened = AdvantageContext(method, signals(), True, None, begun)
    assert opened.credit(signals().response_mask)[1].token_weight[0, 0] == 7.0
    assert opened.metrics["credit_seconds"] == 0.5
    mask = signals().response_mask.clone()
    mask[0, 0] = 1 - mask[0, 0]
    made, credit = opened.credit(mask)
    assert torch.equal(made.response_mask, mask)
    assert credit.token_weight[0, 0] == 2.0


def test_a_metric_that_is_not_finite_is_refused():
    @dataclass(frozen=True)
    class Odd(Fixed):
        def credit(self, signals: Signals) -> Credit:
            return Credit(metrics={"odd": NAN})

    with refusal("A03", "odd"):
        estimate(Odd("attn_odd", frozenset()))


def test_rows_in_another_order_are_refused():
    opened = AdvantageContext(RegionMethod(), signals(), True, None)
    token = CURRENT.set(opened)
    try:
        with refusal("A02", "order"):
            make_estimator("attn_region")(torch.rand(4, 3), torch.ones(4, 3), index=["a", "a", "b", "b"])
    finally:
        CURRENT.reset(token)


def test_a_renamed_method_of_the_signals_says_its_new_name():
    signals = random_signals(RegionMethod().needs(), 3, 4, 5)
    with pytest.raises(SayoError, match=r"^SAYO-A19: .*wanted signals\.eligible_rows"):
        signals.carrying()
    with pytest.raises(SayoError, match=r"^SAYO-A19: .*wanted signals\.required"):
        signals.the("correct")
    with pytest.raises(AttributeError, match="no attribute 'corect'"):
        _ = signals.corect
