"""VGPO's factors: recorded numbers, an oracle in plain Python, each option by hand, degenerate cases.

tests/golden/vgpo_released.json holds inputs and outputs of the functions that the authors released (wzb-bupt/VGPO,
d773c71), run unchanged on random hidden states; each case is one micro-batch that is one group.

Shape suffixes: B rows, P prompt tokens, T response tokens, D hidden size.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sayo_verl.errors import SayoError
from sayo_verl.methods import DualConfig, DualMethod, advantages, dual_grained_factors
from sayo_verl.methods.dual import EPS, TOKEN_CLAMP, TRAJECTORY_CLAMP, compensated, compensation_gate, focus_score
from sayo_verl.methods.group import group_rows
from sayo_verl.methods.random_signals import random_signals

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
CASES = json.loads((Path(__file__).parent / "golden" / "vgpo_released.json").read_text())
NAN = float("nan")
PAPER, RELEASED = DualConfig.paper(), DualConfig.released()


# --------------------------------------------------------------------------------------------------- recorded numbers


def recorded(case):
    """Cosines [B, T] from the recorded hidden states, and the mask."""
    hidden, ids = torch.tensor(case["hidden_states"]), torch.tensor(case["input_ids"])
    image = (ids == case["image_token_id"]).float()
    mean_BD = (hidden * image[..., None]).sum(1) / image.sum(1, keepdim=True)
    P, T = case["prompt_len"], case["response_len"]
    score = torch.nn.functional.cosine_similarity(hidden[:, P : P + T], mean_BD[:, None], dim=-1)
    return score, torch.arange(T) < torch.tensor(case["lengths"])[:, None]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_agrees_with_the_released_functions(case):
    score, mask = recorded(case)
    theirs = {name: torch.tensor(value) for name, value in case["released"].items()}
    assert (case["beta"], case["gamma"], case["kappa"]) == (RELEASED.beta, RELEASED.gamma, RELEASED.kappa)
    assert score.mean() == pytest.approx(theirs["mean_cosine"].item(), abs=1e-6)
    groups = [list(range(len(score)))]
    rho = focus_score(score, mask, groups, "minmax")
    token, trajectory = dual_grained_factors(score, mask, ["one"] * len(score), RELEASED)
    errors = {
        "score": (rho - theirs["score_minmaxed"])[mask].abs().max().item(),
        "token factor": (token - theirs["token_factor"])[mask].abs().max().item(),
        "trajectory factor": (trajectory - theirs["trajectory_factor"]).abs().max().item(),
    }
    print(f"seed {case['seed']}, largest differences from the released functions: {errors}")
    assert max(errors.values()) < 1e-5


def test_recorded_cases_hold_what_is_delicate():
    lengths = [case["lengths"] for case in CASES]
    assert any(len(set(some)) > 1 for some in lengths), "ragged responses"
    assert any(1 in some for some in lengths), "a response of one token"
    factors = [f for case in CASES for f in case["released"]["trajectory_factor"]]
    assert min(factors) == pytest.approx(0.9, abs=1e-6), "the clamp binds"


# ------------------------------------------------------------------------------------------------ an oracle in float64


def oracle(score, lengths, uid, config):
    """The equations, a token at a time, in Python floats."""
    ramps = {"linear": lambda x: x, "exponential": lambda x: (math.exp(x) - 1) / (math.e - 1), "step": lambda x: 1.0}
    B, T = len(score), max(map(len, score))
    token, s, trajectory = [[1.0] * T for _ in range(B)], [0.0] * B, [1.0] * B
    for rows in group_rows(uid):
        real = [row for row in rows if lengths[row]]
        everything = [x for row in real for x in score[row][: lengths[row]]]
        low, high = (min([0.0, *everything]), max([0.0, *everything]))
        for row in real:
            n = lengths[row]
            rho = [
                {"cosine": (x + 1) / 2, "none": x, "minmax": (x - low) / (high - low + EPS)}[config.score_offset]
                for x in score[row][:n]
            ]
            start = math.floor((1 - config.gamma) * n + 1e-9)
            k = max(1, math.floor(config.kappa * (n - start) + 1e-9))
            bar = sorted(rho[start:], reverse=True)[k - 1]
            w = []
            for t, r in enumerate(rho):
                share = (t + 1) / n if config.position == "one_based" else t / max(n - 1, 1)
                gate = t >= start and r >= bar
                w.append(r * (1 + gate * config.beta * ramps[config.schedule](share)))
            what = [(x - min(w)) / (max(w) - min(w) + EPS) for x in w]
            if config.intra:
                for t in range(n):
                    token[row][t] = 1 + what[t] - sum(what) / n
            s[row] = {"sum": sum(w), "normalised_sum": sum(what), "mean": sum(w) / n}[config.trajectory_score]
        if config.inter and real:
            values = [s[row] for row in real]
            scaled = [(x - min(values)) / (max(values) - min(values) + EPS) for x in values]
            for row, x in zip(real, scaled, strict=True):
                trajectory[row] = 1 + x - sum(scaled) / len(scaled)
    if config.clamp == "released":
        token = [[min(max(x, TOKEN_CLAMP[0]), TOKEN_CLAMP[1]) for x in row] for row in token]
        trajectory = [min(max(x, TRAJECTORY_CLAMP[0]), TRAJECTORY_CLAMP[1]) for x in trajectory]
    return torch.tensor(token, dtype=torch.float64), torch.tensor(trajectory, dtype=torch.float64)


configs = st.builds(
    DualConfig,
    beta=st.sampled_from([0.0, 0.3, 2.0]),
    gamma=st.sampled_from([0.1, 0.5, 1.0]),
    kappa=st.sampled_from([0.05, 0.2, 1.0]),
    schedule=st.sampled_from(["linear", "exponential", "step"]),
    intra=st.booleans(),
    inter=st.booleans(),
    score_offset=st.sampled_from(["cosine", "minmax", "none"]),
    position=st.sampled_from(["one_based", "zero_based"]),
    trajectory_score=st.sampled_from(["sum", "normalised_sum", "mean"]),
    clamp=st.sampled_from(["none", "released"]),
)


@PROPERTY
@given(seed=st.integers(0, 9999), B=st.integers(1, 9), T=st.integers(1, 12), config=configs)
def test_against_the_oracle(seed, B, T, config):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(B, T, generator=g) * 2 - 1
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    uid = ["abc"[i] for i in torch.randint(0, 3, (B,), generator=g).tolist()]
    mask = torch.arange(T) < lengths[:, None]
    given_ = torch.where(mask, score, torch.full_like(score, NAN))  # nothing outside the mask is read
    token, trajectory = dual_grained_factors(given_, mask, uid, config)
    wide_token, wide_trajectory = dual_grained_factors(given_.double(), mask, uid, config)
    expected_token, expected_trajectory = oracle(score.double().tolist(), lengths.tolist(), uid, config)
    assert torch.allclose(wide_token, expected_token, atol=1e-9)
    assert torch.allclose(wide_trajectory, expected_trajectory, atol=1e-9)
    assert torch.allclose(token.double(), expected_token, atol=1e-5)
    assert torch.allclose(trajectory.double(), expected_trajectory, atol=1e-5)
    assert token.isfinite().all()
    assert trajectory.isfinite().all()
    assert (token >= 0).all()
    assert (trajectory >= 0).all()


# ------------------------------------------------------------------------------------------------------------- by hand


def test_by_hand():
    # rho = 0.2 0.4 0.6 0.8; the tail is the last two, of which floor(0.5 * 2) = 1 passes: the last, t / T = 1
    score = torch.tensor([[-0.6, -0.2, 0.2, 0.6]])
    config = dataclasses.replace(PAPER, kappa=0.5)
    rho = focus_score(score, torch.ones(1, 4, dtype=torch.bool), [[0]], "cosine")
    w, gate = compensated(rho, torch.ones(1, 4, dtype=torch.bool), config)
    assert gate.tolist() == [[False, False, False, True]]
    assert w[0].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8 * 1.3])
    token, trajectory = dual_grained_factors(score, torch.ones(1, 4), ["a"], config)
    what = [0.0, 0.2 / 0.84, 0.4 / 0.84, 1.0]
    assert token[0].tolist() == pytest.approx([1 + x - sum(what) / 4 for x in what], abs=1e-6)
    assert trajectory.tolist() == [1.0]  # alone in its group


@pytest.mark.parametrize(
    ("schedule", "position", "bonus"),
    [
        ("linear", "one_based", (0.75, 1.0)),
        ("linear", "zero_based", (2 / 3, 1.0)),
        ("step", "one_based", (1.0, 1.0)),
        ("exponential", "one_based", (math.expm1(0.75) / math.expm1(1), 1.0)),
    ],
)
def test_schedules(schedule, position, bonus):
    config = DualConfig(schedule=schedule, position=position, kappa=1.0)
    w, gate = compensated(torch.full((1, 4), 0.5), torch.ones(1, 4, dtype=torch.bool), config)
    assert gate.tolist() == [[False, False, True, True]]
    assert w[0].tolist() == pytest.approx([0.5, 0.5, 0.5 * (1 + 0.3 * bonus[0]), 0.5 * (1 + 0.3 * bonus[1])])


@pytest.mark.parametrize(
    ("rho", "gamma", "kappa", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], 0.5, 0.2, [0, 0, 0, 1]),  # at least one
        ([0.9, 0.2, 0.3, 0.4], 1.0, 0.5, [1, 0, 0, 1]),  # the whole response is the tail
        ([0.1, 0.2, 0.4, 0.4], 0.5, 0.5, [0, 0, 1, 1]),  # ties pass together
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.5, 1.0, [0, 0, 1, 1, 1]),  # floor(2.5) tokens before the tail
        ([0.7], 0.5, 0.2, [1]),
    ],
)
def test_the_gate(rho, gamma, kappa, expected):
    values = torch.tensor([rho])
    got = compensation_gate(values, torch.ones_like(values, dtype=torch.bool), gamma, kappa)
    assert got.long().tolist() == [expected]


def test_the_sum_favours_long_answers_and_the_mean_does_not():
    score = torch.full((2, 8), 0.5) + torch.linspace(0, 0.01, 8)
    mask = torch.arange(8) < torch.tensor([8, 4])[:, None]
    for trajectory_score in ("sum", "normalised_sum"):
        config = DualConfig(trajectory_score=trajectory_score)
        _, trajectory = dual_grained_factors(score, mask, ["a", "a"], config)
        assert trajectory.tolist() == pytest.approx([1.5, 0.5], abs=1e-4)
    config = DualConfig(trajectory_score="mean", beta=0.0)
    same = torch.full((2, 8), 0.5)
    assert dual_grained_factors(same, mask, ["a", "a"], config)[1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("counted", [None, [True, True, True]])
@pytest.mark.parametrize("kind", ["sum", "normalised_sum", "mean"])
def test_a_counted_row_without_a_token_takes_no_part_in_its_group(counted, kind):
    score = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 8) * torch.tensor([1.0, 1.0, 0.0])[:, None]
    config = DualConfig(trajectory_score=kind)
    alone = dual_grained_factors(score[:2], mask[:2], ["a", "a"], config)
    rows = None if counted is None else torch.tensor(counted)
    token, trajectory = dual_grained_factors(score, mask, ["a"] * 3, config, counted=rows)
    assert torch.equal(token[:2], alone[0])
    assert torch.equal(trajectory[:2], alone[1])
    assert trajectory[2] == 1.0


@pytest.mark.parametrize("value", [0.37, 0.77, -0.3])
def test_rounding_is_not_blown_up_to_a_factor(value):
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    config = DualConfig(trajectory_score="mean", beta=0.0)
    _, trajectory = dual_grained_factors(torch.full((2, 40), value), mask, ["a", "a"], config)
    assert trajectory.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    row = torch.rand(16, generator=torch.Generator().manual_seed(0))
    both = torch.stack([row, row.flip(0)])
    _, trajectory = dual_grained_factors(both, torch.ones(2, 16), ["a", "a"], DualConfig(beta=0.0))
    assert trajectory.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_the_released_clamp_lifts_the_mean_factor():
    score = torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask, uid = torch.ones(8, 20), ["a"] * 8
    _, plain = dual_grained_factors(score, mask, uid, dataclasses.replace(RELEASED, clamp="none"))
    _, clamped = dual_grained_factors(score, mask, uid, RELEASED)
    assert plain.mean() == pytest.approx(1.0, abs=1e-6)
    assert clamped.mean() > 1.05


def test_means_are_one_without_clamps():
    score = torch.rand(9, 15, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.arange(15) < torch.tensor([15, 3, 7, 1, 9, 15, 2, 8, 0])[:, None]
    uid = list("aabbbabac")
    token, trajectory = dual_grained_factors(score, mask, uid, PAPER)
    for row in range(8):
        assert token[row][mask[row]].mean() == pytest.approx(1.0, abs=1e-6)
    for rows in group_rows(uid):
        assert trajectory[rows].mean() == pytest.approx(1.0, abs=1e-6)
    assert (token[~mask] == 1).all()


@pytest.mark.parametrize("config", [PAPER, RELEASED, DualConfig(kappa=1.0)], ids=["paper", "released", "all"])
@pytest.mark.parametrize("T", [1, 5])
def test_where_nothing_can_be_compared_factors_are_one(config, T):
    equal = torch.full((3, T), 0.25)
    flat = dataclasses.replace(config, beta=0.0)
    token, trajectory = dual_grained_factors(equal, torch.ones(3, T), ["a", "a", "a"], flat)
    assert torch.equal(token, torch.ones(3, T))
    assert torch.equal(trajectory, torch.ones(3))
    _, alone = dual_grained_factors(torch.rand(1, T), torch.ones(1, T), ["a"], config)
    assert alone.tolist() == [1.0]
    nothing = dual_grained_factors(torch.full((2, T), NAN), torch.zeros(2, T), ["a", "a"], config)
    assert torch.equal(nothing[0], torch.ones(2, T))
    assert torch.equal(nothing[1], torch.ones(2))


def test_rows_that_do_not_count_are_left_out_of_their_group():
    score = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    mask, counted = torch.ones(4, 6), torch.tensor([True, True, False, True])
    token, trajectory = dual_grained_factors(score, mask, ["a"] * 4, RELEASED, counted)
    _, others = dual_grained_factors(score[counted], mask[counted], ["a"] * 3, RELEASED)
    assert torch.equal(trajectory[counted], others)
    assert trajectory[2] == 1
    assert (token[2] == 1).all()
    mask[2] = 0  # without a token it does not count, whatever the caller says
    for counted_ in (None, torch.ones(4, dtype=torch.bool)):
        assert torch.equal(dual_grained_factors(score, mask, ["a"] * 4, RELEASED, counted_)[1], trajectory)


# ---------------------------------------------------------------------------------------------------------- the method


def test_the_defaults_are_the_papers_arithmetic_and_the_released_one_differs_in_four_choices():
    assert DualConfig() == PAPER
    differing = {k for k in vars(PAPER) if vars(PAPER)[k] != vars(RELEASED)[k]}
    assert differing == {"score_offset", "position", "trajectory_score", "clamp"}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"beta": -1.0}, "beta"),
        ({"beta": NAN}, "beta"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"kappa": 0.0}, "kappa"),
        ({"schedule": "cubic"}, "schedule"),
        ({"clamp": "both"}, "clamp"),
        ({"position": "two_based"}, "position"),
        ({"trajectory_score": "max"}, "trajectory_score"),
        ({"score_offset": "plus"}, "score_offset"),
        ({"strength": 1.5}, "strength"),
        ({"score": "entropy"}, "score"),
        ({"layers": (3,)}, "layers"),
        ({"score_offset": "none"}, "score_offset"),
        ({"score": "image_mass"}, "score_offset"),
        ({"score": "image_mass", "score_offset": "none", "layers": ()}, "layers"),
    ],
)
def test_settings_out_of_range_are_refused(settings, key):
    with pytest.raises(SayoError, match=r"^SAYO-A05") as caught:
        DualMethod(**settings)
    assert caught.value.where == f"algorithm.attn.dual.{key}"


def test_what_it_gives_and_needs():
    assert DualMethod().gives == {"token", "trajectory"}
    assert DualMethod(inter=False).gives == {"token"}
    assert DualMethod(intra=False).gives == {"trajectory"}
    (statistic,) = DualMethod().needs().statistics.statistics
    assert statistic.key == "image_cosine.input.L-1"
    (statistic,) = DualMethod(score="image_mass", score_offset="none", layers=(2, 3)).needs().statistics.statistics
    assert statistic.key == "image_mass.input.L2,3"
    (statistic,) = DualMethod(query_row="predicting").needs().statistics.statistics
    assert statistic.key == "image_cosine.predicting.L-1"


def test_strength_is_between_grpo_and_the_method():
    method, half = DualMethod(), DualMethod(strength=0.5)
    signals = random_signals(method.needs(), 5, 8, 7)
    full, some = method.credit(signals), half.credit(signals)
    assert torch.allclose(some.token_weight, (1 + full.token_weight) / 2)
    assert torch.allclose(some.trajectory_weight, (1 + full.trajectory_weight) / 2)


def test_the_advantage_is_the_product():
    method = DualMethod()
    signals = random_signals(method.needs(), 6, 8, 7)
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0))
    credit = method.credit(signals)
    out, _ = advantages(reward, signals.response_mask, signals.uid, credit)
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    assert torch.allclose(out, plain * credit.token_weight * credit.trajectory_weight[:, None], atol=1e-6)
    assert not torch.allclose(out, plain)


def test_metrics_by_hand():
    method = DualMethod(kappa=1.0)
    (statistic,) = method.needs().statistics.statistics
    signals = random_signals(method.needs(), 7, 2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    score = torch.tensor([[-1.0, 0.0, 0.0, 1.0], [0.0, 1.0, NAN, NAN]])
    signals = dataclasses.replace(
        signals,
        response_mask=mask,
        image_tokens=torch.tensor([4.0, 4.0]),
        is_padding=torch.zeros(2, dtype=torch.bool),
        uid=("a", "a"),
        statistics={statistic: score},
    )
    metrics = method.credit(signals).metrics
    assert metrics["visual_score/mean"] == pytest.approx(1 / 6)
    assert metrics["dual_gate_rate"] == pytest.approx(3 / 6)
    # rho: late 0.5, 1 and 1; early 0, 0.5 and 0.5
    assert metrics["late_early_visual_score"] == pytest.approx((2.5 / 3) / (1 / 3))
    assert metrics["dual_trajectory_factor/mean"] == pytest.approx(1.0)
