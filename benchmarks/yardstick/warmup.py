"""Supervised warm-up of the walking policy, and the rule that chooses where reinforcement learning starts.

First the vision tower learns to say, at each visual token, the words of its cell's name and of its arrow. How long it
learns decides how much the policy can see. Then the text model learns from demonstrations while the vision tower is
frozen, so that what the policy cannot see yet is left to reinforcement learning, which trains all weights. The
demonstrations have slips, so that a warmed-up policy also errs where it sees.

Shape suffixes: B walks, T response tokens, V visual tokens of an image, D hidden size, W vocabulary.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.yardstick.policy import WalkPolicy
from sayo_verl.scenes.walk import Walk, WalkConfig, demonstration, sample_walk
from sayo_verl.scenes.walk_truth import ANSWER, COMMA, DIRECTIONS, FILLERS, cell_names

Rates = dict[str, float]
Log = Callable[[str], None]


@dataclass(frozen=True)
class WarmupConfig:
    """Settings of the warm-up.

    Attributes:
        align_steps, align_batch, align_rate: of the vision tower alone; AdamW.
        steps, batch, rate: of the text model, at most; AdamW.
        rise: steps in which the learning rate rises.
        slip: share of directions that a demonstration replaces by random ones.
        forbid_weight, forbid_log_prob: weight and limit, in nats, of the loss on the total log-prob of all tokens that
            are no words of a response. Such a token would be read as several words or none.
        eval_every, eval_scenes: steps between checkpoints, held-out scenes at each.
        seed: of weights and demonstrations.
    """

    align_steps: int = 300
    align_batch: int = 16
    align_rate: float = 6e-3
    steps: int = 400
    batch: int = 64
    rate: float = 1.5e-3
    rise: int = 50
    slip: float = 0.4
    forbid_weight: float = 0.01
    forbid_log_prob: float = -30.0
    eval_every: int = 25
    eval_scenes: int = 512
    seed: int = 0


def walks_of(stream: str, count: int, scenes: WalkConfig, **kind: bool) -> list[Walk]:
    """Walks of a named random stream; ``kind``: as ``sample_walk``."""
    rng = random.Random(stream)
    return [sample_walk(rng, scenes, **kind) for _ in range(count)]


def held_out(count: int, scenes: WalkConfig, **kind: bool) -> list[Walk]:
    """The walks of all evaluations; neither warm-up nor training draws from their stream."""
    return walks_of("held-out", count, scenes, **kind)


def align(policy: WalkPolicy, scenes: WalkConfig, config: WarmupConfig, log: Log = print) -> None:
    """Train the vision tower in place: visual token v says embedding(name of cell v) + embedding(its arrow)."""
    table = policy.text.embed_tokens.weight.detach()
    names_VD = table[[policy.ids[name] for name in cell_names(scenes.grid)]]
    arrows_4D = table[[policy.ids[word] for word in DIRECTIONS]]
    optimizer = torch.optim.AdamW(policy.vision.parameters(), lr=config.align_rate)
    for step in range(config.align_steps):
        for group in optimizer.param_groups:  # rises for 20 steps and falls to a twentieth
            group["lr"] = config.align_rate * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / config.align_steps)
        walks = walks_of(f"align/{config.seed}/{step}", config.align_batch, scenes)
        arrows_BV = torch.tensor([walk.directions for walk in walks])
        pixels = policy.processor.image_processor([walk.image for walk in walks], return_tensors="pt")
        said_BVD = policy.see(pixels["pixel_values"], pixels["image_grid_thw"])[0].unflatten(0, arrows_BV.shape)
        loss = torch.nn.functional.mse_loss(said_BVD, names_VD + arrows_4D[arrows_BV]) / table.var()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.vision.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = ((said_BVD @ arrows_4D.T).argmax(-1) == arrows_BV).float().mean()
            log(f"vision tower {step + 1}: loss {loss.item():.3f}, arrows {right:.3f}")


@torch.no_grad()
def evaluate(policy: WalkPolicy, walks: Sequence[Walk], seed: int | None = 0) -> Rates:
    """Shares of walks: ``acc``, ``format``, ``clean`` (no wrong word). Right words: ``look``, ``text``.

    Args:
        seed: of sampling at temperature 1; None: greedy.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids_BT = policy.sample(policy.prompts(walks), 1, longest(walks[0].steps), generator)
    truths = policy.truths(walks, ids_BT)
    words = [pair for truth in truths for pair in zip(truth.perceptual, truth.right, strict=True)]
    looks, text = ([right for seen, right in words if seen is kind] for kind in (True, False))
    clean = [truth.readable and truth.first_error == len(truth.kinds) for truth in truths]
    lists = {"acc": [t.rewarded for t in truths], "format": [t.readable for t in truths], "clean": clean,
             "look": looks, "text": text}  # fmt: skip
    return {name: sum(values) / max(len(values), 1) for name, values in lists.items()}


def longest(steps: int) -> int:
    """Tokens of a response, with room for two words too many."""
    return 4 * steps + 5


def warm_up(
    policy: WalkPolicy, scenes: WalkConfig, config: WarmupConfig, log: Log = print
) -> Iterator[tuple[int, Rates, Rates]]:
    """Train the text model in place; yield the step and its sampled and greedy rates every ``eval_every`` steps."""
    rng = random.Random(f"warm-up/{config.seed}")
    walks = held_out(config.eval_scenes, scenes)
    trained = [*policy.text.parameters(), *policy.model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.rate, betas=(0.9, 0.98), weight_decay=0.01)
    said = (*FILLERS, *cell_names(scenes.grid), *DIRECTIONS, COMMA, ANSWER)
    words_of_responses = {policy.end, *(policy.ids[word] for word in said)}
    forbidden = [i for i in range(len(policy.words)) if i not in words_of_responses]
    start = time.perf_counter()
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, step / config.rise)
        batch = [sample_walk(rng, scenes) for _ in range(config.batch)]
        ids_BT = policy.encode([demonstration(walk, rng, config.slip) for walk in batch])
        log_p_BTW = policy.log_p(policy.prompts(batch), ids_BT)
        loss = -log_p_BTW.gather(-1, ids_BT[..., None]).mean()
        excess = (log_p_BTW[..., forbidden].logsumexp(-1) - config.forbid_log_prob).clamp(min=0).mean()
        optimizer.zero_grad()
        (loss + config.forbid_weight * excess).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % config.eval_every == 0:
            sampled, greedy = evaluate(policy, walks), evaluate(policy, walks, None)
            shown = " ".join(f"{name} {rate:.3f}" for name, rate in sampled.items())
            seconds = time.perf_counter() - start
            shown += f", greedy {greedy['acc']:.3f} {greedy['look']:.3f}"
            log(f"warm-up {step}: {seconds:.0f} s, loss {loss.item():.3f}, {shown}")
            yield step, sampled, greedy
