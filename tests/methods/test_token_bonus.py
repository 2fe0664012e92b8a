"""The bonus per token: after the group advantage and all factors, nothing at 0, never a sign that is protected.

Shape suffixes: B rows, T response tokens.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refusal

from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.methods import Credit, Mix, Needs, TokenBonus, added_by_bonuses, advantages
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.probe.statistics import StatisticsRequest

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
NAN = float("nan")
REWARD, MASK, UID = torch.tensor([1.0, 0.0]), torch.tensor([[1, 1, 0], [1, 1, 1]]), ["a", "a"]
A = 0.5**0.5 / (1 + 1e-6 / 0.5**0.5)  # of the first row; minus that of the second


def of(credit: Credit, reward=REWARD, mask=MASK, uid=UID) -> torch.Tensor:
    return advantages(reward, mask, uid, credit)[0]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def test_it_is_added_within_the_mask():
    value = torch.tensor([[0.5, -2.0, NAN], [0.0, 0.25, 1.0]])
    got = of(Credit(bonuses=(TokenBonus(value),)))
    assert torch.allclose(got, torch.tensor([[A + 0.5, A - 2.0, 0.0], [-A, -A + 0.25, -A + 1.0]]))
    assert got[0, 2] == 0


def test_factors_do_not_multiply_it():
    weight, factor = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), torch.tensor([3.0, 1.0])
    bonus = TokenBonus(torch.full((2, 3), 0.5))
    got = of(Credit(token_weight=weight, trajectory_weight=factor, bonuses=(bonus,)))
    assert torch.allclose(got, torch.tensor([[0.5, 6 * A + 0.5, 0.0], [0.5 - A, 0.5 - A, 0.5]]))


def test_a_relative_one_is_in_units_of_the_groups_advantage_before_factors():
    weight = torch.zeros(2, 3)
    bonus = TokenBonus(torch.tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 0.0]]), relative=True)
    got = of(Credit(token_weight=weight, bonuses=(bonus,)))
    assert torch.allclose(got, torch.tensor([[A, -A, 0.0], [A, -A, 0.0]]))
    no_contrast = of(Credit(bonuses=(bonus,)), reward=torch.tensor([0.5, 0.5]))
    assert (no_contrast == 0).all()


def test_a_protected_sign_stops_at_zero_and_zero_stays():
    value = torch.tensor([[-0.5, -2.0, 0.0], [0.5, 2.0, -1.0]])
    got = of(Credit(bonuses=(TokenBonus(value, protect_sign=True),)))
    assert torch.allclose(got, torch.tensor([[A - 0.5, 0.0, 0.0], [0.5 - A, 0.0, -A - 1.0]]))
    filtered = of(Credit(token_weight=torch.zeros(2, 3), bonuses=(TokenBonus(torch.ones(2, 3), protect_sign=True),)))
    assert (filtered == 0).all()
    even = of(Credit(bonuses=(TokenBonus(torch.ones(2, 3), protect_sign=True),)), reward=torch.tensor([1.0, 1.0]))
    assert (even == 0).all()
    open_ = of(Credit(bonuses=(TokenBonus(torch.ones(2, 3)),)), reward=torch.tensor([1.0, 1.0]))
    assert torch.equal(open_, MASK.float())


def test_protected_ones_are_added_last_and_keep_the_sign_that_they_find():
    unprotected = TokenBonus(torch.full((2, 3), -2.0))
    protected = TokenBonus(torch.full((2, 3), 5.0), protect_sign=True)
    for bonuses in ((unprotected, protected), (protected, unprotected)):
        got = of(Credit(bonuses=bonuses))
        assert torch.allclose(got, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    small = TokenBonus(torch.full((2, 3), 1.0), protect_sign=True)
    assert torch.allclose(of(Credit(bonuses=(unprotected, small)))[0, 0], torch.tensor(A - 1.0))


signs = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
rows = st.integers(1, 6).flatmap(
    lambda B: st.tuples(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=B, max_size=B),
        st.lists(st.lists(signs, min_size=3, max_size=3), min_size=B, max_size=B),
        st.lists(st.integers(0, 3), min_size=B, max_size=B),
        st.lists(st.sampled_from("ab"), min_size=B, max_size=B),
    )
)


@PROPERTY
@given(rows=rows, relative=st.booleans(), protect=st.booleans(), weighted=st.booleans())
def test_nothing_and_zero_change_no_bit(rows, relative, protect, weighted):
    rewards, values, lengths, uid = rows
    reward, mask = torch.tensor(rewards), (torch.arange(3) < torch.tensor(lengths)[:, None]).long()
    weight = torch.tensor(values).clamp(min=0) if weighted else None  # 0 times a negative advantage is -0.0
    plain = of(Credit(token_weight=weight), reward, mask, uid)
    nothing = of(Credit(token_weight=weight, bonuses=()), reward, mask, uid)
    zero = TokenBonus(torch.zeros(len(rewards), 3), relative, protect)
    outside = TokenBonus(torch.where(mask.bool(), 0.0, NAN), relative, protect)
    assert torch.equal(bits(plain), bits(nothing))
    assert torch.equal(bits(plain), bits(of(Credit(token_weight=weight, bonuses=(zero,)), reward, mask, uid)))
    assert torch.equal(bits(plain), bits(of(Credit(token_weight=weight, bonuses=(zero, outside)), reward, mask, uid)))


@PROPERTY
@given(rows=rows, relative=st.booleans(), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_a_protected_bonus_turns_no_advantage_over(rows, relative, size):
    rewards, values, lengths, uid = rows
    reward, mask = torch.tensor(rewards), (torch.arange(3) < torch.tensor(lengths)[:, None]).long()
    plain = of(Credit(), reward, mask, uid)
    got = of(Credit(bonuses=(TokenBonus(size * torch.tensor(values), relative, True),)), reward, mask, uid)
    assert (got * plain >= 0).all()
    assert (got[plain == 0] == 0).all()
    assert (got[~mask.bool()] == 0).all()


def test_inputs_are_not_changed_and_no_gradient_leaves():
    value = torch.ones(2, 3, requires_grad=True)
    got = of(Credit(bonuses=(TokenBonus(value, relative=True),)))
    assert not got.requires_grad
    assert torch.equal(value, torch.ones(2, 3))


def test_one_that_does_not_fit_or_is_not_finite_is_refused():
    with refusal("A02", "token bonus"):
        of(Credit(bonuses=(TokenBonus(torch.zeros(2, 2)),)))
    with refusal("A22", "2 values of a token bonus") as caught:
        of(Credit(bonuses=(TokenBonus(torch.tensor([[0.0, 0.0, NAN], [NAN, 0.0, float("inf")]])),)))
    assert caught.value.row == 1


def test_what_bonuses_added_is_known():
    credit = Credit(token_weight=torch.zeros(2, 3), bonuses=(TokenBonus(torch.full((2, 3), 0.5)),))
    added = added_by_bonuses(of(credit), REWARD, MASK, UID, credit)
    assert torch.equal(added, 0.5 * MASK)
    assert added_by_bonuses(of(Credit()), REWARD, MASK, UID, Credit()) is None


@dataclass(frozen=True)
class Adds:
    """Adds one number to every token."""

    name: str
    value: float
    protect_sign: bool = False
    gives = frozenset({"bonus"})

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()))

    def credit(self, signals):
        return Credit(
            bonuses=(TokenBonus(torch.full(signals.response_mask.shape, self.value), False, self.protect_sign),)
        )


def test_bonuses_of_a_mix_add_up():
    mix = Mix((Adds("attn_one", 0.5), Adds("attn_two", 0.25)))
    assert mix.gives == {"bonus"}
    signals = random_signals(mix.needs(), 3, 8, 6)
    reward = torch.rand(8, generator=torch.Generator().manual_seed(0))
    credit = mix.credit(signals)
    added = added_by_bonuses(
        advantages(reward, signals.response_mask, signals.uid, credit)[0],
        reward,
        signals.response_mask,
        signals.uid,
        credit,
    )
    assert torch.allclose(added, 0.75 * signals.response_mask, atol=1e-6)


def test_the_estimator_logs_what_was_added(monkeypatch):
    method = Adds("attn_adds", -0.5)
    signals = random_signals(method.needs(), 3, 8, 6)
    context = AdvantageContext(method, signals, True, 1e-6)
    token = CURRENT.set(context)
    try:
        make_estimator("attn_adds")(torch.rand(8, 6), signals.response_mask, index=np.array(signals.uid))
    finally:
        CURRENT.reset(token)
    assert context.metrics["token_bonus/mean"] == pytest.approx(-0.5, abs=1e-6)
    assert context.metrics["token_bonus/size"] == pytest.approx(0.5, abs=1e-6)
