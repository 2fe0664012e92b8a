"""The picture of the yardstick: the credit of each method on one wrong response, and what each learned."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.yardstick import learning
from benchmarks.yardstick.claims import of_kind
from benchmarks.yardstick.learning import Run
from benchmarks.yardstick.loop import title
from benchmarks.yardstick.plan import HALF, Plan
from sayo_verl.estimates import Estimate

BAD, GOOD, PLAIN, INK = "#D55E00", "#0072B2", "#e9edf2", "#1f2328"


def picture(runs: Sequence[Run], scored: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> None:
    """One wrong response with the credit of each method, and bars of what each learned."""
    nothing: dict[str, Any] = {"marks": "", "credit": dict.fromkeys(plan.methods, ())}
    example = next((each["example"] for each in of_kind(scored, HALF) if each["example"]), nothing)
    methods = [m for m in plan.methods if m in example["credit"]]
    figure, (strip, bars) = plt.subplots(
        1, 2, figsize=(13, 0.42 * len(methods) + 1.6), width_ratios=(2.6, 1), sharey=True, layout="constrained"
    )
    marks = example["marks"]
    for row, method in enumerate(methods, 1):
        credit = example["credit"][method]
        total = sum(max(-c, 0) for c in credit) or 1.0
        top = max((max(-c, 0) / total for c in credit), default=0.0) or 1.0
        for at, value in enumerate(credit):
            share = max(-value, 0) / total / max(top, 1.5 / len(credit))
            colour = BAD if value < 0 else GOOD if value > 0 else PLAIN
            strip.barh(row, 0.9, left=at, height=0.72, color=colour, alpha=max(share, 0.06) if value < 0 else 0.8)
    for at, mark in enumerate(marks):
        colour = {"P": GOOD, "E": BAD, "x": BAD}.get(mark, PLAIN)
        strip.barh(0, 0.9, left=at, height=0.72, color=colour)
    for first in [at for at, mark in enumerate(marks) if mark in "xE"][:1]:
        strip.annotate("first error", (first + 0.45, -0.4), (first + 0.45, -1.1), ha="center", fontsize=9, color=INK,
                       arrowprops={"arrowstyle": "-", "color": INK})  # fmt: skip
    strip.set_yticks(range(len(methods) + 1), ["truth", *(title(m) for m in methods)])
    strip.set_ylim(len(methods) + 0.6, -1.3)
    strip.set_xticks([])
    strip.set_xlabel(
        "tokens of one wrong response. Truth: blue a right look, orange a wrong one, grey no look.\n"
        "Methods: orange blame, blue praise",
        fontsize=9,
    )
    strip.set_title("Where the blame of a wrong answer falls", loc="left", fontsize=11)
    grpo, plus = (learning.by_seed(runs, HALF, m, plan.common_rate) for m in ("grpo", "oracle_plus"))
    for row, method in enumerate(methods, 1):
        own = learning.by_seed(runs, HALF, method, plan.common_rate)
        share = learning.share(own, grpo, plus) if own else Estimate(math.nan)
        if math.isnan(share.value):
            said = "no span" if own else "not trained: as GRPO" if method in plan.untrained else "not run"
            bars.text(0.02, row, said, va="center", fontsize=8)
            continue
        bars.barh(row, share.value, height=0.6, color=GOOD)
        if not math.isnan(share.low):
            bars.plot([share.low, share.high], [row, row], color=INK, linewidth=1.2)
    bars.axvline(0, color=INK, linewidth=0.8)
    bars.xaxis.set_major_locator(plt.MaxNLocator(4))
    bars.set_title("What it learned", loc="left", fontsize=11)
    bars.set_xlabel(f"share of oracle_plus's gain,\n{len(grpo)} half-ignorant starts", fontsize=9)
    for axis in (strip, bars):
        axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axis.tick_params(length=0, labelsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
