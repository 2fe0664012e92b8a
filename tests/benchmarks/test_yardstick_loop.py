"""The yardstick's policy and loop: batched passes against the plain model, credit against the package, repetition."""

import dataclasses
import random
import re

import pytest
import torch

from benchmarks.yardstick import loop
from benchmarks.yardstick.loop import LoopConfig, credit_of, method_of, roll_out, train
from benchmarks.yardstick.policy import WalkPolicy, new_policy
from benchmarks.yardstick.warmup import WarmupConfig, align, demonstrated, held_out, warm_up
from sayo_verl.methods import METHODS, advantages
from sayo_verl.reward import compute_score
from sayo_verl.scenes.walk import WalkConfig, demonstration

SCENES = WalkConfig(steps=3, more_steps=0)
SMALL = LoopConfig(steps=2, prompts=2, responses=4, eval_every=2, eval_scenes=4, rate=1e-3)
quiet = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def policy() -> WalkPolicy:
    return new_policy()


def demonstrations(policy, n: int, slip: float):
    """Prompts, ids of n responses to each, and their words."""
    rng, walks = random.Random(0), held_out(2, SCENES)
    words = [demonstration(walk, rng, slip) for walk in walks for _ in range(n)]
    return policy.prompts(walks), policy.encode(words), words


def test_a_word_is_a_token_and_the_truth_is_that_of_the_reward_function(policy):
    prompts, ids, words = demonstrations(policy, 4, 0.5)
    assert ids.shape == (8, 4 * SCENES.steps + 3)
    assert [[policy.words[i] for i in row[:-1]] for row in ids.tolist()] == words
    for row, truth in enumerate(policy.truths(prompts.walks, ids)):
        walk = prompts.walks[row // 4]
        text = policy.processor.tokenizer.decode(ids[row], skip_special_tokens=True)
        extra = {"walk": {"grid": 4, "start": walk.start, "directions": list(walk.directions), "steps": 3, "moves": []}}
        judged = compute_score("sayo/walk", text, walk.answer, extra)
        assert (judged["acc"], judged["walk_marks"]) == (float(truth.rewarded), truth.marks)


def test_the_cached_pass_equals_the_pass_of_whole_rows_and_the_plain_model(policy):
    prompts, ids, _ = demonstrations(policy, 2, 0.5)
    log_probs, entropy = policy.log_probs(prompts, ids)
    whole, whole_entropy = policy._whole_rows(prompts, ids, prompts.pixels)
    torch.testing.assert_close(log_probs, whole, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, whole_entropy, atol=2e-5, rtol=0)
    row = torch.cat([prompts.ids[1], ids[2]])[None]
    types = torch.nn.functional.pad(prompts.types[1:2], (0, ids.shape[1]))
    logits = policy.model(
        input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=types, **prompts.row(1)
    ).logits
    plain = logits[0, prompts.ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[2][:, None])[:, 0]
    torch.testing.assert_close(log_probs[2], plain, atol=2e-5, rtol=0)


def test_samples_have_the_probability_that_the_policy_gives_them(policy):
    """The first token of many samples against its distribution, and greedy against the highest log-prob."""
    prompts = policy.prompts(held_out(1, SCENES))
    ids = policy.sample(prompts, 4000, 1, torch.Generator().manual_seed(0))
    log_p = policy.log_p(prompts, ids[:1].repeat(1, 2))[0, 0]
    counts = torch.bincount(ids[:, 0], minlength=len(log_p)) / len(ids)
    assert (counts - log_p.exp()).abs().max() < 0.03
    assert policy.sample(prompts, 1, 1)[0, 0] == log_p.argmax()


def test_a_response_ends_at_its_end_token_and_is_padded(policy):
    ids = torch.tensor([[policy.ids["so"], policy.end, policy.pad], [policy.ids["so"], policy.ids["a1"], policy.end]])
    assert policy.mask(ids).tolist() == [[1, 1, 0], [1, 1, 1]]


def test_masses_of_cells_add_up_to_that_of_the_image(policy):
    from sayo_verl.methods.signals import Needs
    from sayo_verl.probe.statistics import Statistic, StatisticsRequest

    prompts, ids, _ = demonstrations(policy, 2, 0.5)
    image = Statistic("image_mass", (1,), query_row="predicting")
    log_probs, entropy = policy.log_probs(prompts, ids)
    signals = policy.signals(
        prompts,
        ids,
        Needs(StatisticsRequest((image,))),
        log_probs=log_probs,
        entropy=entropy,
        uid=("a", "a", "b", "b"),
        correct=torch.zeros(4),
        reports={},
    )
    signals.check()
    cells = policy.cell_masses(prompts, ids, [1])[1]
    assert cells.shape == (*ids.shape, 16)
    torch.testing.assert_close(cells.sum(-1), signals[image], atol=1e-5, rtol=0)


def rewarded(rollouts, seed: int = 0):
    """The same rollouts with random rewards: an untrained policy earns none."""
    generator = torch.Generator().manual_seed(seed)
    return dataclasses.replace(rollouts, reward=torch.randint(0, 2, rollouts.reward.shape, generator=generator).float())


@pytest.fixture
def random_rewards(monkeypatch):
    monkeypatch.setattr(loop, "roll_out", lambda *args: rewarded(roll_out(*args)))


def trained(**changes):
    policy = new_policy()
    result = train(policy, SCENES, dataclasses.replace(SMALL, **changes), quiet)
    return result, policy.model.state_dict()


def test_a_run_repeats_with_its_seed_and_another_seed_is_another_run(random_rewards):
    (first, weights), (again, weights_again) = trained(), trained()
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    other = trained(seed=1)[1]
    assert not all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.parametrize("method", sorted(name for name, cls in METHODS.items() if "strength" in cls.__annotations__))
def test_a_method_of_zero_strength_trains_as_grpo_bit_for_bit(method, random_rewards):
    grpo, weighted = trained()[1], trained(method=method, settings={"strength": 0.0})[1]
    assert all(torch.equal(grpo[name], weighted[name]) for name in grpo)


def test_the_advantages_of_grpo_are_those_of_verl(policy):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rollouts = rewarded(roll_out(policy, SCENES, SMALL, random.Random(0), torch.Generator().manual_seed(0)))
    ours, _ = advantages(rollouts.reward, rollouts.mask, rollouts.uid, None)
    token_rewards = torch.zeros_like(rollouts.mask)
    token_rewards[:, 0] = rollouts.reward
    import numpy as np

    verls, _ = core_algos.compute_grpo_outcome_advantage(token_rewards, rollouts.mask, np.array(rollouts.uid))
    assert torch.equal(ours, verls)


def test_oracle_plus_moves_only_right_looks_and_the_first_error(policy):
    prompts, ids, _ = demonstrations(policy, 4, 0.5)
    truths = policy.truths(prompts.walks, ids)
    reward = torch.tensor([float(truth.rewarded) for truth in truths])
    assert 0 < reward.mean() < 1
    uid = tuple(f"walk-{row // 4}" for row in range(8))
    rollouts = loop.Rollouts(prompts, ids, policy.mask(ids), truths, reward, uid)
    credit = credit_of(
        policy, method_of(LoopConfig(method="oracle_plus")), rollouts, *policy.log_probs(prompts, ids), 0
    )
    advantage, _ = advantages(reward, rollouts.mask, uid, credit)
    size = advantages(reward, rollouts.mask, uid)[0].abs()
    for row, truth in enumerate(truths):
        signs = "".join("+" if value > 0 else "-" if value < 0 else "." for value in advantage[row].tolist())
        before = re.sub("[^P]", ".", truth.marks[: truth.first_error]).replace("P", "+")
        wanted = (before + ("-" if truth.first_error < len(truth.marks) else "")).ljust(ids.shape[1], ".")
        assert signs == (wanted if size[row].any() else "." * ids.shape[1])


def test_arrows_of_unread_colours_are_guessed_and_others_are_read():
    (walk,) = held_out(1, SCENES)
    config = WarmupConfig(slip=0.0, unread=(0,))
    rng, seen = random.Random(0), {True: set(), False: set()}
    for colour in (0, 1):
        painted = dataclasses.replace(walk, colours=(colour,) * 16)
        for _ in range(50):
            seen[colour == 0].add(demonstrated(painted, rng, config)[2])
    assert (len(seen[True]), len(seen[False])) == (4, 1)


def test_the_warm_up_yields_rates_and_changes_the_policy():
    policy = new_policy()
    before = policy.text.embed_tokens.weight.detach().clone()
    config = WarmupConfig(align_steps=2, steps=2, batch=4, eval_every=1, eval_scenes=4)
    align(policy, SCENES, config, quiet)
    assert torch.equal(before, policy.text.embed_tokens.weight)
    steps = list(warm_up(policy, SCENES, config, quiet))
    assert [step for step, _, _ in steps] == [1, 2]
    assert all(0 <= rate <= 1 for _, sampled, greedy in steps for rate in (*sampled.values(), *greedy.values()))
    assert not torch.equal(before, policy.text.embed_tokens.weight)
