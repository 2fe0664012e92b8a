"""Do the light loop and verl agree? Real runs of verl from a start, and the loop's code on verl's own responses.

Each method is trained by ``scripts/run_tiny.sh`` with one update a step, as the loop does. ``verl_batch`` writes what
verl trains on. ``compare`` then starts from the same weights, computes the advantages of the same responses by the
loop's code, and measures the differences. It makes the loop's update, too, and so follows verl from step to step. Both
policies have the same weights at step 1. Later they drift apart, because AdamW enlarges the rounding of gradients.

A method can enlarge a difference of the last digits of what it reads. Ranks, thresholds and clusters are not
continuous, and a group's rewards are divided by their spread, which is small where only a reward term tells them apart.
So the method also computes the advantages from what verl measured (``from_verls_signals``). If that is 0, the
arithmetic agrees, and the rest is rounding of the two forward passes.

Shape suffixes: N rows (n responses of each prompt, side by side), T response tokens (padded on the right).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.yardstick.known import METHODS
from benchmarks.yardstick.loop import (
    LoopConfig,
    Rollouts,
    credit_of,
    loss_of,
    measured,
    method_of,
    optimizer_of,
    train,
    update,
)
from benchmarks.yardstick.policy import WalkPolicy
from benchmarks.yardstick.starts import SCENES, load_start
from benchmarks.yardstick.verl_runs import ROWS, AgreeConfig, train_on_verl, validation, walks_of
from benchmarks.yardstick.warmup import Log, evaluate
from sayo_verl.hooks.estimator import timed_credit
from sayo_verl.methods import Method, Signals, advantages
from sayo_verl.methods.group import group_rows
from sayo_verl.scenes.walk import Walk
from sayo_verl.tiny.prepared import content_hash, prepare_walks

TOLERANCE = 1e-5  # of advantages, which are about 1
SAME = 1e-3  # of what both measured; float32 passes differ by about 1e-5. Of indices: the share that may differ
INDICES = ("neighbour_index", "top_patch_index")


def rollouts_of(
    policy: WalkPolicy, batch: Mapping[str, Any], walks: Mapping[str, Walk]
) -> tuple[Rollouts, torch.Tensor]:
    """verl's responses as rollouts of the loop.

    Returns:
        The rollouts, and the number of verl's row for each of theirs.

    Raises:
        ValueError: a row that is not among ``walks``, groups of different sizes or of several rows, or a prompt, mask,
            reward or mark that is not what the loop has for the same response.
    """
    groups = group_rows(batch["uid"])
    _same({len(group) for group in groups} == {len(groups[0])}, "groups of different sizes", batch)
    ids = [{batch["id"][row] for row in group} for group in groups]
    _same(all(len(names) == 1 for names in ids), "a group of several rows", batch)
    names = [names.pop() for names in ids]
    missing = sorted(set(names) - walks.keys())
    _same(not missing, f"rows {missing} are not among the walks", batch)
    order = [row for group in groups for row in group]
    prompts = policy.prompts([walks[name] for name in names])
    n = len(groups[0])
    same_prompts = all(
        torch.equal(batch["prompts"][row].long(), prompts.ids[place // n]) for place, row in enumerate(order)
    )
    _same(same_prompts, "a prompt of other tokens", batch)
    mask_NT = batch["response_mask"][order].float()
    ids_NT = batch["responses"][order].long().masked_fill(mask_NT == 0, policy.pad)
    _same(torch.equal(policy.mask(ids_NT), mask_NT), "another response mask", batch)
    truths = policy.truths(prompts.walks, ids_NT)
    reward_N = torch.tensor([float(truth.rewarded) for truth in truths])
    _same(torch.equal(batch["reward"][order].float(), reward_N), "another reward", batch)
    marks = [batch["reports"][row].get("walk_marks") for row in order]
    _same(marks == [truth.marks for truth in truths], "other marks", batch)
    uid = tuple(batch["uid"][row] for row in order)
    return Rollouts(prompts, ids_NT, mask_NT, truths, reward_N, uid), torch.tensor(order)


def _same(condition: bool, what: str, batch: Mapping[str, Any]) -> None:
    if not condition:
        raise ValueError(f"step {batch['step']} of verl has {what}")


def compare(
    policy: WalkPolicy, method: Method | None, batch: Mapping[str, Any], walks: Mapping[str, Walk]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Differences of a step of verl from the loop on the same responses.

    Args:
        policy: with the weights that the loop has before this step.
        method: of the run; None for GRPO.
        batch: of ``verl_batch``.
        walks: of ``walks_of``.

    Returns:
        The largest absolute differences, and the loop's loss, with its gradient. ``tokens_over`` and ``rows_over``
        count differences of advantages over ``TOLERANCE``. ``size`` is verl's largest advantage, ``from_grpo`` how far
        the method takes one from GRPO's, ``contrast`` the number of groups that have any. ``shaped_reward`` is of the
        reward with its terms, ``spread`` the deviation of that reward in the group with the largest difference.

    Raises:
        ValueError: as ``rollouts_of``.
    """
    rollouts, order = rollouts_of(policy, batch, walks)
    mask_NT = rollouts.mask.bool()
    log_probs_NT, entropy_NT = policy.log_probs(rollouts.prompts, rollouts.ids)
    credit = credit_of(policy, method, rollouts, log_probs_NT, entropy_NT, batch["step"])
    advantage_NT, shaped_N = advantages(rollouts.reward, rollouts.mask, rollouts.uid, credit)
    verls_NT = batch["advantages"][order]
    off_NT = (advantage_NT - verls_NT).abs()
    over_NT = off_NT > TOLERANCE
    found = {
        "step": batch["step"],
        "reward": float(rollouts.reward.mean()),
        "advantages": float(off_NT.max()),
        "log_probs": _largest(log_probs_NT, batch["old_log_probs"][order], mask_NT),
        "entropy": _largest(entropy_NT, batch["entropy"][order], mask_NT),
        "tokens": int(mask_NT.sum()),
        "tokens_over": int(over_NT.sum()),
        "rows": len(off_NT),
        "rows_over": int(over_NT.any(1).sum()),
        "size": float(verls_NT.abs().max()),
        "from_grpo": float((verls_NT - advantages(rollouts.reward, rollouts.mask, rollouts.uid)[0]).abs().max()),
        "contrast": sum(bool(verls_NT[rows].any()) for rows in group_rows(rollouts.uid)),
    }
    if method is not None:
        theirs: Signals = batch["signals"]
        made, shaped = advantages(batch["reward"], theirs.response_mask, theirs.uid, timed_credit(method, theirs)[0])
        found["from_verls_signals"] = float((made - batch["advantages"]).abs().max())
        found["shaped_reward"] = float((shaped_N - shaped[order]).abs().max())
        worst = rollouts.uid[int(off_NT.max(1).values.argmax())]
        found["spread"] = float(shaped_N[[row for row, uid in enumerate(rollouts.uid) if uid == worst]].std())
        ours = measured(policy, method.needs(), rollouts, log_probs_NT, entropy_NT, batch["step"])
        found["signals"] = _signals(ours, theirs, order)
    return found, loss_of(advantage_NT, log_probs_NT, rollouts.mask)


def _signals(ours: Signals, theirs: Signals, order: torch.Tensor) -> dict[str, float]:
    """Name of each statistic and intervention -> the largest absolute difference on response tokens.

    Of a statistic of indices: the share that differ.
    """
    mask_NT, found = ours.response_mask.bool(), {}
    for statistic, values in ours.statistics.items():
        both = values, theirs[statistic][order]
        if statistic.name in INDICES:
            found[statistic.key] = float((both[0] != both[1])[mask_NT].float().mean())
        else:
            found[statistic.key] = _largest(*both, mask_NT)
    for change, values in ours.counterfactuals.items():
        found[change.key] = _largest(values, theirs.counterfactual(change)[order], mask_NT)
    return found


def _largest(ours: torch.Tensor, theirs: torch.Tensor, mask_NT: torch.Tensor) -> float:
    return float((ours.detach() - theirs)[mask_NT].abs().max())


def agree(
    start: Path, name: str, batches: Sequence[Mapping[str, Any]], rows: Path, config: AgreeConfig
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Follow a run of verl: the loop updates its own policy on verl's responses.

    Returns:
        ``compare`` of every step; and, if verl validated, accuracy of the loop's policy on the same held-out walks
        before and after, in the form of ``validation``.
    """
    policy, _ = load_start(start)
    method, walks, out = method_of(LoopConfig(method=name)), walks_of(rows), []
    held_out = walks_of(rows, "val") if config.validate else {}
    before = _accuracy(policy, held_out, 0)
    loop = LoopConfig(method=name, rate=config.rate)
    optimizer = optimizer_of(policy, loop)
    for batch in batches:
        found, loss = compare(policy, method, batch, walks)
        update(policy, optimizer, loss, loop)
        out.append(found)
    return out, [before, _accuracy(policy, held_out, len(batches))] if held_out else []


def _accuracy(policy: WalkPolicy, walks: Mapping[str, Walk], step: int) -> dict[str, float]:
    """Greedy, by data source, as verl validates."""
    kinds: dict[str, list[Walk]] = {}
    for name, walk in walks.items():
        kinds.setdefault("sayo/" + name.split("-")[0], []).append(walk)
    return {"step": step, **{kind: evaluate(policy, of_kind, None)["acc"] for kind, of_kind in kinds.items()}}


def own_rollouts(start: Path, name: str, config: AgreeConfig, log: Log) -> dict[str, Any]:
    """The loop with rollouts of its own, as many steps at the same rate: accuracy before and after, and rewards."""
    loop = LoopConfig(method=name, rate=config.rate, steps=config.steps, eval_every=config.steps)
    found = train(*load_start(start), loop, log)
    return {name: found[name] for name in ("curve", "rewards")}


def verdict(first: Mapping[str, Any]) -> str:
    """What step 1 says, in words."""
    if first["advantages"] <= TOLERANCE:
        return "agrees"
    measured = {"log_probs": first["log_probs"], "entropy": first["entropy"], **first.get("signals", {})}
    if apart := [name for name, value in measured.items() if value > SAME]:
        return f"differs: {', '.join(apart)} are not the same in both"
    if first.get("from_verls_signals", 1.0) <= TOLERANCE:
        return (
            "agrees up to rounding: from what verl measured the method makes verl's advantages. What the two forward "
            "passes measured differs in the last digits, which the method enlarges: by a rank, threshold or cluster, "
            f"or by the division by a group's spread, here {first['spread']:.1e} where the difference is largest"
        )
    return "differs: the same signals, but other advantages"


def agree_all(start: Path, methods: Sequence[str], out: Path, config: AgreeConfig, log: Log = print) -> None:
    """Run and compare each method, and write ``out/<method>.json``."""
    rows = prepare_walks(out / "rows", replace(SCENES, **ROWS)).path
    for name in methods:
        method = method_of(LoopConfig(method=name))
        settings = {} if method is None else asdict(method)  # type: ignore[call-overload]
        made_with = {"method": name, "settings": settings, "start": start.name, **asdict(config)}
        folder = out / "runs" / f"{name}-{content_hash(made_with, rows.name)}"
        batches = train_on_verl(start, name, rows, folder, config)
        steps, followed = agree(start, name, batches, rows, config)
        found = {
            **made_with,
            "verdict": verdict(steps[0]),
            "steps_of_verl": steps,
            "validation": validation(folder),
            "validation_of_loop": followed,
            "loop": own_rollouts(start, name, config, log) if config.validate else {},
        }
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        log(table([found]))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Step 1 of each method as Markdown."""
    columns = (
        "advantages",
        "from_verls_signals",
        "log_probs",
        "tokens_over",
        "size",
        "from_grpo",
        "contrast",
        "reward",
    )
    lines = ["| " + " | ".join(["method", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for found in results:
        first = found["steps_of_verl"][0]
        cells = [f"{first[name]:.3g}" if name in first else "-" for name in columns]
        lines.append("| " + " | ".join([found["method"], *cells]) + " |")
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    """The command ``agree``."""
    command = commands.add_parser("agree", help="compare the loop with verl on verl's own responses")
    command.add_argument("--start", type=Path, required=True, help="a folder that `start` made")
    command.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    command.add_argument("--steps", type=int, default=AgreeConfig.steps)
    command.add_argument("--rate", type=float, default=AgreeConfig.rate)
    command.add_argument("--validate", action="store_true", help="answer held-out walks before and after")
    command.add_argument("--out", type=Path, required=True)


def from_arguments(given: argparse.Namespace) -> None:
    """Run the command, and print the table of all results in its folder."""
    start, out = given.start.resolve(), given.out.resolve()
    agree_all(start, given.methods, out, AgreeConfig(given.steps, given.rate, given.validate))
    print(table([json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]))
