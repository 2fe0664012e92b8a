"""The yardstick's policy and loop: batched passes against the plain model, credit against the package, repetition."""

import dataclasses
import json
import random
import re

import pytest
import torch
from support.refusals import refusal

from benchmarks.yardstick import learning, loop, starts
from benchmarks.yardstick.loop import LoopConfig, credit_of, method_of, roll_out, train
from benchmarks.yardstick.plan import Plan, train_once
from benchmarks.yardstick.policy import WalkPolicy, new_policy
from benchmarks.yardstick.probed import cell_masses
from benchmarks.yardstick.probed import signals as signals_of
from benchmarks.yardstick.starts import SCENES as SCENES_OF_STARTS
from benchmarks.yardstick.starts import STARTS, Start, load_start, make_start
from benchmarks.yardstick.warmup import WarmupConfig, align, evaluate, held_out, warm_up
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


def test_the_cached_pass_equals_the_pass_ofwhole_rows_and_the_plain_model(policy):
    prompts, ids, _ = demonstrations(policy, 2, 0.5)
    log_probs, entropy = policy.log_probs(prompts, ids)
    whole, whole_entropy = policy.whole_rows(prompts, ids, prompts.pixels)
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
    signals = signals_of(
        policy,
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
    cells = cell_masses(policy, prompts, ids, [1])[1]
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


def test_untrained_methods_have_the_credit_of_grpo_on_the_scenes_of_the_starts(policy):
    """The boxes of a walk cover 12 of 16 cells, so Evidence-RL finds no other regions of their size."""
    config = LoopConfig(prompts=2, responses=2)
    rollouts = rewarded(roll_out(policy, SCENES_OF_STARTS, config, random.Random(0), torch.Generator().manual_seed(0)))
    measured = [each.detach() for each in policy.log_probs(rollouts.prompts, rollouts.ids)]
    grpo, _ = advantages(rollouts.reward, rollouts.mask, rollouts.uid, None)
    assert [name for name in Plan.methods if name in Plan.untrained] == ["evidence"]
    credit = credit_of(policy, method_of(LoopConfig(method="evidence")), rollouts, *measured, 0)
    assert not credit.terms[0].valid.any()
    assert torch.equal(advantages(rollouts.reward, rollouts.mask, rollouts.uid, credit)[0], grpo)


def test_alignment_trains_the_vision_tower_alone_and_the_warm_up_the_text_model_alone():
    policy = new_policy()
    before, seeing = ([p.detach().clone() for p in part.parameters()] for part in (policy.text, policy.vision))

    def same(part, values):
        return [torch.equal(p, value) for p, value in zip(part.parameters(), values, strict=True)]

    config = WarmupConfig(align_steps=2, steps=2, batch=4, eval_every=1, eval_scenes=4)
    align(policy, SCENES, config, quiet)
    assert all(same(policy.text, before))
    assert not all(same(policy.vision, seeing))
    seeing = [p.detach().clone() for p in policy.vision.parameters()]
    steps = list(warm_up(policy, SCENES, config, quiet))
    assert [step for step, _, _ in steps] == [1, 2]
    assert all(0 <= rate <= 1 for _, sampled, greedy in steps for rate in (*sampled.values(), *greedy.values()))
    assert not all(same(policy.text, before))
    assert all(same(policy.vision, seeing))


def test_a_start_is_the_first_checkpoint_that_fits_the_rule_and_loads_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(starts.STARTS, "any", Start(1, lambda sampled, greedy: True, "any"))
    monkeypatch.setitem(starts.STARTS, "none", Start(1, lambda sampled, greedy: False, "nothing"))
    config = WarmupConfig(steps=2, batch=2, eval_every=1, eval_scenes=2)
    folder = make_start(tmp_path, "any", 3, SCENES, config, quiet)
    assert make_start(tmp_path, "any", 3, SCENES, config, quiet) == folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["rule"], len(manifest["history"]), manifest["policy"]["seed"]) == ("any", 1, 3)
    policy, scenes = load_start(folder)
    assert scenes == SCENES
    walks = held_out(2, SCENES)
    assert evaluate(policy, walks) == manifest["history"][0]["sampled"]
    with refusal("T01"):
        make_start(tmp_path, "none", 3, SCENES, config, quiet)


def test_half_ignorant_and_knowing_are_what_the_rule_says():
    half, knowing = STARTS["half_ignorant"].rule, STARTS["knowing"].rule
    assert half({"look": 0.60}, {"acc": 0.35})
    assert not half({"look": 0.59}, {"acc": 0.45})
    assert not half({"look": 0.65}, {"acc": 0.61})
    assert knowing({"look": 0.1}, {"acc": 0.85})
    assert not knowing({"look": 0.9}, {"acc": 0.84})


def run(method, seed, rate, accuracies):
    curve = [{"step": 10 * i, "acc": acc, "look": 0.5, "text": 1.0} for i, acc in enumerate(accuracies)]
    return {"start": "s", "method": method, "seed": seed, "rate": rate, "curve": curve, "greedy": {"acc": 0.5},
            "seconds": 0.7}  # fmt: skip


def test_the_span_is_counted_from_the_best_rate_of_grpo():
    runs = [
        run("grpo", 0, 1e-4, [0.2, 0.25, 0.3, 0.3, 0.3]),
        run("grpo", 0, 3e-4, [0.2, 0.2, 0.1, 0.1, 0.1]),
        run("oracle_plus", 0, 3e-4, [0.2, 0.4, 0.4, 0.4, 0.4]),
    ]
    assert learning.best_rates(runs) == {"grpo": 1e-4, "oracle_plus": 3e-4}
    assert learning.final(runs[0]) == pytest.approx(0.3)
    assert learning.smoothed(runs[2])[:2] == [(0, pytest.approx(0.3)), (10, pytest.approx(1 / 3))]
    assert learning.steps_to(runs[2], 0.3) == 10
    assert learning.steps_to(runs[1], 0.3) is None


def test_a_finished_run_is_kept_with_its_settings_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setitem(starts.STARTS, "any", Start(1, lambda sampled, greedy: True, "any"))
    config = WarmupConfig(steps=1, batch=2, eval_every=1, eval_scenes=2)
    start = make_start(tmp_path, "any", 0, SCENES, config, quiet)
    stored = train_once(start, SMALL, tmp_path / "runs")
    assert (stored["start"], stored["method"], stored["rate"]) == (start.name, "grpo", SMALL.rate)
    assert [point["step"] for point in stored["curve"]] == [0, 2]
    (path,) = (tmp_path / "runs").iterdir()
    before = path.stat().st_mtime_ns
    assert train_once(start, SMALL, tmp_path / "runs") == stored
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_registered_method_trains_a_step(method, random_rewards):
    if method == "attn_anchor":
        pytest.importorskip("pymetis")
    result, _ = trained(method=method, steps=1)
    assert len(result["rewards"]) == 1
