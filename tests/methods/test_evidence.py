"""Evidence-RL: cases by hand, its reward as a loop of the released code has it, neutral rows, GRPO, settings.

Shape suffixes: B rows, T response tokens, K control regions.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from sayo_verl.launch.settings import settings_from_config
from sayo_verl.methods import EvidenceMethod, FaithfulMethod, Mix, Signals, advantages
from sayo_verl.methods.evidence import evidence_gate, evidence_margin, evidence_reward, support_drop
from sayo_verl.vision.intervention import Intervention

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")


def signals_of(log_probs, evidence, controls, correct, *, method=None, mask=None, **values) -> Signals:
    """Rows of one group that all carry the term, unless values say otherwise; controls: one [B, T] per region."""
    method = method or EvidenceMethod()
    log_probs, evidence, *controls = (torch.as_tensor(x, dtype=torch.float32) for x in (log_probs, evidence, *controls))
    B = len(log_probs)
    return Signals(
        **{
            "response_mask": torch.ones_like(log_probs, dtype=torch.int64) if mask is None else torch.as_tensor(mask),
            "entropy": torch.zeros_like(log_probs),
            "log_probs": log_probs,
            "statistics": {},
            "image_tokens": torch.full((B,), 10.0),
            "region_tokens": torch.full((B,), 2.0),
            "is_padding": torch.zeros(B, dtype=torch.bool),
            "uid": ("a",) * B,
            "counterfactuals": dict(zip((method.evidence, *method.others), (evidence, *controls), strict=True)),
            "correct": torch.as_tensor(correct, dtype=torch.float32),
            **values,
        }
    )


def shifted(log_probs, *drops) -> list:
    """Log-probs lowered by each drop, the same for all tokens."""
    return [(torch.tensor(log_probs) - drop).tolist() for drop in drops]


def value_of(method, signals) -> torch.Tensor:
    (term,) = method.credit(signals).terms
    return term.value


# -------------------------------------------------------------------------------------------------------------- by hand


def test_support_drops_are_means_over_the_responses_own_tokens():
    drop = support_drop(
        torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[-2.0, -2.5, 3.0]]), torch.tensor([[True, True, False]])
    )
    assert drop.tolist() == pytest.approx([0.75])


def test_a_margin_by_hand():
    """Drops 0.5 and (0.1, 0.2, 0.3): mean 0.2, standard deviation sqrt(2/3) / 10; 0.3 / 0.08165 = 3.674."""
    evidence, controls = torch.tensor([0.5]).double(), torch.tensor([[0.1, 0.2, 0.3]]).double()
    assert evidence_margin(evidence, controls).item() == pytest.approx(
        math.tanh(0.3 / (math.sqrt(2 / 3) / 10)), rel=1e-4
    )
    assert evidence_margin(evidence, controls, "difference").item() == pytest.approx(0.3, rel=1e-6)


def test_a_gate_by_hand():
    gate = evidence_gate(torch.tensor([-1.0, 0.0, 0.1, 1.0]), tau=0.2)
    assert gate.tolist() == pytest.approx([4.54e-5, 0.5, 0.731059, 0.9999546], abs=1e-6)


def test_rewards_by_hand():
    """m = 0.1: the gate is 0.731059; a correct answer gets it plus 0.01, a wrong one -0.25 of it plus 0.01."""
    reward = evidence_reward(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.1, 0.1, 0.0]), tau=0.2, eps=0.1)
    assert reward.tolist() == pytest.approx([0.741059, -0.172765, -0.125], abs=1e-6)


def test_with_a_task_reward_of_accuracy_alone_the_sum_is_the_papers_reward():
    log_probs = [[-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]]
    evidence = [[-1.5, -1.5], [-1.0, -1.4], [-1.1, -1.1]]  # drops 0.5, 0.2, 0.1
    signals = signals_of(log_probs, evidence, shifted(log_probs, 0.1, 0.2, 0.3), [1.0, 1.0, 0.0])
    _, reward = advantages(signals.correct, signals.response_mask, signals.uid, EvidenceMethod().credit(signals))
    low = math.tanh(-0.1 / (math.sqrt(2 / 3) / 10 + 1e-6))
    wanted = [
        1.0 * 0.5 * (1 + math.tanh(0.99871 / 0.2)) + 0.1 * 0.99871,
        1.0 * 0.5 + 0.0,
        -0.25 * 0.5 * (1 + math.tanh(low / 0.2)) + 0.1 * low,
    ]
    assert reward.tolist() == pytest.approx(wanted, abs=2e-4)
    half = replace(EvidenceMethod(), weight=0.5).credit(signals)
    _, reward = advantages(signals.correct, signals.response_mask, signals.uid, half)
    assert reward.tolist() == pytest.approx([(1 + wanted[0]) / 2, (1 + wanted[1]) / 2, wanted[2] / 2], abs=2e-4)


def test_a_task_reward_without_correctness_gets_the_whole_reward_with_replaced_zero():
    log_probs = [[-1.0, -1.0]]
    signals = signals_of(log_probs, log_probs, shifted(log_probs, 0.0, 0.0, 0.0), [1.0])
    assert value_of(EvidenceMethod(), signals).item() == pytest.approx(0.5 - 1.0)
    assert value_of(EvidenceMethod(replaced=0.0), signals).item() == pytest.approx(0.5)
    assert value_of(EvidenceMethod(replaced=2.0), signals).item() == pytest.approx(0.5 - 2.0)


def released(log_probs, evidence, controls, correct, tau=0.2, eps=0.1) -> float:
    """The reward of one response as the released code computes it: a mean over its tokens, floats, one at a time."""
    mean = sum(log_probs) / len(log_probs)
    s_pos = mean - sum(evidence) / len(evidence)
    scores = [mean - sum(control) / len(control) for control in controls]
    mu = sum(scores) / len(scores)
    sigma = math.sqrt(max(sum((x - mu) ** 2 for x in scores) / len(scores), 0.0)) if len(scores) >= 2 else 0.0
    m = math.tanh((s_pos - mu) / (sigma + 1e-6))
    return (1.0 if correct else -0.25) * 0.5 * (1.0 + math.tanh(m / tau)) + eps * m


log_prob = st.floats(-12.0, 0.0, width=32)


@st.composite
def responses(draw: st.DrawFn):
    """One response of 1 to 6 tokens: log-probs, after the box, after each of three control regions, whether correct."""
    T = draw(st.integers(1, 6))
    row = st.lists(log_prob, min_size=T, max_size=T)
    return draw(row), draw(row), draw(st.lists(row, min_size=3, max_size=3)), draw(st.booleans())


@PROPERTY
@given(response=responses())
def test_it_is_the_reward_of_the_released_code(response):
    log_probs, evidence, controls, correct = response
    signals = signals_of([log_probs], [evidence], [[c] for c in controls], [float(correct)])
    value = value_of(EvidenceMethod(), signals).item()
    assert value == pytest.approx(released(*response) - correct, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- invariants


@PROPERTY
@given(response=responses(), shift=st.floats(-3.0, 3.0))
def test_a_drop_that_every_changed_image_causes_does_not_matter(response, shift):
    _, evidence, controls, _ = response
    drops = torch.tensor([evidence, *controls]).double().mean(-1)
    here, there = (evidence_margin(d[:1], d[None, 1:], "difference") for d in (drops, drops + shift))
    assert here.item() == pytest.approx(there.item(), abs=1e-9)


@PROPERTY
@given(response=responses(), order=st.permutations(range(3)))
def test_the_order_of_the_control_regions_does_not_matter(response, order):
    log_probs, evidence, controls, correct = response
    here, there = (
        value_of(EvidenceMethod(), signals_of([log_probs], [evidence], [[c] for c in of], [float(correct)])).item()
        for of in (controls, [controls[i] for i in order])
    )
    assert here == pytest.approx(there, abs=1e-5)


@PROPERTY
@given(response=responses(), more=st.floats(0.01, 5.0))
def test_the_more_a_correct_answer_needs_the_box_the_larger_its_reward(response, more):
    log_probs, evidence, controls, _ = response
    less = [x - more for x in evidence]
    values = [value_of(EvidenceMethod(), signals_of([log_probs], [e], [[c] for c in controls], [1.0])).item()
              for e in (evidence, less)]  # fmt: skip
    assert values[1] >= values[0] - 1e-6


@PROPERTY
@given(margin=st.floats(-1.0, 1.0))
def test_of_two_answers_with_one_margin_the_correct_one_gets_more(margin):
    right, wrong = evidence_reward(torch.tensor([1.0, 0.0]), torch.full((2,), margin).double(), 0.2, 0.1).tolist()
    assert right > wrong
    assert -0.21 < wrong < 0.0
    assert -0.11 < right < 1.11


@pytest.mark.parametrize("norm_by_std", [True, False])
@PROPERTY
@given(response=responses(), data=st.data())
def test_at_weight_zero_it_is_verls_grpo_bit_for_bit(norm_by_std, response, data):
    log_probs, evidence, controls, correct = response
    B = data.draw(st.integers(2, 4))
    signals = signals_of([log_probs] * B, [evidence] * B, [[c] * B for c in controls], [float(correct)] * B)
    task = torch.tensor(data.draw(st.lists(st.floats(-100, 100, width=32), min_size=B, max_size=B)))
    rewards = torch.zeros(signals.response_mask.shape)
    rewards[:, -1] = task
    task = rewards.sum(-1)
    method = EvidenceMethod(weight=0.0)
    assert method.gives == frozenset()
    ours, reward = advantages(
        task, signals.response_mask, signals.uid, method.credit(signals), norm_by_std=norm_by_std, spread_floor=None
    )
    theirs, _ = compute_grpo_outcome_advantage(
        rewards, signals.response_mask, np.array(signals.uid, dtype=object), norm_adv_by_std_in_grpo=norm_by_std
    )
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(reward, task)


# --------------------------------------------------------------------------------------------------------- neutral rows


def batch() -> Signals:
    """Rows 0 and 6 carry the term; 1 has no box, 2 no image, 3 no room, 4 is masked, 5 is padding."""
    log_probs = [[-1.0, -1.0]] * 7
    return signals_of(
        log_probs,
        shifted(log_probs, 0.5)[0],
        shifted(log_probs, 0.1, 0.2, 0.3),
        [1.0, 1.0, 1.0, 1.0, 0.0, NAN, 0.0],
        mask=[[1, 1], [1, 1], [1, 1], [1, 1], [0, 0], [0, 0], [1, 0]],
        image_tokens=torch.tensor([10.0, 10.0, 0.0, 10.0, 10.0, 10.0, 10.0]),
        region_tokens=torch.tensor([5.0, 0.0, 0.0, 6.0, 2.0, 2.0, 2.0]),
        is_padding=torch.tensor([False] * 5 + [True, False]),
    )


def test_rows_without_a_box_or_without_room_for_a_control_region_keep_their_task_reward():
    signals = batch()
    signals.check()
    credit = EvidenceMethod().credit(signals)
    (term,) = credit.terms
    assert term.valid.tolist() == [True, False, False, False, False, False, True]
    task = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.25, 0.125, 0.0])
    _, reward = advantages(task, signals.response_mask, tuple("abcdefg"), credit)
    assert reward[1:6].tolist() == task[1:6].tolist()


def test_metrics_by_hand():
    m = math.tanh(0.3 / (math.sqrt(2 / 3) / 10))
    g = 0.5 * (1 + math.tanh(m / 0.2))
    metrics = EvidenceMethod().credit(batch()).metrics
    assert metrics == pytest.approx(
        {
            "evidence_rows_share": 2 / 6,
            "evidence_no_room_share": 1 / 6,
            "evidence_margin/mean": m,
            "evidence_margin/std": 0.0,
            "evidence_drop/mean": 0.5,
            "evidence_control_drop/mean": 0.2,
            "evidence_gate/mean": g,
            "evidence_reward/mean": (g + 0.1 * m - 0.25 * g + 0.1 * m) / 2,
        },
        abs=1e-4,
    )
    assert EvidenceMethod(weight=0.0).credit(batch()).metrics == metrics
    none = replace(batch(), region_tokens=torch.zeros(7))
    assert EvidenceMethod().credit(none).metrics == {"evidence_rows_share": 0.0, "evidence_no_room_share": 0.0}


def test_without_a_pass_or_correctness_it_refuses():
    short = dict(list(batch().counterfactuals.items())[:-1])
    with refusal("A10", "elsewhere.grey.s0.d2"):
        EvidenceMethod().credit(replace(batch(), counterfactuals=short))
    with refusal("A10", "correct"):
        EvidenceMethod().credit(replace(batch(), correct=None))


# ------------------------------------------------------------------------------------------------------------- settings


def test_what_it_needs_follows_the_settings():
    needs = EvidenceMethod().needs()
    assert needs.statistics.statistics == ()
    assert (needs.correctness, needs.boxes) == (True, True)
    assert [i.key for i in needs.interventions] == [
        "region.grey", "elsewhere.grey.s0.d0", "elsewhere.grey.s0.d1", "elsewhere.grey.s0.d2",
    ]  # fmt: skip
    needs = EvidenceMethod(controls=1, margin="difference", fill="black", seed=4, coverage=0.25).needs()
    assert [i.key for i in needs.interventions] == ["region.black", "elsewhere.black.s4.d0"]
    assert needs.statistics.coverage == 0.25


def test_it_shares_the_pass_of_the_box_with_another_method():
    faithful = FaithfulMethod(causal_unit="region", counterfactual=Intervention("region", fill="grey", seed=9))
    assert len(Mix((faithful, EvidenceMethod())).needs().interventions) == 4


def test_the_configuration_reads_every_setting():
    node = {"weight": 0.5, "tau": 1, "eps": 0, "controls": 2, "margin": "difference", "replaced": 0.5, "fill": "black",
            "coverage": 0.25, "seed": 3}  # fmt: skip
    built = settings_from_config("attn_evidence", {"evidence": node}).method
    assert built == EvidenceMethod(0.5, 1.0, 0.0, 2, "difference", 0.5, "black", 0.25, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -0.1),
        ("weight", NAN),
        ("tau", 0.0),
        ("tau", float("inf")),
        ("eps", -0.1),
        ("controls", 1),
        ("controls", 17),
        ("margin", "ratio"),
        ("replaced", -1.0),
        ("fill", "white"),
        ("coverage", 0.0),
        ("seed", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_key(key, value):
    with refusal("A05", key) as caught:
        EvidenceMethod(**{key: value})
    assert caught.value.where == f"algorithm.attn.evidence.{key}"


def test_one_control_region_is_enough_for_a_difference():
    assert EvidenceMethod(controls=1, margin="difference").controls == 1
    with refusal("A05", "controls"):
        EvidenceMethod(controls=0, margin="difference")
