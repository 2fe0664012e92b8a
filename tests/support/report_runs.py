"""Run folders for tests of the report: what runs of each method log."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.card import RUN_FILE
from sayo_verl.report.runs import Run, load_run
from sayo_verl.view.maps import Packed
from sayo_verl.view.seen import MapSet, SeenImage, SeenPrompt, SeenResponse, words_of
from sayo_verl.view.store import write_step
from sayo_verl.vision.grids import Tile

OF = {section.estimator: section for section in c.OF_METHODS}
COMMON = {
    c.SCORE.name: 0.7,
    c.REWARD.name: 1.0,
    "actor/entropy": 0.4,
    "response_length/mean": 12.0,
}  # what every run has
PARTS = {c.ACCURACY.name: 0.5, "sayo/format/mean": 0.9, "sayo/probe_share_of_log_prob": 0.05}
ATTENTION = COMMON | PARTS | dict.fromkeys(OF["attn_region"].names, 0.6)
GRPO = COMMON
R_V = "sayo/region_reward/mean"
OWN = {"sayo/mine/mean": 0.3, "sayo/mine_share": 0.2, "sayo/a_third": 0.1}  # of a method that no list knows
OF_METHOD = {
    section.estimator: COMMON | PARTS | {metric.name: 0.6 for metric in section.metrics} for section in c.OF_METHODS
}
OF_METHOD["grpo"] = GRPO
OF_METHOD["attn_mix"] = OF_METHOD["attn_region"] | OF_METHOD["attn_dual"]
OF_METHOD["attn_mine"] = COMMON | PARTS | OWN
VALIDATION = "val-core/sayo/scenes/acc/mean@1"


def line(step: int, **data: object) -> str:
    return json.dumps({"step": step, "data": data}) + "\n"


def write_run(folder: Path, *lines: str, launch: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / r.METRICS_FILE).write_text("".join(lines))
    if launch is not None:
        (folder / RUN_FILE).write_text(json.dumps(launch))
    return folder


def make_run(folder: Path, data: dict[str, float], steps: int = 12, estimator: str = "attn_region") -> Run:
    launch = {"run_id": "demo", "estimator": estimator, "total_steps": steps}
    lines = [line(0, **{VALIDATION: 0.4})]
    lines += [line(n, **{name: value + 0.01 * n for name, value in data.items()}) for n in range(1, steps + 1)]
    return load_run(write_run(folder, *lines, launch=launch))


def attempt(folder: Path, name: str, steps: range, value: float, started: str | None = None, **launch: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"metrics{name}.jsonl").write_text("".join(line(step, x=value) for step in steps))
    if started:
        (folder / f"run{name}.json").write_text(json.dumps({"started": started, "estimator": "grpo", **launch}))


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    return {row[0]: row[1:] for row in rows}


def recorded(folder: Path, steps: tuple[int, ...] = (0, 10), **changes: object) -> None:
    """Record two prompts with boxes and three responses each; ``changes``: fields of every response."""
    for step in steps:
        write_step(folder, step, [(_prompt(i), _responses(step, i, **changes)) for i in range(2)], seconds=1.5)


def _prompt(i: int) -> SeenPrompt:
    image = SeenImage(Image.new("RGB", (40, 20), (200, 30 * i, 0)), (Tile(2, 4),), ((0.0, 0.0, 0.25, 0.5),), ("ring",))
    return SeenPrompt(f"row {i} of val.parquet", f"What is in image {i}?", (image,), "ring", region_tokens=1)


def _responses(step: int, i: int, **changes: object) -> list[SeenResponse]:
    made = []
    for n in range(3):
        random = np.random.default_rng([step, i, n])
        mass_T = random.uniform(0.1, 0.4, 6).astype(np.float32)
        maps_WV = random.uniform(0, 0.05, (6, 8))
        values = {
            "image_mass": mass_T,
            "region_mass": mass_T * 0.2 * (1 + step / 10),
            "effect": 3 * mass_T + random.normal(0, 0.05, 6).astype(np.float32),
            "token_weight": np.ones(6, np.float32),
            "token_bonus": np.zeros(6, np.float32),
        }
        response = SeenResponse(
            pieces=("<think>", " a", " red", " ring", "</think>", " ring"),
            words=words_of(("<think>", " a", " red", " ring", "</think>", " ring")),
            values=values,
            maps=(),
            facts={"accuracy": float(n > 0), "reward": float(n > 0), "advantage": n - 1.0, "query_row": "predicting"},
        )
        maps = MapSet(
            "mean", "mean over layers and heads", Packed.of(maps_WV[:1]), Packed.of(maps_WV[: len(response.words)])
        )
        made.append(replace(response, **{"maps": (maps,), **changes}))
    return made
