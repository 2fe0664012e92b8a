"""Starts of reinforcement learning: folders of ordinary checkpoints, chosen by a rule that is older than any run.

    half_ignorant   a vision tower that is trained for a short time, so it reads about 90 of 100 arrows; the first
                    checkpoint with right looks >= 0.60 and greedy accuracy in 0.35 to 0.60
    knowing         the same warm-up after a longer training of the vision tower; the first checkpoint with greedy
                    accuracy >= 0.85

The rates are those of the held-out scenes of ``warmup.evaluate``; right looks are sampled at temperature 1. The rule
looks at nothing else, so not at steps or at what training does from there.

The ignorance must be of seeing. Pilot runs (one seed) began with a vision tower that read all arrows, and with
demonstrations that guessed at one of six colours. GRPO then went from 0.20 to 0.87 in 20 steps: it had only one
direction of the weights to find, and uniform credit finds that at once.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from benchmarks.yardstick.policy import POLICY, WalkPolicy, new_policy
from benchmarks.yardstick.warmup import Log, Rates, WarmupConfig, align, warm_up
from sayo_verl.errors import SayoError
from sayo_verl.scenes.walk import WalkConfig
from sayo_verl.tiny.prepared import content_hash, prepare_folder

# arrows with a small head, off the middle, in noise: a vision tower of this size takes long to tell their ends apart
SCENES = WalkConfig(steps=12, more_steps=3, look_alikes=0.3, jitter=3, noise=48)
VERSION = 1  # of what the folders hold


@dataclass(frozen=True)
class Start:
    """A kind of start: steps of its vision tower alone, and the rule that ends its warm-up."""

    align_steps: int
    rule: Callable[[Rates, Rates], bool]  # of sampled and greedy rates
    rule_text: str


STARTS = {
    "half_ignorant": Start(
        450,
        lambda sampled, greedy: sampled["look"] >= 0.60 and 0.35 <= greedy["acc"] <= 0.60,
        "right looks >= 0.60 and greedy accuracy in 0.35 to 0.60",
    ),
    "knowing": Start(2000, lambda sampled, greedy: greedy["acc"] >= 0.85, "greedy accuracy >= 0.85"),
}


def make_start(
    out: Path, kind: str, seed: int, scenes: WalkConfig, config: WarmupConfig | None = None, log: Log = print
) -> Path:
    """``out/<kind>-<seed>-<hash>/``, made unless it is there: model, processor, and ``manifest.json`` with the rates.

    Raises:
        SayoError: T01 if no checkpoint fits the rule.
    """
    start = STARTS[kind]
    config = replace(config or WarmupConfig(), align_steps=start.align_steps, seed=seed)
    architecture = replace(POLICY, seed=seed)

    def build(folder: Path) -> dict[str, Any]:
        policy = new_policy(architecture)
        align(policy, scenes, config, log)
        history = []
        for step, sampled, greedy in warm_up(policy, scenes, config, log):
            history.append({"step": step, "sampled": sampled, "greedy": greedy})
            if start.rule(sampled, greedy):
                policy.model.save_pretrained(folder)
                policy.processor.save_pretrained(folder)
                return {
                    "kind_of_start": kind,
                    "rule": start.rule_text,
                    "policy": asdict(architecture),
                    "warmup": asdict(config),
                    "scenes": asdict(scenes),
                    "history": history,
                }
        raise SayoError(
            "T01",
            "no checkpoint of the warm-up fits the rule of this start",
            where=f"{kind}, seed {seed}",
            got=json.dumps(history[-1]) if history else "no checkpoint",
            wanted=start.rule_text,
            fix="take another seed, or raise WarmupConfig.steps",
        )

    name = content_hash(VERSION, architecture.config_hash(), asdict(config), asdict(scenes), start.rule_text)
    return prepare_folder(out / f"{kind}-{seed}-{name}", "yardstick start", build).path


def is_start(folder: Path | None) -> bool:
    """Whether ``make_start`` made the folder and gave it its name; True without a folder."""
    if folder is None:
        return True
    manifest = folder / "manifest.json"
    kind = json.loads(manifest.read_text()).get("kind_of_start") if manifest.is_file() else None
    return kind in STARTS and folder.resolve().name.startswith(f"{kind}-")


def greedy_of(folder: Path) -> dict[str, Rates]:
    """Name -> greedy rates of each start in a folder, when its warm-up ended."""
    found = sorted(folder.glob("*/manifest.json"))
    return {path.parent.name: json.loads(path.read_text())["history"][-1]["greedy"] for path in found}


def load_start(folder: Path) -> tuple[WalkPolicy, WalkConfig]:
    """The policy of a start, in float32, and its scenes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    scenes = {**manifest["scenes"], "held_out_pairs": tuple(manifest["scenes"]["held_out_pairs"])}
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    return WalkPolicy(model, AutoProcessor.from_pretrained(folder)), WalkConfig(**scenes)
