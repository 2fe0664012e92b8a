"""Our reading of Faithful-MR1's reinforcing stage: cases by hand, an oracle in float64, identities, neutral rows, GRPO.

Shape suffixes: B rows, T response tokens.
"""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from sayo_verl.errors import SayoError
from sayo_verl.launch.settings import settings_from_config
from sayo_verl.methods import METHODS, Signals, advantages
from sayo_verl.methods.faithful import EPS, EPS_EFFECT, FaithfulMethod, causal_effect, causal_weights, faithful_ratio
from sayo_verl.probe.statistics import Statistic
from sayo_verl.vision.intervention import Intervention

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
IMAGE_MASS = Statistic("image_mass", query_row="predicting")
REGION_MASS = Statistic("region_mass", query_row="predicting")
BY_REGION = {"causal_unit": "region", "counterfactual": Intervention(kind="region")}


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def signals_of(log_probs, changed, mass, correct, *, mask=None, **settings) -> Signals:
    """Rows of one group that all carry the term, unless settings say otherwise."""
    log_probs, changed, mass = (torch.as_tensor(x, dtype=torch.float32) for x in (log_probs, changed, mass))
    B = len(log_probs)
    return Signals(
        **{
            "response_mask": torch.ones_like(log_probs, dtype=torch.int64) if mask is None else torch.as_tensor(mask),
            "entropy": torch.zeros_like(log_probs),
            "log_probs": log_probs,
            "statistics": {IMAGE_MASS: mass, REGION_MASS: mass / 2},
            "image_tokens": torch.full((B,), 10),
            "region_tokens": torch.full((B,), 2),
            "is_padding": torch.zeros(B, dtype=torch.bool),
            "uid": ("a",) * B,
            "counterfactual_log_probs": changed,
            "correct": torch.as_tensor(correct, dtype=torch.float32),
            **settings,
        }
    )


def value_of(method: FaithfulMethod, signals: Signals) -> torch.Tensor:
    (term,) = method.credit(signals).terms
    return term.value


def one_row(log_probs, changed, mass, **settings) -> float:
    return value_of(FaithfulMethod(**settings), signals_of([log_probs], [changed], [mass], [1.0])).item()


# -------------------------------------------------------------------------------------------------------------- by hand

LN2 = math.log(2)


@pytest.mark.parametrize(
    ("log_prob", "changed", "effect"),
    [
        (-1.0, -1.0, 0.0),
        (-LN2, -2 * LN2, 0.5 - 1 + LN2),  # half as likely without the image: 1/2 - 1 + log 2 = 0.193
        (-2 * LN2, -LN2, 2 - 1 - LN2),  # twice as likely: 2 - 1 - log 2 = 0.307
        (0.0, -5.0, math.exp(-5) + 4),
        (0.0, -20.0, 10.0),
        (-20.0, 0.0, 10.0),
        (-1.0, -1.001, 0.001**2 / 2 - 0.001**3 / 6),  # where 1 cancels
        (0.0, -1e30, 10.0),
        (-1e30, 0.0, 10.0),
        (-1e30, -1e30, 0.0),
    ],
)
def test_the_effect_of_a_token_by_hand(log_prob, changed, effect):
    one = torch.ones(1, 1, dtype=torch.bool)
    k = causal_effect(torch.tensor([[log_prob]]), torch.tensor([[changed]]), one, 10.0)
    assert k.item() == pytest.approx(effect, abs=2e-9 if effect < 1e-3 else 1e-6)


def test_a_reward_by_hand():
    """The image matters at token 0 alone: F compares its attention with the mean of all."""
    assert one_row([0.0, -1.0], [-50.0, -1.0], [0.6, 0.0]) == pytest.approx(0.6, abs=1e-5)  # x = 0.6 / 0.3 = 2
    assert one_row([0.0, -1.0, -1.0], [-50.0, -1.0, -1.0], [0.9, 0.0, 0.0]) == pytest.approx(0.8, abs=1e-5)  # x = 3
    assert one_row([0.0, -1.0], [-50.0, -1.0], [0.1, 0.3]) == pytest.approx(-0.6, abs=1e-5)  # x = 0.1 / 0.2
    # effects 2 - 1 - log 2 and 10: weights 0.0298 and 0.9702
    k = 1 - LN2
    x = (k * 0.2 + 10 * 0.4) / (k + 10) / 0.3
    assert one_row([-LN2, 0.0], [0.0, -99.0], [0.2, 0.4]) == pytest.approx((x * x - 1) / (x * x + 1), abs=1e-6)


def test_k_max_bounds_what_one_token_can_weigh():
    args = ([0.0, 0.0], [-99.0, -2.0], [0.4, 0.2])
    k = math.exp(-2) - 1 + 2
    for k_max in (0.5, 5.0, 50.0):
        a, b = min(98.0, k_max), min(k, k_max)
        x = (a * 0.4 + b * 0.2) / (a + b) / 0.3
        assert one_row(*args, k_max=k_max) == pytest.approx((x * x - 1) / (x * x + 1), abs=1e-5)
    assert one_row(*args, k_max=0.5) == pytest.approx(0.0, abs=1e-6)  # both at the bound: equal effects


def test_wrong_answers_get_exactly_nothing_and_still_count():
    method = FaithfulMethod()
    signals = signals_of([[0.0, -1.0]] * 3, [[-50.0, -1.0]] * 3, [[0.6, 0.0]] * 3, [1.0, 0.0, 0.5])
    (term,) = method.credit(signals).terms
    assert term.value.tolist() == pytest.approx([0.6, 0.0, 0.3], abs=1e-5)
    assert term.value[1] == 0
    assert term.valid.tolist() == [True, True, True]
    ungated = FaithfulMethod(gate=False)
    assert value_of(ungated, replace(signals, correct=None)).tolist() == pytest.approx([0.6] * 3, abs=1e-5)
    with refusal("A10", "was not measured"):
        method.credit(replace(signals, correct=None))


def test_mass_is_the_plain_mean():
    signals = signals_of([[0.0, -1.0]] * 2, [[-50.0, -1.0]] * 2, [[0.6, 0.0], [0.1, 0.3]], [1.0, 1.0])
    assert value_of(FaithfulMethod(form="mass"), signals).tolist() == pytest.approx([0.3, 0.2])
    assert value_of(FaithfulMethod(form="mass", **BY_REGION), signals).tolist() == pytest.approx([0.15, 0.1])


def test_with_regions_the_attention_is_that_on_the_boxes():
    signals = signals_of([[0.0, -1.0]], [[-50.0, -1.0]], [[0.6, 0.0]], [1.0])
    signals = replace(
        signals, statistics={IMAGE_MASS: torch.full((1, 2), NAN), REGION_MASS: torch.tensor([[0.1, 0.3]])}
    )
    assert value_of(FaithfulMethod(**BY_REGION), signals).item() == pytest.approx(-0.6, abs=1e-5)


# ----------------------------------------------------------------------------------------------- an oracle; every input


def oracle(log_probs, changed, mass, mask, k_max: float) -> float:
    """F of one row in float64, token by token."""
    k, m = [], []
    for t, real in enumerate(mask):
        if real:
            delta = float(log_probs[t]) - float(changed[t])
            k.append(k_max if delta < -700 else min(max(math.exp(-delta) - 1 + delta, 0.0), k_max))
            m.append(float(mass[t]))
    total = sum(x + EPS_EFFECT for x in k)
    causal = sum((x + EPS_EFFECT) / total * y for x, y in zip(k, m, strict=True))
    return math.tanh(math.log((causal + EPS) / (sum(m) / len(m) + EPS)))


log_prob = st.one_of(
    st.floats(-12.0, 0.0, width=32), st.floats(-(2.0**99), 0.0, width=32), st.sampled_from([0.0, -1e30, -88.0, -1e-7])
)
share = st.floats(0.0, 1.0, width=32)


@st.composite
def rows(draw: st.DrawFn, min_rows: int = 1, log_prob=log_prob):
    """(log-probs, changed, mass, mask, correct) of B rows with a token each; outside the mask NaN."""
    B, T = draw(st.integers(min_rows, 5)), draw(st.integers(1, 7))

    def table(element) -> torch.Tensor:
        row = st.lists(element, min_size=T, max_size=T)
        return torch.tensor(draw(st.lists(row, min_size=B, max_size=B)), dtype=torch.float32)

    log_probs, changed, mass, mask = table(log_prob), table(log_prob), table(share), table(st.booleans()).bool()
    mask[:, 0] |= ~mask.any(1)
    correct = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=B, max_size=B)))
    return *(x.masked_fill(~mask, NAN) for x in (log_probs, changed, mass)), mask, correct


@PROPERTY
@given(batch=rows(), k_max=st.sampled_from([0.01, 1.0, 10.0, 1e6]), gate=st.booleans())
def test_against_the_oracle(batch, k_max, gate):
    log_probs, changed, mass, mask, correct = batch
    signals = signals_of(log_probs, changed, mass, correct, mask=mask)
    signals.check()
    credit = FaithfulMethod(k_max=k_max, gate=gate).credit(signals)
    (value,) = (term.value for term in credit.terms)
    expected = [oracle(*row, k_max) for row in zip(log_probs, changed, mass, mask, strict=True)]
    if gate:
        expected = [c * e for c, e in zip(correct.tolist(), expected, strict=True)]
    assert value.tolist() == pytest.approx(expected, abs=2e-5)
    assert (value.abs() <= 1).all()
    assert all(math.isfinite(number) for number in credit.metrics.values())


def test_float32_against_float64():
    generator = torch.Generator().manual_seed(0)
    B, T = 256, 60
    log_probs = -torch.rand(B, T, generator=generator) * 4
    changed = (log_probs - torch.randn(B, T, generator=generator).pow(3) * 0.1).clamp(max=0)
    mass = torch.rand(B, T, generator=generator).pow(4)
    mask = torch.rand(B, T, generator=generator) < 0.8
    values = value_of(FaithfulMethod(), signals_of(log_probs, changed, mass, [1.0] * B, mask=mask))
    expected = [oracle(*row, 10.0) for row in zip(log_probs, changed, mass, mask, strict=True)]
    error = (values.double() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
    print(f"largest difference of float32 from float64: {error:.1e}")
    assert error < 1e-5


@pytest.mark.parametrize("junk", [NAN, float("inf"), float("-inf"), 1e30])
def test_values_outside_the_mask_never_matter(junk):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1]])
    inputs = [torch.tensor(x) for x in ([[-1.0, -2.0, 0.0, 0.0]] * 2, [[-3.0, -2.5, 0.0, 0.0]] * 2)]
    inputs.append(torch.tensor([[0.3, 0.2, 0.0, 0.0], [0.0, 0.1, 0.0, 0.4]]))
    clean = FaithfulMethod().credit(signals_of(*inputs, [1.0, 1.0], mask=mask))
    dirty = FaithfulMethod().credit(
        signals_of(*(x.masked_fill(mask == 0, junk) for x in inputs), [1.0, 1.0], mask=mask)
    )
    assert torch.equal(clean.terms[0].value, dirty.terms[0].value)
    assert clean.terms[0].value.abs().min() > 0.01
    assert dirty.metrics == clean.metrics


# ----------------------------------------------------------------------------------------------------------- identities

moderate = st.floats(-12.0, 0.0, width=32)


@PROPERTY
@given(batch=rows(), data=st.data())
def test_rows_and_tokens_may_come_in_any_order(batch, data):
    log_probs, changed, mass, mask, correct = batch
    straight = value_of(FaithfulMethod(), signals_of(log_probs, changed, mass, correct, mask=mask))
    row = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    token = torch.tensor(data.draw(st.permutations(range(mask.shape[1]))))
    shuffled = [x[row][:, token] for x in (log_probs, changed, mass)]
    turned = value_of(FaithfulMethod(), signals_of(*shuffled, correct[row], mask=mask[row][:, token]))
    assert torch.allclose(turned, straight[row], atol=1e-5)


@PROPERTY
@given(batch=rows(log_prob=moderate), factor=st.floats(0.01, 1.0))
def test_looking_more_everywhere_is_not_rewarded(batch, factor):
    log_probs, changed, mass, mask, _ = batch
    mass = 0.1 + 0.9 * mass  # eps is small beside it
    ones = torch.ones(len(mask))
    much = value_of(FaithfulMethod(), signals_of(log_probs, changed, mass, ones, mask=mask))
    little = value_of(FaithfulMethod(), signals_of(log_probs, changed, factor * mass, ones, mask=mask))
    assert torch.allclose(much, little, atol=1e-4)


@PROPERTY
@given(batch=rows(log_prob=moderate), shift=st.floats(-5.0, 0.0))
def test_only_the_difference_of_log_probs_counts(batch, shift):
    log_probs, changed, _, mask, _ = batch
    log_probs, changed, shift = log_probs.double(), changed.double(), float(shift)
    for k_max in (1.0, 10.0):
        straight = causal_effect(log_probs, changed, mask, k_max)
        assert torch.allclose(causal_effect(log_probs + shift, changed + shift, mask, k_max), straight, atol=1e-9)
        assert ((straight >= 0) & (straight <= k_max)).all()


@PROPERTY
@given(batch=rows(log_prob=moderate), shift=st.sampled_from([0.0, -0.5, -30.0, -1e30]))
def test_equal_effects_are_worth_nothing(batch, shift):
    log_probs, _, mass, mask, _ = batch
    mass = 0.1 + 0.9 * mass
    log_probs = torch.zeros_like(log_probs)
    value = value_of(FaithfulMethod(), signals_of(log_probs, log_probs + shift, mass, torch.ones(len(mask)), mask=mask))
    assert value.abs().max() < 1e-6


def test_effects_of_rounding_are_worth_nothing_and_the_way_there_has_no_jump():
    """Two tokens, one of which looks at the image; the effect on it goes to zero."""
    values = [one_row([-1.0, -1.0], [-1.0 - d, -1.0], [0.4, 0.1]) for d in (1.0, 1e-2, 3e-3, 1e-3, 3e-4, 1e-5, 0.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx((2.56 - 1) / (2.56 + 1), abs=1e-4)  # x = 0.4 / 0.25
    assert values[0] - values[1] < 0.02
    assert abs(values[-2]) < 1e-4
    assert values[-1] == pytest.approx(0.0, abs=1e-6)


@PROPERTY
@given(batch=rows(min_rows=1, log_prob=moderate), amount=st.floats(0.01, 0.1))
def test_f_grows_when_attention_moves_to_where_the_image_matters(batch, amount):
    log_probs, changed, mass, mask, _ = batch
    mass = 0.1 + 0.5 * mass
    effect = causal_effect(log_probs, changed, mask, 10.0)
    most, least = effect.masked_fill(~mask, -1).argmax(1), effect.masked_fill(~mask, 99).argmin(1)
    row = torch.arange(len(mask))
    moved = mass.clone()
    moved[row, least] -= amount * mass[row, least]
    moved[row, most] += amount * mass[row, least]
    ones = torch.ones(len(mask))
    before, after = (
        value_of(FaithfulMethod(), signals_of(log_probs, changed, m, ones, mask=mask)) for m in (mass, moved)
    )
    gap = effect[row, most] - effect[row, least]
    assert (after >= before - 1e-5).all()
    assert (after > before)[(gap > 0.05) & (before < 0.99)].all()


def test_weights_are_a_distribution_over_the_response():
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    weights = causal_weights(torch.tensor([[1.0, 3.0, NAN], [0.0, NAN, NAN], [NAN] * 3]), mask)
    assert weights.sum(1).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert weights[0].tolist() == pytest.approx([0.25, 0.75, 0.0], abs=1e-6)


def test_the_ratio_by_hand():
    causal, average = torch.tensor([0.2, 0.1, 0.0, 0.0, 0.5]), torch.tensor([0.1, 0.2, 0.0, 0.5, 0.5])
    assert faithful_ratio(causal, average).tolist() == pytest.approx([0.6, -0.6, 0.0, -1.0, 0.0], abs=1e-6)


# --------------------------------------------------------------------------------------------------------- neutral rows


def batch() -> Signals:
    """Six rows: 0 and 5 carry the term; 1 has no box, 2 no image, 3 is masked, 4 is a padding row with boxes."""
    mask = [[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]]
    return signals_of(
        [[0.0, -1.0, NAN], [0.0, -1.0, NAN], [-1.0, NAN, NAN], [NAN] * 3, [NAN] * 3, [-1.0, 0.0, -1.0]],
        [[-50.0, -1.0, NAN], [-50.0, -1.0, NAN], [NAN] * 3, [NAN] * 3, [NAN] * 3, [-1.0, -50.0, -1.0]],
        [[0.6, 0.0, NAN], [0.1, 0.3, NAN], [NAN] * 3, [NAN] * 3, [NAN] * 3, [0.3, 0.3, 0.3]],
        [1.0, 1.0, 1.0, 0.0, NAN, 0.0],
        mask=mask,
        image_tokens=torch.tensor([10, 10, 0, 4, 0, 4]),
        region_tokens=torch.tensor([2, 0, 0, 1, 3, 1]),
        is_padding=torch.tensor([False, False, False, False, True, False]),
        uid=("a", "a", "a", "b", "b", "a"),
    )


def test_neutral_rows_keep_their_task_reward():
    signals = batch()
    signals.check()
    credit = FaithfulMethod(weight=0.5).credit(signals)
    (term,) = credit.terms
    assert term.valid.tolist() == [True, True, False, False, False, True]
    assert credit.token_weight is None
    assert credit.trajectory_weight is None
    task = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.125, 0.0])
    _, reward = advantages(task, signals.response_mask, signals.uid, credit)
    assert reward.tolist() == pytest.approx([1.3, 0.7, 0.5, 0.25, 0.125, 0.0], abs=1e-5)
    assert reward[2:5].tolist() == task[2:5].tolist()


def test_a_change_of_regions_needs_a_box():
    method = FaithfulMethod(counterfactual=Intervention(kind="region"))
    (term,) = method.credit(batch()).terms
    assert term.valid.tolist() == [True, False, False, False, False, True]


def test_metrics_by_hand():
    effect = [10.0, 0.0, 10.0, 0.0, 0.0, 10.0, 0.0]
    assert FaithfulMethod().credit(batch()).metrics == pytest.approx(
        {
            "faithful_rows_share": 3 / 5,
            "faithful_gate_rate": 2 / 3,
            "faithful_reward/mean": (0.6 - 0.6 + 0.0) / 3,
            "faithful_reward/std": math.sqrt(0.72 / 3),
            "faithful_ratio/mean": 0.0,
            "counterfactual_effect/mean": sum(effect) / 7,
            "counterfactual_effect/share_above_0.1": 3 / 7,
            "causal_attention/mean": (0.6 + 0.1 + 0.3) / 3,
            "causal_attention_all_tokens/mean": (0.3 + 0.2 + 0.3) / 3,
        },
        abs=1e-5,
    )
    assert "faithful_gate_rate" not in FaithfulMethod(gate=False).credit(batch()).metrics
    assert FaithfulMethod(weight=0.0).credit(batch()).metrics == FaithfulMethod().credit(batch()).metrics


def test_metrics_of_a_batch_without_images_say_so():
    signals = replace(batch(), image_tokens=torch.zeros(6, dtype=torch.long))
    assert FaithfulMethod().credit(signals).metrics == {"faithful_rows_share": 0.0}


@pytest.mark.parametrize("method", [FaithfulMethod(), FaithfulMethod(gate=False), FaithfulMethod(**BY_REGION)], ids=str)
def test_nothing_is_mutated(method):
    signals = batch()
    kept = {name: value.clone() for name, value in vars(signals).items() if isinstance(value, torch.Tensor)}
    mass = {statistic: value.clone() for statistic, value in signals.statistics.items()}
    method.credit(signals)
    for name, value in kept.items():
        assert torch.equal(torch.nan_to_num(getattr(signals, name).float(), nan=-9), value.float().nan_to_num(nan=-9))
    for statistic, value in mass.items():
        assert torch.equal(signals[statistic].nan_to_num(nan=-9), value.nan_to_num(nan=-9))


def test_without_a_second_pass_it_refuses():
    with refusal("A10", "was not measured"):
        FaithfulMethod().credit(replace(batch(), counterfactual_log_probs=None))
    with refusal("A10", "was not measured"):
        FaithfulMethod(layers=(-2,)).credit(batch())


# ----------------------------------------------------------------------------------------------------------------- GRPO


@PROPERTY
@given(batch=rows(min_rows=2), data=st.data())
@pytest.mark.parametrize("norm_by_std", [True, False])
def test_at_weight_zero_it_is_verls_grpo_bit_for_bit(norm_by_std, batch, data):
    log_probs, changed, mass, mask, correct = batch
    B = len(mask)
    uid = data.draw(st.lists(st.sampled_from("ab"), min_size=B, max_size=B))
    task = torch.tensor(data.draw(st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=B, max_size=B)))
    rewards = torch.zeros(mask.shape)
    rewards[:, -1] = task
    task = rewards.sum(-1)  # as verl does: no -0.0
    method = FaithfulMethod(weight=0.0)
    assert method.gives == frozenset()
    credit = method.credit(signals_of(log_probs, changed, mass, correct, mask=mask, uid=tuple(uid)))
    ours, reward = advantages(task, mask.long(), uid, credit, norm_by_std=norm_by_std, spread_floor=None)
    theirs, _ = compute_grpo_outcome_advantage(
        rewards, mask.long(), np.array(uid, dtype=object), norm_adv_by_std_in_grpo=norm_by_std
    )
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(reward, task)


def test_correct_answers_stay_ahead_of_wrong_ones():
    """Group of four: the most unfaithful correct answer, three wrong ones that look where they should."""
    k = [[0.0, -1.0]] * 4, [[-50.0, -1.0]] * 4
    signals = signals_of(*k, [[0.0, 0.8], [0.8, 0.0], [0.8, 0.0], [0.8, 0.0]], [1.0, 0.0, 0.0, 0.0])
    credit = FaithfulMethod().credit(signals)
    advantage, reward = advantages(signals.correct, signals.response_mask, signals.uid, credit)
    assert reward.tolist() == pytest.approx([0.8, 0.0, 0.0, 0.0], abs=1e-5)
    assert (advantage[0] > 0).all()
    assert (advantage[1:] < 0).all()


def test_of_correct_answers_the_faithful_one_is_preferred():
    signals = signals_of([[0.0, -1.0]] * 2, [[-50.0, -1.0]] * 2, [[0.6, 0.2], [0.2, 0.6]], [1.0, 1.0])
    advantage, _ = advantages(signals.correct, signals.response_mask, signals.uid, FaithfulMethod().credit(signals))
    assert (advantage[0] > 0).all()
    assert (advantage[1] < 0).all()


# ------------------------------------------------------------------------------------------------------------- settings


def test_what_it_needs_follows_the_settings():
    needs = FaithfulMethod(layers=(-1, 3)).needs()
    assert needs.statistics.statistics == (Statistic("image_mass", (-1, 3), "predicting"),)
    assert (needs.intervention, needs.correctness, needs.boxes) == (Intervention(), True, False)
    change = Intervention(kind="region", fill="grey", seed=4)
    needs = FaithfulMethod(
        causal_unit="region", counterfactual=change, gate=False, query_row="input", coverage=0.25
    ).needs()
    assert needs.statistics.statistics == (Statistic("region_mass", (-1,), "input"),)
    assert (needs.intervention, needs.correctness, needs.boxes) == (change, False, True)
    assert needs.statistics.coverage == 0.25
    assert FaithfulMethod(counterfactual=change).needs().boxes
    assert FaithfulMethod(weight=0.0).needs() == FaithfulMethod().needs()  # metrics at strength zero too


def test_what_a_setting_gives():
    assert FaithfulMethod().gives == {"reward"}
    assert FaithfulMethod(weight=0.0).gives == frozenset()


def test_the_configuration_reads_every_setting(monkeypatch):
    monkeypatch.setitem(METHODS, FaithfulMethod.name, FaithfulMethod)
    node = {
        "weight": 1,
        "layers": [18],
        "query_row": "input",
        "gate": False,
        "form": "mass",
        "causal_unit": "region",
        "k_max": 5,
        "coverage": 0.25,
        "counterfactual": {"kind": "region", "share": 0.6, "fill": "grey", "sigma": 2, "seed": 1},
    }
    built = settings_from_config("attn_faithful", {"faithful": node}).method
    assert set(node) == {field.name for field in fields(FaithfulMethod)}
    assert built == FaithfulMethod(
        1.0, (18,), "input", False, "mass", "region", 5.0, 0.25, Intervention("region", 0.6, "grey", 2.0, 1)
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -0.1),
        ("weight", NAN),
        ("weight", float("inf")),
        ("layers", ()),
        ("layers", (3, 3)),
        ("query_row", "output"),
        ("form", "ratio"),
        ("causal_unit", "box"),
        ("k_max", 0.0),
        ("k_max", NAN),
        ("k_max", float("inf")),
        ("coverage", 0.0),
        ("coverage", 1.5),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(key, value):
    with refusal("A05", key) as caught:
        FaithfulMethod(**{key: value})
    assert caught.value.where == f"algorithm.attn.faithful.{key}"
    assert key in caught.value.fix


def test_regions_as_unit_need_a_change_of_regions():
    with refusal("A05", "counterfactual"):
        FaithfulMethod(causal_unit="region")
    assert FaithfulMethod(**BY_REGION).causal_unit == "region"
