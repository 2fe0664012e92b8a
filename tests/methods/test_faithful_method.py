"""Our reading of Faithful-MR1's reinforcing stage: neutral rows, metrics, GRPO, settings.

Shape suffixes: B rows, T response tokens.
"""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.faithful_signals import (
    BY_REGION,
    NAN,
    PROPERTY,
    refusal,
    rows,
    signals_of,
)
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from sayo_verl.launch.settings import settings_from_config
from sayo_verl.methods import METHODS, Signals, advantages
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.probe.statistics import Statistic
from sayo_verl.vision.intervention import Intervention


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
        FaithfulMethod().credit(replace(batch(), counterfactuals={}))
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
    assert (needs.interventions, needs.correctness, needs.boxes) == ((Intervention(),), True, False)
    change = Intervention(kind="region", fill="grey", seed=4)
    needs = FaithfulMethod(
        causal_unit="region", counterfactual=change, gate=False, query_row="input", coverage=0.25
    ).needs()
    assert needs.statistics.statistics == (Statistic("region_mass", (-1,), "input"),)
    assert (needs.interventions, needs.correctness, needs.boxes) == ((change,), False, True)
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
        "counterfactual": {"kind": "region", "share": 0.6, "fill": "grey", "sigma": 2, "seed": 1, "draw": 4},
    }
    built = settings_from_config("attn_faithful", {"faithful": node}).method
    assert set(node) == {field.name for field in fields(FaithfulMethod)}
    assert built == FaithfulMethod(
        1.0, (18,), "input", False, "mass", "region", 5.0, 0.25, Intervention("region", 0.6, "grey", 2.0, 1, 4)
    )
    assert vars(built.counterfactual) == node["counterfactual"]  # equal interventions may differ in unused settings


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
