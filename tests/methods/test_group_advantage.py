"""The GRPO core: verl's own bit for bit without terms, and what a term and a neutral row change.

Shape suffixes: B rows, T response tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_grpo_outcome_advantage

from sayo_verl.errors import SayoError
from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.methods import RegionMethod, RewardTerm, Signals, group_advantage
from sayo_verl.methods.group import GRPO_EPSILON, group_rows
from sayo_verl.probe.statistics import Statistic

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)
NAN = float("nan")


def refusal(code: str, says: str = ""):
    return pytest.raises(SayoError, match=rf"^SAYO-{code}: .*{says}.* \| at .+ \| (.* \| )?fix: .+\Z")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bits, so that 0.0 is not -0.0; torch.equal on top for shape and dtype."""
    assert a.dtype == b.dtype == torch.float32
    return torch.equal(a, b) and torch.equal(a.view(torch.int32), b.view(torch.int32))


# Rewards as rules give them (multiples of 1/8) and as models give them (anything).
any_reward = st.one_of(
    st.integers(-32, 32).map(lambda n: n / 8),
    st.floats(min_value=-(2.0**50), max_value=2.0**50, width=32, allow_subnormal=False),
)
tidy_reward = st.integers(-32, 32).map(lambda n: n / 8)


@st.composite
def batches(draw: st.DrawFn, reward=any_reward, min_rows: int = 1):
    """(token_level_rewards [B, T], response_mask [B, T], uid): ragged interleaved groups, some rows without a token."""
    B, T = draw(st.integers(min_rows, 14)), draw(st.integers(1, 6))
    uid = draw(st.lists(st.sampled_from("abcd"), min_size=B, max_size=B))
    lengths = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    scores = draw(st.lists(reward, min_size=B, max_size=B))
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).to(draw(st.sampled_from([torch.int64, torch.float32])))
    rewards = torch.zeros(B, T)
    for row, score in enumerate(scores):
        rewards[row, max(lengths[row] - 1, 0)] = score  # verl puts an outcome on the last token
    return rewards, mask, np.array(uid, dtype=object)


@st.composite
def terms_for(draw: st.DrawFn, B: int, weight: float):
    values = draw(st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=B, max_size=B))
    valid = draw(st.lists(st.booleans(), min_size=B, max_size=B))
    return RewardTerm("region_reward", torch.tensor(values), torch.tensor(valid), weight)


# ----------------------------------------------------------------------------------------------------- verl bit for bit


@pytest.mark.parametrize("norm_by_std", [True, False])
@PROPERTY
@given(batch=batches(), data=st.data())
def test_without_an_applied_term_it_is_verls_grpo_bit_for_bit(norm_by_std, batch, data):
    rewards, mask, uid = batch
    theirs, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, uid, norm_adv_by_std_in_grpo=norm_by_std)
    exact = {"norm_by_std": norm_by_std, "spread_floor": None}  # the floor: test_the_one_place_where_it_differs
    ours, reward = group_advantage(rewards.sum(-1), mask, list(uid), **exact)
    assert same_bits(ours, theirs)
    assert same_bits(reward, rewards.sum(-1))
    off = data.draw(terms_for(len(uid), weight=0.0))
    off = RewardTerm(off.name, torch.full_like(off.value, NAN), off.valid, 0.0)  # not read, whatever it holds
    weightless, _ = group_advantage(rewards.sum(-1), mask, list(uid), [off], **exact)
    assert same_bits(weightless, theirs)


@PROPERTY
@given(batch=batches(), value=st.integers(-8, 8))
def test_a_term_that_no_row_carries_changes_nothing(batch, value):
    rewards, mask, uid = batch
    B = len(uid)
    term = RewardTerm("region_reward", torch.full((B,), value / 8), torch.zeros(B, dtype=torch.bool), 1.0)
    ours, reward = group_advantage(rewards.sum(-1), mask, list(uid), [term])
    plain, plain_reward = group_advantage(rewards.sum(-1), mask, list(uid))
    assert torch.equal(ours, plain)
    assert torch.equal(reward, plain_reward)


def test_the_epsilon_is_verls():
    import inspect

    assert inspect.signature(compute_grpo_outcome_advantage).parameters["epsilon"].default == GRPO_EPSILON


def test_a_carried_term_is_the_grpo_of_the_summed_reward():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 2.0]])
    mask, uid = torch.ones(5, 2), np.array(["x", "y", "x", "x", "y"], dtype=object)
    r_v = torch.tensor([0.25, -0.5, 0.125, -0.75, 0.5])
    ours, reward = group_advantage(
        rewards.sum(-1), mask, list(uid), [RewardTerm("region_reward", r_v, torch.ones(5, dtype=torch.bool), 2.0)]
    )
    assert torch.equal(reward, rewards.sum(-1) + 2 * r_v)
    joined = torch.stack([torch.zeros(5), reward], dim=1)
    assert same_bits(ours, compute_grpo_outcome_advantage(joined, mask, uid)[0])


def test_two_terms_add_up():
    task, everyone = torch.tensor([1.0, 0.0, 0.5]), torch.ones(3, dtype=torch.bool)
    first = RewardTerm("first", torch.tensor([0.5, 0.25, 0.0]), everyone, 1.0)
    second = RewardTerm("second", torch.tensor([0.0, 1.0, -1.0]), everyone, 0.5)
    _, reward = group_advantage(task, torch.ones(3, 1), list("aaa"), [first, second])
    assert reward.tolist() == [1.5, 0.75, 0.0]


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("norm_by_std", [True, False])
@PROPERTY
@given(batch=batches(reward=tidy_reward), data=st.data())
def test_rows_may_come_in_any_order(norm_by_std, batch, data):
    rewards, mask, uid = batch
    term = data.draw(terms_for(len(uid), weight=1.0))
    order = torch.tensor(data.draw(st.permutations(range(len(uid)))))
    shuffled = RewardTerm(term.name, term.value[order], term.valid[order], 1.0)
    task = rewards.sum(-1)
    straight, reward = group_advantage(task, mask, list(uid), [term], norm_by_std=norm_by_std)
    turned, turned_reward = group_advantage(
        task[order], mask[order], list(uid[order.numpy()]), [shuffled], norm_by_std=norm_by_std
    )
    assert torch.equal(turned_reward, reward[order])
    assert torch.allclose(turned, straight[order], atol=1e-6, rtol=1e-6)


@PROPERTY
@given(batch=batches(), data=st.data())
def test_interleaving_groups_differently_is_exact(batch, data):
    rewards, mask, uid = batch
    term = data.draw(terms_for(len(uid), weight=1.0))
    slots = data.draw(st.permutations(list(uid)))  # which group stands where; rows of a group keep their order
    waiting = {name: iter(rows) for name, rows in zip(dict.fromkeys(map(str, uid)), group_rows(uid), strict=True)}
    order = torch.tensor([next(waiting[str(name)]) for name in slots])
    shuffled = RewardTerm(term.name, term.value[order], term.valid[order], 1.0)
    straight, _ = group_advantage(rewards.sum(-1), mask, list(uid), [term])
    turned, _ = group_advantage(rewards.sum(-1)[order], mask[order], slots, [shuffled])
    assert same_bits(turned, straight[order])


@PROPERTY
@given(batch=batches(min_rows=2), data=st.data())
def test_groups_do_not_see_each_other(batch, data):
    rewards, mask, uid = batch
    term = data.draw(terms_for(len(uid), weight=1.0))
    before, _ = group_advantage(rewards.sum(-1), mask, list(uid), [term])
    inside = torch.tensor([name == uid[0] for name in uid])
    other = rewards.sum(-1) + torch.where(inside, 3.0 * torch.arange(len(uid)) + 1.0, 0.0)
    flipped = RewardTerm(term.name, torch.where(inside, -term.value, term.value), term.valid ^ inside, 1.0)
    after, _ = group_advantage(other, mask, list(uid), [flipped])
    assert same_bits(after[~inside], before[~inside])


@PROPERTY
@given(batch=batches(), data=st.data())
def test_inputs_stay_as_they_are_and_outputs_are_finite(batch, data):
    rewards, mask, uid = batch
    term = data.draw(terms_for(len(uid), weight=1.0))
    names, task = list(uid), rewards.sum(-1)
    kept = task.clone(), mask.clone(), term.value.clone(), term.valid.clone(), list(names)
    advantages, reward = group_advantage(task, mask, names, [term])
    assert torch.equal(task, kept[0])
    assert torch.equal(mask, kept[1])
    assert torch.equal(term.value, kept[2])
    assert torch.equal(term.valid, kept[3])
    assert names == kept[4]
    assert advantages.shape == mask.shape
    assert torch.isfinite(advantages).all()
    assert torch.isfinite(reward).all()
    assert (advantages[mask == 0] == 0).all()
    for terms in ([term], []):
        outputs = {out.data_ptr() for out in group_advantage(task, mask, names, terms)}
        assert len(outputs) == 2
        assert outputs.isdisjoint({task.data_ptr(), mask.data_ptr(), term.value.data_ptr()})


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_equal_rewards_give_no_advantage_and_a_group_of_one_keeps_its_reward(norm_by_std):
    task = torch.tensor([0.5, 0.5, 0.5, 2.0])
    advantages, _ = group_advantage(task, torch.ones(4, 1), list("aaab"), norm_by_std=norm_by_std)
    assert advantages[:3].flatten().tolist() == [0.0, 0.0, 0.0]
    assert advantages[3].item() == pytest.approx(2.0, abs=1e-5)


def test_groups_are_told_apart_by_uid_and_kept_in_order():
    assert group_rows(["b", "a", "b", "c", "a"]) == [[0, 2], [1, 4], [3]]


# --------------------------------------------------------------------------------------------------------- neutral rows


def mixed_group(norm_by_std: bool) -> tuple[list[float], list[float]]:
    task = torch.tensor([1.0, 0.0, 1.0, 0.0])
    term = RewardTerm(
        "region_reward", torch.tensor([0.75, 0.25, NAN, NAN]), torch.tensor([True, True, False, False]), 1.0
    )
    advantages, reward = group_advantage(task, torch.ones(4, 1), list("gggg"), [term], norm_by_std=norm_by_std)
    return advantages.flatten().tolist(), reward.tolist()


def test_neutral_rows_are_left_out_of_the_statistics_of_a_mixed_group():
    # Carrying rows: 1 + 0.75 and 0 + 0.25, mean 1, standard deviation sqrt(1.125). Neutral rows: their task rewards 1
    # and 0 against the carrying rows' task mean 0.5 (not their mean reward of 1), on the same scale.
    advantages, reward = mixed_group(norm_by_std=True)
    scale = math.sqrt(1.125) + 1e-6
    assert advantages == pytest.approx([0.75 / scale, -0.75 / scale, 0.5 / scale, -0.5 / scale], abs=1e-6)
    assert reward == [1.75, 0.25, 1.0, 0.0]


def test_neutral_rows_without_scaling():
    assert mixed_group(norm_by_std=False)[0] == [0.75, -0.75, 0.5, -0.5]


def test_what_a_neutral_row_scores_does_not_move_the_others():
    mask, names = torch.ones(4, 2), list("gggg")
    valid = torch.tensor([True, False, True, True])
    term = RewardTerm("region_reward", torch.tensor([0.1, NAN, 0.7, -0.3]), valid, 1.0)
    one, _ = group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]), mask, names, [term])
    two, _ = group_advantage(torch.tensor([1.0, 99.0, 0.0, 1.0]), mask, names, [term])
    assert same_bits(one[valid], two[valid])
    assert (two[1] > one[1]).all()


def test_a_group_in_which_no_row_carries_the_term_is_grpo_while_others_are_not():
    rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.5]])
    uid = np.array(["p", "q", "p", "q", "p"], dtype=object)
    valid = torch.tensor([False, True, False, True, False])
    term = RewardTerm("region_reward", torch.tensor([NAN, 0.5, NAN, 0.25, NAN]), valid, 1.0)
    ours, _ = group_advantage(rewards.sum(-1), torch.ones(5, 1), list(uid), [term])
    theirs, _ = compute_grpo_outcome_advantage(rewards, torch.ones(5, 1), uid)
    assert same_bits(ours[~valid], theirs[~valid])
    assert not torch.equal(ours[valid], theirs[valid])


def test_each_term_is_decided_on_by_itself():
    """Region applies nowhere; faithful applies to rows 0 to 2; row 3 is masked: its raw reward of 5 must not count."""
    task, mask = torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    region = RewardTerm("region_reward", torch.full((4,), NAN), torch.zeros(4, dtype=torch.bool), 1.0)
    faithful = RewardTerm("faithful_reward", torch.zeros(4), torch.tensor([True, True, True, False]), 0.2)
    for terms in ([region, faithful], [faithful, region], [faithful]):
        advantages, _ = group_advantage(task, mask, list("gggg"), terms)
        assert advantages.flatten().tolist() == pytest.approx([1.155, -0.577, -0.577, 0.0], abs=1e-3)


def test_a_row_that_lacks_one_of_two_terms_keeps_the_other():
    first = RewardTerm("first", torch.tensor([0.5, 0.5, 0.0, 1.0]), torch.ones(4, dtype=torch.bool), 1.0)
    second = RewardTerm("second", torch.tensor([0.25, 0.75, 0.5, NAN]), torch.tensor([True, True, True, False]), 1.0)
    advantages, _ = group_advantage(torch.zeros(4), torch.ones(4, 1), list("gggg"), [first, second], norm_by_std=False)
    # the last row: 1.0, and 0.5 in the place of the second term; the mean over the others is 0.75 + 1.25 + 0.5 over 3
    mean = 2.5 / 3
    assert advantages.flatten().tolist() == pytest.approx([0.75 - mean, 1.25 - mean, 0.5 - mean, 1.5 - mean])


def test_terms_that_no_two_rows_share_are_compared_over_all_rows():
    first = RewardTerm("first", torch.tensor([1.0, 0.0, NAN, NAN]), torch.tensor([True, True, False, False]), 1.0)
    second = RewardTerm("second", torch.tensor([NAN, NAN, 1.0, 0.0]), torch.tensor([False, False, True, True]), 1.0)
    advantages, _ = group_advantage(torch.zeros(4), torch.ones(4, 1), list("gggg"), [first, second], norm_by_std=False)
    assert advantages.flatten().tolist() == [0.5, -0.5, 0.5, -0.5]


@PROPERTY
@given(batch=batches(reward=tidy_reward), data=st.data())
def test_a_term_that_at_most_one_row_of_each_group_carries_changes_nothing_beside_another(batch, data):
    rewards, mask, uid = batch
    other = data.draw(terms_for(len(uid), weight=0.5))
    lone = torch.zeros(len(uid), dtype=torch.bool)
    for rows in group_rows(uid):
        if len(rows) > 1 and data.draw(st.booleans()):
            lone[data.draw(st.sampled_from(rows))] = True
    term = RewardTerm("lone", torch.full((len(uid),), 3.0), lone, 1.0)
    alone, _ = group_advantage(rewards.sum(-1), mask, list(uid), [other])
    both, _ = group_advantage(rewards.sum(-1), mask, list(uid), [term, other])
    assert same_bits(alone, both)


def test_a_masked_row_counts_at_weight_zero_and_at_no_weight_above_it():
    """The jump that rejection sampling makes: at weight 0 this is verl's GRPO, which counts masked rows."""
    task, mask = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([[1.0], [1.0], [0.0]])
    value, valid = torch.zeros(3), torch.tensor([True, True, False])
    by_weight = {}
    for weight in (0.0, 1e-9, 1.0):
        term = RewardTerm("region_reward", value, valid, weight)
        advantages, _ = group_advantage(task, mask, list("ggg"), [term], norm_by_std=False)
        by_weight[weight] = advantages.flatten().tolist()
    assert by_weight[0.0] == [-1.0, -2.0, 0.0]
    assert by_weight[1e-9] == by_weight[1.0] == [0.5, -0.5, 0.0]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_a_reward_that_is_not_finite_is_refused_with_its_row_and_uid(bad):
    with refusal("A03", "not finite") as caught:
        group_advantage(torch.tensor([0.0, bad, 1.0]), torch.ones(3, 2), ["a", "prompt-7", "a"])
    assert "row 1" in caught.value.where
    assert "prompt-7" in caught.value.where


def test_a_term_that_is_not_finite_is_refused_where_it_counts():
    term = RewardTerm("region_reward", torch.tensor([0.0, NAN]), torch.tensor([True, True]), 1.0)
    with refusal("A03"):
        group_advantage(torch.zeros(2), torch.ones(2, 1), ["a", "a"], [term])


def test_a_row_without_uid_is_refused():
    with refusal("A04", "uid") as caught:
        group_advantage(torch.zeros(3), torch.ones(3, 1), ["a", None, "a"])
    assert "row 1" in caught.value.where


@pytest.mark.parametrize(
    ("task", "mask", "names"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3), ["a", "a"]),
        (torch.zeros(2), torch.ones(3, 3), ["a", "a"]),
        (torch.zeros(2), torch.ones(2), ["a", "a"]),
        (torch.zeros(2), torch.ones(2, 3), ["a"]),
    ],
    ids=["rewards per token", "other rows", "flat mask", "uid missing"],
)
def test_shapes_that_do_not_fit_are_refused(task, mask, names):
    with refusal("A02"):
        group_advantage(task, mask, names)


def test_a_term_per_token_is_refused():
    term = RewardTerm("region_reward", torch.zeros(2, 3), torch.ones(2, dtype=torch.bool), 1.0)
    with refusal("A02", "region_reward"):
        group_advantage(torch.zeros(2), torch.ones(2, 3), ["a", "a"], [term])


# ------------------------------------------------------------------------------------------------- registered estimator


def signals(mask: torch.Tensor) -> Signals:
    """Statistics in which row b looks at the target b + 1 times as much as at the average visual token."""
    B, T = mask.shape
    image = torch.full((B, T), 0.4)
    ratio = torch.arange(1.0, B + 1)[:, None]
    return Signals(
        response_mask=mask,
        entropy=torch.rand(B, T, generator=torch.Generator().manual_seed(0)),
        log_probs=torch.full((B, T), -0.5),
        statistics={Statistic("image_mass"): image, Statistic("region_mass"): image / 10 * ratio},
        image_tokens=torch.full((B,), 10),
        region_tokens=torch.ones(B, dtype=torch.long),
        is_padding=torch.zeros(B, dtype=torch.bool),
        uid=("a", "b", "a", "b"),
    )


@contextmanager
def context(method: RegionMethod, statistics: Signals, norm_by_std: bool = True) -> Iterator[AdvantageContext]:
    opened = AdvantageContext(method, statistics, norm_by_std, spread_floor=None)
    token = CURRENT.set(opened)
    try:
        yield opened
    finally:
        CURRENT.reset(token)


UID = np.array(["a", "b", "a", "b"], dtype=object)
REWARDS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_the_estimator_at_weight_zero_is_verls_grpo_bit_for_bit(norm_by_std):
    with context(RegionMethod(weight=0.0), signals(MASK), norm_by_std) as opened:
        ours, returns = make_estimator("attn_region")(REWARDS.clone(), MASK, config=None, index=UID)
    theirs, _ = compute_grpo_outcome_advantage(REWARDS.clone(), MASK, UID, norm_adv_by_std_in_grpo=norm_by_std)
    assert same_bits(ours, theirs)
    assert same_bits(returns, theirs)
    assert opened.metrics["region_reward/mean"] > 0  # measured and logged all the same


def test_the_estimator_adds_the_region_reward_and_tells_what_it_did():
    kept = REWARDS.clone(), MASK.clone()
    with context(RegionMethod(weight=0.5), signals(MASK)) as opened:
        advantages, returns = make_estimator("attn_region")(REWARDS, MASK, index=UID, unknown_to_us=1)
    r_v = torch.tensor([(x * x - 1) / (x * x + 1) for x in (1.0, 2.0, 3.0, 4.0)])
    assert torch.allclose(opened.reward, REWARDS.sum(-1) + 0.5 * r_v, atol=1e-6)
    expected, _ = compute_grpo_outcome_advantage(opened.reward[:, None].expand(-1, 3) / 3, MASK, UID)
    assert torch.allclose(advantages, expected, atol=1e-5)
    assert opened.metrics["region_reward/mean"] == pytest.approx(r_v.mean().item(), abs=1e-6)
    assert advantages is not returns
    assert advantages.data_ptr() != returns.data_ptr()  # verl edits one of them in place for some settings
    assert torch.equal(advantages, returns)
    assert torch.equal(REWARDS, kept[0])
    assert torch.equal(MASK, kept[1])


def test_the_estimator_counts_tokens_that_are_still_in_the_mask():
    # Rejection after the log-prob pass takes row 0 out: it becomes neutral, and so no longer moves row 2.
    later = MASK.clone()
    later[0] = 0
    with context(RegionMethod(), signals(MASK)) as opened:
        advantages, _ = make_estimator("attn_region")(REWARDS, later, index=UID)
    assert opened.metrics["neutral_rows/masked"] == 1
    assert opened.metrics["rows_with_region_share"] == 0.75
    assert (advantages[0] == 0).all()
    assert opened.reward[0] == REWARDS[0].sum()


def test_the_estimator_is_registered_with_verl():
    import sayo_verl.plugin  # noqa: F401 (what verl loads)

    assert ADV_ESTIMATOR_REGISTRY["attn_region"].__name__ == "attn_region"


def test_an_estimator_without_context_is_refused():
    assert CURRENT.get() is None
    with refusal("A01", "without the attention statistics"):
        make_estimator("attn_region")(REWARDS, MASK, index=UID)


def test_an_estimator_in_the_context_of_another_method_is_refused():
    with context(RegionMethod(), signals(MASK)), refusal("A01", "attn_other"):
        make_estimator("attn_other")(REWARDS, MASK, index=UID)


@pytest.mark.parametrize(("mask", "uid"), [(MASK[:, :2], UID), (MASK, None)], ids=["other mask", "no uid"])
def test_an_estimator_called_with_another_batch_is_refused(mask, uid):
    with context(RegionMethod(), signals(MASK)), refusal("A02"):
        make_estimator("attn_region")(REWARDS[:, : mask.shape[1]], mask, index=uid)


def test_the_estimator_refuses_a_reward_that_is_not_finite():
    poisoned = REWARDS.clone()
    poisoned[1, 2] = NAN
    with context(RegionMethod(), signals(MASK)), refusal("A03"):
        make_estimator("attn_region")(poisoned, MASK, index=UID)


def test_the_estimator_refuses_statistics_that_were_never_computed():
    statistics = signals(MASK)
    statistics[Statistic("region_mass")][2, 1] = NAN
    with context(RegionMethod(), statistics), refusal("A03", "region_mass"):
        make_estimator("attn_region")(REWARDS, MASK, index=UID)


def test_the_estimator_refuses_a_row_without_uid():
    with context(RegionMethod(), signals(MASK)), refusal("A04"):
        make_estimator("attn_region")(REWARDS, MASK, index=np.array(["a", None, "a", "b"], dtype=object))
