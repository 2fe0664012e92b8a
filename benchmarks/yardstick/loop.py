"""Reinforcement learning of the walking policy in plain torch: the package's probe, methods and group core as they are.

One update a step on fresh rollouts, as GRPO without a KL term: the loss is the mean over tokens of -A log p.

Shape suffixes: B prompts, N = B n rows (n responses of each prompt), T response tokens (padded on the right).
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.yardstick.policy import Prompts, WalkPolicy
from benchmarks.yardstick.probed import signals as signals_of
from benchmarks.yardstick.warmup import Rates, evaluate, held_out, longest
from sayo_verl.hooks.estimator import timed_credit
from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import METHODS, Credit, Method, Needs, Signals, advantages
from sayo_verl.scenes.walk import WalkConfig, sample_walk
from sayo_verl.scenes.walk_truth import Truth

BASELINE = "grpo"
TITLES = {"grpo": "GRPO", "oracle": "oracle: blame", "oracle_plus": "oracle_plus: blame and praise"}
ROOT = Path(__file__).resolve().parents[2]
RECIPES = [ROOT / "recipe" / name for name in ("oracle/oracle.py", "controls/controls.py")]
load_methods([str(file) for file in RECIPES])
Log = Callable[[str], None]

# Settings that a claim of a paper or a default of ours is about: name -> (method, settings).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "region_predicting": ("region", {"query_row": "predicting"}),
    "dual_predicting": ("dual", {"query_row": "predicting"}),
    "region_all": ("region", {"layers": (0, 1, 2)}),
    "anchor_all": ("anchor", {"layers": (0, 1, 2)}),
    "anchor_input": ("anchor", {"query_row": "input"}),
    "anchor_top": ("anchor", {"layers": (0, 1, 2), "weighting": "top"}),
    "anchor_rest": ("anchor", {"layers": (0, 1, 2), "weighting": "rest"}),
    "faithful_all": ("faithful", {"layers": (0, 1, 2)}),
}


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a run.

    Attributes:
        method: ``grpo``, a name in ``METHODS`` with or without ``attn_``, or a name in ``VARIANTS``.
        settings: of the method, where they differ from its defaults.
        rate: learning rate, AdamW.
        steps, prompts, responses: steps of prompts x responses rollouts.
        clip: limit of the gradient norm.
        eval_every, eval_scenes: steps between evaluations, held-out scenes in each.
        seed: of scenes and sampling.
    """

    method: str = BASELINE
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1e-4
    steps: int = 100
    prompts: int = 16
    responses: int = 8
    clip: float = 1.0
    eval_every: int = 10
    eval_scenes: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Rollouts:
    """Responses of a step: prompts, ids [N, T], mask [N, T], the truth of each row, rewards [N], and uids."""

    prompts: Prompts
    ids: torch.Tensor
    mask: torch.Tensor
    truths: list[Truth]
    reward: torch.Tensor
    uid: tuple[str, ...]


def method_of(config: LoopConfig) -> Method | None:
    """The method with its settings; None for GRPO."""
    if config.method == BASELINE:
        return None
    base, settings = VARIANTS.get(config.method, (config.method, {}))
    return METHODS["attn_" + base.removeprefix("attn_")](**{**settings, **config.settings})


def names() -> list[str]:
    """Every name that ``LoopConfig.method`` may have, without those with ``attn_``."""
    return [BASELINE, *(name.removeprefix("attn_") for name in sorted(METHODS)), *VARIANTS]


def title(name: str) -> str:
    """The paper's name of a method, as the package gives it, and the settings of a variant; other names as they are."""
    base, settings = VARIANTS.get(name, (name, {}))
    paper, *_ = getattr(METHODS.get(f"attn_{base}"), "reference", (base,))  # a user's method may have none
    given = "".join(f", {'all layers' if key == 'layers' else f'{key} {value}'}" for key, value in settings.items())
    return TITLES.get(name, paper) + given


def roll_out(
    policy: WalkPolicy, scenes: WalkConfig, config: LoopConfig, rng: random.Random, generator: torch.Generator
) -> Rollouts:
    """New walks, and responses to them. The reward is that of ``sayo_verl.reward.walk``."""
    walks = [sample_walk(rng, scenes) for _ in range(config.prompts)]
    prompts = policy.prompts(walks)
    ids_NT = policy.sample(prompts, config.responses, longest(max(walk.steps for walk in walks)), generator)
    truths = policy.truths(walks, ids_NT)
    reward_N = torch.tensor([float(truth.rewarded) for truth in truths])
    uid = tuple(f"walk-{i}" for i in range(config.prompts) for _ in range(config.responses))
    return Rollouts(prompts, ids_NT, policy.mask(ids_NT), truths, reward_N, uid)


def credit_of(
    policy: WalkPolicy,
    method: Method | None,
    rollouts: Rollouts,
    log_probs_NT: torch.Tensor,
    entropy_NT: torch.Tensor,
    step: int,
) -> Credit | None:
    """The method's credit from its own needs; nothing more is measured."""
    if method is None:
        return None
    return timed_credit(method, measured(policy, method.needs(), rollouts, log_probs_NT, entropy_NT, step))[0]


def measured(
    policy: WalkPolicy,
    needs: Needs,
    rollouts: Rollouts,
    log_probs_NT: torch.Tensor,
    entropy_NT: torch.Tensor,
    step: int = 0,
) -> Signals:
    """What a method reads of rollouts."""
    return signals_of(
        policy,
        rollouts.prompts,
        rollouts.ids,
        needs,
        log_probs=log_probs_NT,
        entropy=entropy_NT,
        uid=rollouts.uid,
        correct=rollouts.reward,
        reports={"walk_marks": tuple(truth.marks for truth in rollouts.truths)},
        step=step,
    )


def loss_of(advantage_NT: torch.Tensor, log_probs_NT: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
    """verl's token-mean, with the gradient of PPO at a ratio of 1."""
    return -(advantage_NT * log_probs_NT * mask_NT).sum() / mask_NT.sum()


def optimizer_of(policy: WalkPolicy, config: LoopConfig) -> torch.optim.Optimizer:
    """AdamW with verl's settings, on all weights."""
    return torch.optim.AdamW(policy.model.parameters(), lr=config.rate, betas=(0.9, 0.999), weight_decay=0.01)


def update(policy: WalkPolicy, optimizer: torch.optim.Optimizer, loss: torch.Tensor, config: LoopConfig) -> None:
    """One step of the optimizer."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.clip)
    optimizer.step()


def train(policy: WalkPolicy, scenes: WalkConfig, config: LoopConfig, log: Log = print) -> dict[str, Any]:
    """Train ``policy`` in place.

    Returns:
        ``curve``: rates on held-out scenes by step, sampled at temperature 1; ``rewards``: mean of each step;
        ``greedy``, ``new_pairs``: rates at the end, greedy, and sampled on walks with new pairs of colour and
        direction; ``seconds`` of CPU of a step, without evaluations.
    """
    method = method_of(config)
    rng, generator = random.Random(f"train/{config.seed}"), torch.Generator().manual_seed(config.seed)
    optimizer = optimizer_of(policy, config)
    walks = held_out(config.eval_scenes, scenes)
    curve: list[Rates] = []
    rewards: list[float] = []
    seconds = 0.0
    for step in range(config.steps + 1):
        if step % config.eval_every == 0 or step == config.steps:
            curve.append({"step": step, **evaluate(policy, walks)})
            shown = " ".join(f"{name} {rate:.3f}" for name, rate in curve[-1].items() if name != "step")
            log(f"{config.method} rate {config.rate:g} seed {config.seed} step {step}: {shown}, {seconds:.0f} s")
        if step == config.steps:
            break
        start = time.process_time()
        rollouts = roll_out(policy, scenes, config, rng, generator)
        log_probs_NT, entropy_NT = policy.log_probs(rollouts.prompts, rollouts.ids)
        credit = credit_of(policy, method, rollouts, log_probs_NT, entropy_NT, step)
        advantage_NT, _ = advantages(rollouts.reward, rollouts.mask, rollouts.uid, credit)
        update(policy, optimizer, loss_of(advantage_NT, log_probs_NT, rollouts.mask), config)
        rewards.append(float(rollouts.reward.mean()))
        seconds += time.process_time() - start
    return {
        "curve": curve,
        "rewards": rewards,
        "greedy": evaluate(policy, walks, None),
        "new_pairs": evaluate(policy, held_out(config.eval_scenes, scenes, new_pairs=True)),
        "seconds": seconds / max(config.steps, 1),
    }
