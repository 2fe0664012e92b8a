"""VPPO's token filter and trajectory factor.

tests/methods/golden/vppo_released.json holds inputs and outputs of the lines that the authors released
(huaixuheqing/VPPO-RL, a23c54b, verl/workers/actor/dp_actor.py), run with one micro-batch per mini-batch, where their
batch and ours are the same.

Shape suffixes: B rows, T response tokens.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counterfactual_signals import changed
from support.refusals import refusal

from sayo_verl.methods import DualMethod, Mix, RegionMethod, SensitivityMethod, advantages
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.methods.sensitivity import kept_tokens, trajectory_factors
from sayo_verl.vision.intervention import Intervention

CASES = json.loads((Path(__file__).parent / "golden" / "vppo_released.json").read_text())
PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
batches = st.tuples(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4))


def k3(d: float) -> float:
    return math.exp(-d) - 1 + d


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['lengths'])} {case['kind']}")
def test_agrees_with_the_released_lines(case):
    real, other = (torch.tensor(case[name]) for name in ("log_probs", "counterfactual_log_probs"))
    lengths = case["lengths"]
    differences = [row[:n] for row, n in zip((real - other).tolist(), lengths, strict=True)]
    method = SensitivityMethod(share=case["share"], factor_min=case["factor_min"])
    credit = method.credit(changed(differences, "a" * len(lengths)))
    mask = torch.arange(real.shape[1]) < torch.tensor(lengths)[:, None]
    kept = torch.tensor(case["kept"]).bool()
    if case["kind"] == "equal":  # their sort is free in the order of equal tokens
        assert torch.equal((credit.token_weight.bool() & mask).sum(-1), kept.sum(-1))
    else:
        assert torch.equal(credit.token_weight.bool() & mask, kept)
    assert torch.allclose(credit.trajectory_weight, torch.tensor(case["factor"]), atol=1e-5)
    shaped = torch.tensor(case["advantage"]) * credit.trajectory_weight[:, None]
    assert torch.allclose(shaped, torch.tensor(case["shaped"]), atol=1e-5)


def test_the_recorded_cases_hold_what_is_delicate():
    assert any(len(case["lengths"]) == 1 for case in CASES)
    assert any(case["kind"] == "equal" and set(case["factor"]) == {1.0} for case in CASES)
    assert max(max(case["factor"]) for case in CASES) > 1.1
    assert {0, 1} == {kept for case in CASES for row in case["kept"] for kept in row}


def test_by_hand():
    """k is 0.1353 for a loss of -2 nats and so on; 0.4 of 5 tokens are 2, of 2 tokens 1; of equals the earlier."""
    signals = changed([[0.0, 2.0, 0.1, 1.0, 0.0], [0.5, 0.5], [0.0, 0.0, 0.0]], "aab")
    credit = SensitivityMethod().credit(signals)
    assert credit.token_weight.tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 1, 1], [1, 1, 0, 1, 1]]
    s = [(k3(2.0) + k3(0.1) + k3(1.0)) / 5, k3(0.5), 0.0]
    u = [value / s[0] for value in s]  # the smallest is 0, the largest is the first
    top = 0.9 + 0.1 / (sum(u) / 3)
    assert credit.trajectory_weight.tolist() == pytest.approx([0.9 + (top - 0.9) * value for value in u], abs=1e-6)
    assert float(credit.trajectory_weight.mean()) == pytest.approx(1.0, abs=1e-6)
    assert credit.metrics["sensitivity_factor/min"] == pytest.approx(0.9)
    assert credit.metrics["sensitivity_factor/max"] == pytest.approx(top)
    total, kept = 5 * s[0] + 2 * s[1], k3(2.0) + k3(1.0) + k3(0.5)
    assert credit.metrics["sensitivity/mean"] == pytest.approx(total / 10, abs=1e-6)
    assert credit.metrics["sensitivity_kept_share"] == pytest.approx(5 / 10)
    assert credit.metrics["sensitivity_kept/mean"] == pytest.approx(kept / 5, abs=1e-6)
    assert credit.metrics["sensitivity_kept_effect"] == pytest.approx(kept / total, abs=1e-6)


def test_the_advantage_is_that_of_equation_6():
    signals = changed([[2.0, 0.0], [0.0, 0.1]], "aa")
    reward = torch.tensor([1.0, 0.0])
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    shaped, _ = advantages(reward, signals.response_mask, signals.uid, SensitivityMethod(share=0.5).credit(signals))
    assert torch.allclose(shaped, plain * torch.tensor([[1.1, 0.0], [0.0, 0.9]]), atol=1e-6)


def test_a_fixed_upper_end_is_the_range_of_table_3():
    factor = trajectory_factors(torch.tensor([0.0, 1.0, 4.0]), [[0, 1, 2]], 0.8, 1.2)
    assert factor.tolist() == pytest.approx([0.8, 0.9, 1.2])


def test_the_scope_decides_which_responses_are_compared():
    differences = [[0.0], [1.0], [1.0], [3.0]]
    by_batch = SensitivityMethod().credit(changed(differences, "aabb")).trajectory_weight
    by_group = SensitivityMethod(scope="group").credit(changed(differences, "aabb")).trajectory_weight
    assert by_group.tolist() == pytest.approx([0.9, 1.1, 0.9, 1.1], abs=1e-6)
    assert by_batch[1] == by_batch[2]
    assert by_batch.mean() == pytest.approx(1.0, abs=1e-6)


def test_scores_that_are_alike_give_no_factor():
    assert trajectory_factors(torch.tensor([0.5, 0.5 + 5e-7]), [[0, 1]], 0.9).tolist() == [1, 1]
    assert trajectory_factors(torch.tensor([0.5, 0.7]), [[0], [1]], 0.9).tolist() == [1, 1]
    assert trajectory_factors(torch.tensor([0.5, 0.7, 0.9]), [[], [0, 2]], 0.9)[1] == 1


@pytest.mark.parametrize(("n", "share", "k"), [(70, 0.1, 7), (5, 0.4, 2), (3, 0.4, 2), (1, 0.01, 1), (4, 1.0, 4)])
def test_the_number_of_kept_tokens_is_rounded_up(n, share, k):
    effect = torch.arange(n).float()[None]
    assert kept_tokens(effect, torch.ones(1, n, dtype=torch.bool), share)[0].nonzero().flatten().tolist() == list(
        range(n - k, n)
    )


def test_a_row_without_an_image_is_neutral_and_not_compared():
    with_it = SensitivityMethod().credit(changed([[0.0], [1.0], [9.0]], "aaa", no_image=[2]))
    without = SensitivityMethod().credit(changed([[0.0], [1.0]], "aa"))
    assert with_it.trajectory_weight.tolist() == [*without.trajectory_weight.tolist(), 1.0]
    assert with_it.token_weight[2, 0] == 1


def test_a_changed_region_needs_boxes():
    assert SensitivityMethod(counterfactual=Intervention(kind="region")).needs().boxes
    needs = SensitivityMethod().needs()
    assert not needs.boxes
    assert needs.statistics.statistics == ()
    assert needs.interventions == (Intervention(),)


@pytest.mark.parametrize(
    ("method", "gives"),
    [
        (SensitivityMethod(), {"token", "trajectory"}),
        (SensitivityMethod(share=1.0), {"trajectory"}),
        (SensitivityMethod(factor_min=1.0), {"token"}),
        (SensitivityMethod(factor_min=1.0, factor_max=1.2), {"token", "trajectory"}),
        (SensitivityMethod(strength=0.0), set()),
    ],
)
def test_each_half_can_be_left_out(method, gives):
    assert method.gives == gives
    credit = method.credit(random_signals(method.needs(), 3, 8, 6))
    assert {"token"} & gives == ({"token"} if credit.token_weight is not None else set())
    assert {"trajectory"} & gives == ({"trajectory"} if credit.trajectory_weight is not None else set())


def test_half_the_strength_is_half_the_way():
    signals = changed([[0.0, 2.0], [0.1, 0.0]], "aa")
    full, half = (SensitivityMethod(strength=strength, share=0.5).credit(signals) for strength in (1.0, 0.5))
    assert torch.allclose(half.token_weight, (1 + full.token_weight) / 2)
    assert torch.allclose(half.trajectory_weight, (1 + full.trajectory_weight) / 2)


def test_it_mixes_with_a_reward_and_not_with_another_weighting():
    assert Mix((RegionMethod(), SensitivityMethod())).gives == {"reward", "token", "trajectory"}
    with refusal("A12", "two methods weight"):
        Mix((DualMethod(), SensitivityMethod()))


@PROPERTY
@given(batch=batches)
def test_factors_have_mean_one_over_the_batch_and_start_at_their_lower_end(batch):
    seed, B, T, groups = batch
    method = SensitivityMethod()
    signals = random_signals(method.needs(), seed, B, T, groups=groups)
    factor = method.credit(signals).trajectory_weight[signals.eligible_rows(boxes=False)]
    if len(factor):
        assert float(factor.mean()) == pytest.approx(1.0, abs=1e-5)
        assert float(factor.min()) >= 0.9 - 1e-6


@PROPERTY
@given(batch=batches, share=st.floats(0.01, 1.0))
def test_kept_tokens_are_never_less_sensitive_than_the_others(batch, share):
    seed, B, T, _ = batch
    g = torch.Generator().manual_seed(seed)
    effect, tokens = torch.rand(B, T, generator=g), torch.rand(B, T, generator=g) < 0.7
    kept = kept_tokens(effect, tokens, share)
    assert not (kept & ~tokens).any()
    for b in range(B):
        n, k = int(tokens[b].sum()), int(kept[b].sum())
        assert k >= share * n - 1e-6
        assert k < share * n + 1 + 1e-6
        dropped = tokens[b] & ~kept[b]
        if k and dropped.any():
            assert effect[b][kept[b]].min() >= effect[b][dropped].max()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"strength": 1.5}, "strength"),
        ({"share": 0.0}, "share"),
        ({"factor_min": 0.0}, "factor_min"),
        ({"factor_max": 0.5}, "factor_max"),
        ({"scope": "prompt"}, "scope"),
        ({"k_max": math.inf}, "k_max"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(settings, key):
    with refusal("A05", key):
        SensitivityMethod(**settings)
