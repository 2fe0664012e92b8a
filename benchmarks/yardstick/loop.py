"""Reinforcement learning of the walking policy in plain torch: the package's probe, methods and group core as they are.

Shape suffixes: B prompts, N = B n rows (n responses of each prompt), T response tokens (padded on the right).
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.yardstick.policy import WalkPolicy
from benchmarks.yardstick.warmup import evaluate, walks_of
from sayo_verl.methods.group import advantages
from sayo_verl.scenes.walk import WalkConfig, sample_walk
from sayo_verl.scenes.walk_truth import Truth


@dataclass(frozen=True)
class LoopConfig:
    method: str = "grpo"
    rate: float = 1e-4
    steps: int = 100
    prompts: int = 16
    responses: int = 8
    clip: float = 1.0
    eval_every: int = 10
    eval_scenes: int = 512
    seed: int = 0


def oracle(name: str, advantage_NT: torch.Tensor, truths: list[Truth]) -> torch.Tensor:
    """Own version until the methods are there."""
    out = advantage_NT.clone()
    for row, truth in enumerate(truths):
        a = float(advantage_NT[row, 0])
        if name == "oracle":
            if a < 0:
                out[row] = 0.0
                out[row, truth.first_error] = a
        else:
            out[row] = 0.0
            for t, seen in enumerate(truth.perceptual[: truth.first_error]):
                if seen:
                    out[row, t] = abs(a)
            if truth.first_error < len(truth.kinds) or not truth.readable:
                out[row, min(truth.first_error, out.shape[1] - 1)] = -abs(a)
    return out


def train(policy: WalkPolicy, scenes: WalkConfig, config: LoopConfig, log: Callable = print) -> list[dict]:
    rng = random.Random(f"train/{config.seed}")
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.rate, betas=(0.9, 0.999), weight_decay=0.01)
    held_out = walks_of("held-out", config.eval_scenes, scenes)
    uid = [str(row // config.responses) for row in range(config.prompts * config.responses)]
    curve, seconds = [], 0.0
    for step in range(config.steps + 1):
        if step % config.eval_every == 0:
            curve.append({"step": step, "seconds": seconds, **evaluate(policy, held_out)})
            log(config.method, config.rate, config.seed, " ".join(f"{k} {v:.3f}" for k, v in curve[-1].items()))
        if step == config.steps:
            curve[-1]["greedy"] = evaluate(policy, held_out, None)["acc"]
            break
        start = time.process_time()
        walks = [sample_walk(rng, scenes) for _ in range(config.prompts)]
        prompts = policy.prompts(walks)
        ids_NT = policy.sample(prompts, config.responses, 4 * scenes.steps + 5, generator)
        truths, mask_NT = policy.truths(walks, ids_NT), policy.mask(ids_NT)
        reward_N = torch.tensor([float(t.rewarded) for t in truths])
        advantage_NT, _ = advantages(reward_N, mask_NT, uid)
        if config.method.startswith("oracle"):
            advantage_NT = oracle(config.method, advantage_NT, truths)
        log_probs, _ = policy.log_probs(prompts, ids_NT)
        loss = -(advantage_NT * log_probs * mask_NT).sum() / mask_NT.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.clip)
        optimizer.step()
        seconds += time.process_time() - start
    return curve
