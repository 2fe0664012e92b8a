"""Supervised warm-up of the walking policy: words for what its vision tower sees, then demonstrations with slips.

Shape suffixes: B walks, T response tokens, V visual tokens of an image, D hidden size, W vocabulary.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.yardstick.policy import WalkPolicy
from sayo_verl.scenes.walk import Walk, WalkConfig, demonstration, sample_walk
from sayo_verl.scenes.walk_truth import ANSWER, COMMA, DIRECTIONS, FILLERS, cell_names


@dataclass(frozen=True)
class WarmupConfig:
    align_steps: int = 300
    align_batch: int = 16
    align_rate: float = 6e-3
    direction_weight: float = 1.0
    steps: int = 400
    batch: int = 64
    rate: float = 1.5e-3
    slip: float = 0.25
    unread: tuple[int, ...] = ()  # colours whose arrows the demonstrations never read
    forbid_weight: float = 0.01
    forbid_log_prob: float = -30.0
    eval_every: int = 25
    seed: int = 0


def walks_of(stream: str, count: int, config: WalkConfig, **kind: bool) -> list[Walk]:
    rng = random.Random(stream)
    return [sample_walk(rng, config, **kind) for _ in range(count)]


def align(policy: WalkPolicy, scenes: WalkConfig, config: WarmupConfig, log=print) -> None:
    """Teach the vision tower to say, at each visual token, the words of its cell's name and of its arrow."""
    table = policy.text.embed_tokens.weight.detach()
    names_VD = table[[policy._ids[name] for name in cell_names(scenes.grid)]]
    arrows_4D = table[[policy._ids[word] for word in DIRECTIONS]]
    optimizer = torch.optim.AdamW(policy.vision.parameters(), lr=config.align_rate)
    for step in range(config.align_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.align_rate * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / config.align_steps)
        walks = walks_of(f"align/{config.seed}/{step}", config.align_batch, scenes)
        arrows_BV = torch.tensor([walk.directions for walk in walks])
        pixels = policy.processor.image_processor([w.image for w in walks], return_tensors="pt")
        seen = policy.see(pixels["pixel_values"], pixels["image_grid_thw"])[0].unflatten(0, arrows_BV.shape)
        wanted = names_VD + config.direction_weight * arrows_4D[arrows_BV]
        loss = torch.nn.functional.mse_loss(seen, wanted) / table.var()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.vision.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            right = ((seen @ arrows_4D.T).argmax(-1) == arrows_BV).float().mean()
            log(f"align {step + 1} loss {loss.item():.3f} arrows {right:.3f}")


def demonstrated(walk: Walk, rng: random.Random, config: WarmupConfig) -> list[str]:
    """A demonstration in which arrows of the unread colours are guessed."""
    arrows = list(walk.directions)
    for cell, colour in enumerate(walk.colours):
        if colour in config.unread:
            arrows[cell] = rng.randrange(4)
    return demonstration(replace(walk, directions=tuple(arrows)), rng, config.slip)


@torch.no_grad()
def evaluate(policy: WalkPolicy, walks: Sequence[Walk], seed: int | None = 0) -> dict[str, float]:
    """accuracy, right looks, right text, clean walks; sampled at temperature 1, or greedy with seed None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    prompts = policy.prompts(walks)
    truths = policy.truths(walks, policy.sample(prompts, 1, 4 * walks[0].steps + 5, generator))
    looks = [r for t in truths for r, p in zip(t.right, t.perceptual, strict=True) if p]
    text = [r for t in truths for r, p in zip(t.right, t.perceptual, strict=True) if not p]
    clean = [t.readable and t.first_error == len(t.kinds) for t in truths]
    mean = lambda v: sum(v) / max(len(v), 1)  # noqa: E731
    return {"acc": mean([t.rewarded for t in truths]), "look": mean(looks), "text": mean(text), "clean": mean(clean),
            "format": mean([t.readable for t in truths])}


def warm_up(policy: WalkPolicy, scenes: WalkConfig, config: WarmupConfig, held_out, save: Callable, log=print, stop=None):
    rng = random.Random(f"warm-up/{config.seed}")
    model = policy.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.rate, betas=(0.9, 0.98), weight_decay=0.01)
    known = {policy._ids[w] for w in (*FILLERS, *cell_names(scenes.grid), *DIRECTIONS, COMMA, ANSWER)} | {policy.end}
    forbidden = [i for i in range(len(policy.words)) if i not in known]
    start, spent = time.perf_counter(), 0.0
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = config.rate * min(1.0, step / 50)
        walks = [sample_walk(rng, scenes) for _ in range(config.batch)]
        ids_BT = policy.encode([demonstrated(walk, rng, config) for walk in walks])
        prompts = policy.prompts(walks)
        log_p = policy.log_p(prompts, ids_BT)
        excess = (log_p[..., forbidden].logsumexp(-1) - config.forbid_log_prob).clamp(min=0).mean()
        loss = -log_p.gather(-1, ids_BT[..., None]).mean()
        optimizer.zero_grad()
        (loss + config.forbid_weight * excess).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % config.eval_every == 0:
            at = time.perf_counter()
            sampled, greedy = evaluate(policy, held_out), evaluate(policy, held_out, None)
            spent += time.perf_counter() - at
            log(f"warm {step} {time.perf_counter() - start - spent:.0f}s loss {loss.item():.3f} | "
                + " ".join(f"{k} {v:.3f}" for k, v in sampled.items()) + f" | greedy {greedy['acc']:.3f} {greedy['look']:.3f}")
            save(step, sampled, greedy)
            if stop and stop(sampled, greedy):
                break
