"""Our reading of Faithful-MR1's reinforcing stage: its reward by hand, against a float64 oracle, and by identities.

Shape suffixes: B rows, T response tokens.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.faithful_signals import (
    BY_REGION,
    IMAGE_MASS,
    NAN,
    PROPERTY,
    REGION_MASS,
    one_row,
    refusal,
    rows,
    signals_of,
    value_of,
)

from sayo_verl.methods.faithful import EPS, EPS_EFFECT, FaithfulMethod, causal_effect, causal_weights, faithful_ratio

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
