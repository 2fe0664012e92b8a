"""What every registered method must keep, whatever it computes; the methods' own files test their arithmetic.

Shape suffixes: B rows, T response tokens.
"""

import copy
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.taken_rows import take
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import METHODS, AnchorMethod, DualMethod, Mix, RegionMethod, SensitivityMethod, advantages
from sayo_verl.methods.group import group_rows
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.metrics import every_metric

EXAMPLES = Path(__file__).parent.parent.parent / "recipe" / "example"
load_methods([str(EXAMPLES / name) for name in ("reliance.py", "glance.py")])
load_methods([str(EXAMPLES.parent / name) for name in ("oracle/oracle.py", "controls/controls.py")])

PROPERTY = settings(derandomize=True, deadline=None, max_examples=25)
EVERY = {**{name: cls() for name, cls in METHODS.items()}, "attn_mix": Mix((RegionMethod(), DualMethod()))}
OTHERS = {
    "region per token": RegionMethod(per_token=True),
    "region of ratios": RegionMethod(pooling="ratio"),
    "dual released": DualMethod(score_offset="minmax", position="zero_based", clamp="released"),
    "dual on attention": DualMethod(score="image_mass", score_offset="none", trajectory_score="mean"),
    "anchor top": AnchorMethod(weighting="top"),
    "anchor rest": AnchorMethod(weighting="rest"),
    "sensitivity of groups": SensitivityMethod(scope="group"),
}
EVERY_WAY = {**EVERY, **OTHERS}
ACROSS_GROUPS = {"attn_sensitivity"}  # its paper compares the responses of a batch
REPLACED = {"attn_oracle_plus", "attn_sharpen"}  # they replace the group's advantage by a bonus
batches = st.tuples(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.booleans())
every_way = pytest.mark.parametrize("method", EVERY_WAY.values(), ids=EVERY_WAY)


def without(names):
    kept = {name: method for name, method in EVERY_WAY.items() if name not in names}
    return pytest.mark.parametrize("method", kept.values(), ids=kept)


def made(method, batch):
    seed, B, T, groups, ties = batch
    signals = random_signals(method.needs(), seed, B, T, groups=groups, ties=ties)
    reward = torch.randint(0, 9, (B,), generator=torch.Generator().manual_seed(seed + 1)) / 8
    return signals, reward


def off(method):
    """The method at strength zero."""
    if isinstance(method, Mix):
        return Mix(tuple(off(part) for part in method.methods))
    (key,) = {"weight", "strength"} & {field.name for field in dataclasses.fields(method)}
    return dataclasses.replace(method, **{key: 0.0})


def bits(tensor):
    assert tensor.dtype == torch.float32
    return tensor.view(torch.int32)


def run(method, signals, reward, **options):
    return advantages(reward, signals.response_mask, signals.uid, method.credit(signals), **options)


@every_way
@PROPERTY
@given(batch=batches)
def test_strength_zero_is_verls_grpo_bit_for_bit(method, batch):
    zero = off(method)
    signals, reward = made(zero, batch)
    assert zero.gives == frozenset()
    credit = zero.credit(signals)
    assert credit.token_weight is None
    assert credit.trajectory_weight is None
    assert credit.bonuses == ()
    ours, _ = run(zero, signals, reward, spread_floor=None)
    token_level = torch.zeros(signals.response_mask.shape)
    token_level[:, 0] = reward
    uid = np.array(signals.uid, dtype=object)
    theirs, _ = compute_grpo_outcome_advantage(token_level, signals.response_mask, uid)
    assert torch.equal(bits(ours), bits(theirs))


@every_way
@PROPERTY
@given(batch=batches)
def test_advantages_are_finite_and_zero_outside_the_mask_and_inputs_stay(method, batch):
    signals, reward = made(method, batch)
    signals.check()
    kept, kept_reward = copy.deepcopy(signals), reward.clone()
    advantage, shaped = run(method, signals, reward)
    assert advantage.isfinite().all()
    assert shaped.isfinite().all()
    assert (advantage[~signals.response_mask.bool()] == 0).all()
    assert torch.equal(reward, kept_reward)
    assert signals.uid == kept.uid
    for name, value in vars(kept).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(-7), getattr(signals, name).nan_to_num(-7)), name
    for statistic, value in kept.statistics.items():
        assert torch.equal(value.nan_to_num(-7), signals[statistic].nan_to_num(-7)), statistic.key


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # a metric is read of it
@every_way
def test_inputs_with_a_gradient_or_of_other_strides_give_the_same_bits(method):
    signals, reward = made(method, (3, 8, 6, 2, False))

    def other(value):
        strided = value.transpose(0, 1).contiguous().transpose(0, 1)
        return strided.requires_grad_() if value.is_floating_point() else strided

    changed = dataclasses.replace(
        signals,
        statistics={statistic: other(value) for statistic, value in signals.statistics.items()},
        **{name: other(v) for name, v in vars(signals).items() if isinstance(v, torch.Tensor) and v.ndim == 2},
    )
    assert any(not value.is_contiguous() for value in (changed.response_mask, *changed.statistics.values()))
    advantage, _ = run(method, changed, reward.clone().requires_grad_())
    assert not advantage.requires_grad
    assert torch.equal(bits(advantage), bits(run(method, signals, reward)[0]))


# a response may be anchors alone, or one token that does not attend to its region at all
@without({"anchor rest", "region per token"} | REPLACED)
@PROPERTY
@given(batch=batches)
def test_no_response_loses_all_of_its_weight(method, batch):
    signals, _ = made(method, batch)
    credit, mask = method.credit(signals), signals.response_mask.bool()
    some = mask.any(-1)
    if credit.token_weight is not None:
        assert (credit.token_weight.where(mask, torch.zeros(())).sum(-1)[some] > 0).all()
    if credit.trajectory_weight is not None:
        assert (credit.trajectory_weight[some] > 0).all()


@every_way
@PROPERTY
@given(batch=batches, data=st.data())
def test_the_order_of_rows_does_not_matter(method, batch, data):
    signals, reward = made(method, batch)
    order = data.draw(st.permutations(range(len(reward))))
    advantage, _ = run(method, signals, reward)
    permuted, _ = run(method, take(signals, order), reward[order])
    assert torch.allclose(permuted, advantage[order], atol=2e-4, rtol=1e-4)


@without(ACROSS_GROUPS)
@PROPERTY
@given(batch=batches)
def test_groups_do_not_see_one_another(method, batch):
    signals, reward = made(method, batch)
    advantage, _ = run(method, signals, reward)
    for rows in group_rows(signals.uid):
        alone, _ = run(method, take(signals, rows), reward[rows])
        assert torch.equal(bits(alone), bits(advantage[rows]))


@every_way
@PROPERTY
@given(batch=batches)
def test_neutral_rows_have_weight_one_and_no_term(method, batch):
    signals, _ = made(method, batch)
    credit, neutral = method.credit(signals), ~signals.eligible_rows(boxes=method.needs().boxes)
    tokens = signals.response_mask.bool() & (~signals.eligible_rows(boxes=False))[:, None]
    if credit.token_weight is not None:
        assert (credit.token_weight[tokens] == 1).all()
    if credit.trajectory_weight is not None:
        assert (credit.trajectory_weight[~signals.eligible_rows(boxes=False)] == 1).all()
    for bonus in credit.bonuses:
        assert (bonus.value[tokens] == 0).all()
    for term in credit.terms:
        assert not (term.valid & neutral).any()


@every_way
@PROPERTY
@given(batch=batches)
def test_every_logged_metric_is_declared_and_lies_in_its_range(method, batch):
    parts = [part for part in getattr(method, "methods", (method,)) if hasattr(part, "metrics")]
    declared = {metric.name: metric for part in parts for metric in every_metric(part.metrics)}
    for name, value in method.credit(made(method, batch)[0]).metrics.items() if parts else ():
        low, high = declared[name].low, declared[name].high
        assert (-math.inf if low is None else low - 1e-4) <= value <= (math.inf if high is None else high + 1e-4), name


@without(REPLACED)
@PROPERTY
@given(batch=batches)
def test_credit_keeps_signs(method, batch):
    signals, reward = made(method, batch)
    credit = dataclasses.replace(method.credit(signals), terms=())
    weighted, _ = advantages(reward, signals.response_mask, signals.uid, credit)
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    assert (weighted * plain >= 0).all()


@every_way
@PROPERTY
@given(batch=batches)
def test_float32_is_close_to_float64(method, batch):
    seed, B, T, groups, _ = batch
    signals, _ = made(method, (seed, B, T, groups, False))  # with ties, rounding decides what is selected
    wide = dataclasses.replace(
        signals,
        **{n: v.double() for n, v in vars(signals).items() if isinstance(v, torch.Tensor) and v.is_floating_point()},
        statistics={statistic: value.double() for statistic, value in signals.statistics.items()},
    )
    narrow, exact = method.credit(signals), method.credit(wide)
    for a, b in zip(narrow.terms, exact.terms, strict=True):
        assert torch.equal(a.valid, b.valid)
        assert torch.allclose(a.value[a.valid].double(), b.value[b.valid].double(), atol=1e-4)
    for name in ("token_weight", "trajectory_weight"):
        a, b = getattr(narrow, name), getattr(exact, name)
        if a is not None:
            on = signals.response_mask.bool() if a.ndim == 2 else signals.response_mask.bool().any(-1)
            assert torch.allclose(a[on].double(), b[on].double(), atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_the_estimator_returns_two_tensors_and_logs(name):
    method = EVERY[name]
    signals = random_signals(method.needs(), 3, 8, 6)
    context = AdvantageContext(method, signals, True, 1e-6)
    token = CURRENT.set(context)
    rewards = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    try:
        advantage, returns = make_estimator(name)(rewards, signals.response_mask, index=np.array(signals.uid))
    finally:
        CURRENT.reset(token)
    assert advantage is not returns
    assert advantage.data_ptr() != returns.data_ptr()
    assert torch.equal(advantage, returns)
    assert context.metrics["neutral_rows/padding"] == float(signals.is_padding.sum())
    assert any(not key.startswith("neutral_rows") for key in context.metrics)


@pytest.mark.parametrize("name", EVERY)
def test_a_method_says_what_it_gives(name):
    method = EVERY[name]
    credit = method.credit(random_signals(method.needs(), 3, 8, 6))
    given_ = {"reward"} if any(term.weight for term in credit.terms) else set()
    given_ |= {"token"} if credit.token_weight is not None else set()
    given_ |= {"trajectory"} if credit.trajectory_weight is not None else set()
    given_ |= {"bonus"} if credit.bonuses else set()
    assert method.gives == given_


def test_methods_need_torch_alone():
    """Lifted into another trainer, a method brings neither verl nor Ray."""
    code = (
        "import sys; import sayo_verl.methods; "
        "heavy = {'verl', 'ray', 'vllm', 'transformers', 'pymetis', 'pebble', 'torchvision'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": "/usr/bin:/bin"})
