"""The run card: what runs, with which versions and settings. Written before training, beside the metrics."""

import json
import os
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sayo_verl.launch.fingerprint import versions
from sayo_verl.launch.resume import metrics_file
from sayo_verl.methods import own_methods
from sayo_verl.metrics import declaration
from sayo_verl.report.card import run_card

CLOCK = "%Y-%m-%dT%H:%M:%S%z"


def metrics_of_run(config: DictConfig) -> Path | None:
    """The metrics file that this run writes; None if it writes none."""
    named = os.environ.get("VERL_FILE_LOGGER_PATH")
    return Path(named) if named else metrics_file(config)


def write_run_card(config: DictConfig) -> None:
    """What runs, with which versions: run.json and run.yaml beside metrics.jsonl, run-2.json beside metrics-2.jsonl.

    Nothing is written before the checks have passed, and nothing if no metrics are.
    """
    metrics = metrics_of_run(config)
    if metrics is None:
        return
    metrics.parent.mkdir(parents=True, exist_ok=True)
    card_file = run_card(metrics)
    card = {
        "run_id": metrics.parent.name,
        "estimator": config.algorithm.adv_estimator,
        "total_steps": config.trainer.total_training_steps,
        "started": time.strftime(CLOCK),
        "versions": versions(),
        "metrics": str(metrics),
        "overrides": sys.argv[1:],
        # for the report, which reads those of the built-in methods from its own file
        "methods": {name: declaration(cls) for name, cls in own_methods().items()},
        "data": _sizes(config),
    }
    card_file.write_text(json.dumps(card, indent=1) + "\n")
    # Not resolved: ${oc.env:...} may stand for a secret
    card_file.with_suffix(".yaml").write_text(OmegaConf.to_yaml(config))


def _sizes(config: DictConfig) -> dict[str, int]:
    """Data file -> bytes, so that a comparison of runs sees data that changed under its name."""
    named = [OmegaConf.select(config, f"data.{split}_files") or [] for split in ("train", "val")]
    files = [str(file) for value in named for file in ([value] if isinstance(value, str) else value)]
    return {file: Path(file).stat().st_size for file in files if Path(file).is_file()}
