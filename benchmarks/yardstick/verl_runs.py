"""Real runs of verl on walks, with the settings of the light loop, and the rows that they trained on."""

import io
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from PIL import Image

from benchmarks.yardstick.loop import BASELINE, RECIPES, ROOT
from sayo_verl.methods import Signals
from sayo_verl.probe.statistics import Statistic
from sayo_verl.reward.walk import walk_of
from sayo_verl.scenes.walk import Walk
from sayo_verl.scenes.walk_truth import walk_path
from sayo_verl.vision.intervention import Intervention

ROWS = {"n_train": 512, "n_val": 64}
SETTINGS = (  # the loop's: one update a step on 16 prompts x 8 responses, token-mean, no KL, no dynamic sampling
    "data.train_batch_size=16",
    "actor_rollout_ref.rollout.n=8",
    "data.max_prompt_length=48",
    "data.max_response_length=56",
    "actor_rollout_ref.rollout.temperature=1.0",
    "actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "algorithm.filter_groups.enable=False",
)
MODULES = [*RECIPES, ROOT / "benchmarks" / "yardstick" / "verl_batch.py"]


@dataclass(frozen=True)
class AgreeConfig:
    """Runs of verl: steps of each, learning rate of AdamW, and whether held-out walks are answered before and after."""

    steps: int = 2
    rate: float = 3e-4
    validate: bool = False


def train_on_verl(start: Path, method: str, rows: Path, out: Path, config: AgreeConfig) -> list[dict[str, Any]]:
    """A real run in ``out``, unless it is there; returns its batches in the order of steps.

    Raises:
        SystemExit: the run fails.
    """
    batches = [out / "batches" / f"step_{step + 1}.pt" for step in range(config.steps)]
    metrics = out / "run" / "metrics.jsonl"
    if not all(path.exists() for path in batches) or len(metrics.read_text().splitlines()) < config.steps:
        validation = f"trainer.test_freq={config.steps if config.validate else -1}"
        # modules are loaded where a method or recorded rollouts need the package's trainer
        recorded = f"sayo.viz_every={config.steps if method == BASELINE else 0}"
        command = [
            *("bash", str(ROOT / "scripts" / "run_tiny.sh"), *SETTINGS),
            *(validation, recorded, f"trainer.val_before_train={config.validate}"),
            f"trainer.total_training_steps={config.steps}",
            f"actor_rollout_ref.actor.optim.lr={config.rate:g}",
            f"sayo.modules=[{','.join(map(str, MODULES))}]",
        ]
        given = {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "RAY_"))}
        named = {
            "METHOD": method,
            "MODEL_PATH": start,
            "DATA": rows,
            "OUT": out / "run",
            "SAYO_BATCHES": out / "batches",
        }
        done = subprocess.run(command, env={**given, **{key: str(value) for key, value in named.items()}}, check=False)
        if done.returncode or not all(path.exists() for path in batches):
            raise SystemExit(f"the run of {method} failed: see {out / 'run' / 'train.log'}")
    with torch.serialization.safe_globals([Signals, Statistic, Intervention]):
        return [torch.load(path, weights_only=True) for path in batches]


def validation(out: Path) -> list[dict[str, float]]:
    """Accuracy on held-out walks by data source, of each validation of a run."""
    found = []
    for line in (out / "run" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        parts = {key.split("/acc/")[0]: value for key, value in entry["data"].items() if "/acc/mean" in key}
        if parts:
            found.append(
                {"step": entry["step"], **{key.removeprefix("val-core/"): value for key, value in parts.items()}}
            )
    return found


def walks_of(rows: Path, split: str = "train") -> dict[str, Walk]:
    """The rows of a folder of ``sayo prepare synthetic --task walk``, by their id."""
    out = {}
    for file in sorted(rows.glob(f"{split}-*.parquet")):
        for row in pyarrow.parquet.read_table(file).to_pylist():
            info = row["extra_info"]
            walk = walk_of(info, row["reward_model"]["ground_truth"])
            image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
            out[info["id"]] = Walk(
                image=image,
                question=info["question"],
                answer=info["answer"],
                grid=walk.grid,
                start=walk.start,
                directions=walk.directions,
                colours=(),  # the row does not have them, and nothing here reads them
                path=walk_path(*walk),
                boxes=tuple(
                    tuple(round(x * side) for x, side in zip(box, image.size * 2, strict=True))  # type: ignore[misc]
                    for box in info["boxes"][0]
                ),
            )
    return out
