"""``docs/yardstick.md`` and its picture, from stored results.

The page holds tables and generated sentences alone. What a person concludes from them stands in ``REMARKS``.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.yardstick import learning
from benchmarks.yardstick.claims import claim_lines, claims, of_kind
from benchmarks.yardstick.loop import VARIANTS
from benchmarks.yardstick.plan import HALF, Plan
from benchmarks.yardstick.span import Run, best_rates, final
from benchmarks.yardstick.starts import STARTS
from sayo_verl.estimates import Estimate, mean
from sayo_verl.methods import METHODS

REMARKS = Path(__file__).with_name("remarks.md")
OWN_TITLES = {"grpo": "GRPO", "oracle": "oracle: blame", "oracle_plus": "oracle_plus: blame and praise"}
SCORES = ("separation", "first half", "second half", "precision", "blame", "afterwards", "trajectory", "look")
BAD, GOOD, PLAIN, INK = "#D55E00", "#0072B2", "#e9edf2", "#1f2328"


def page(
    runs: Sequence[Run], scored: Sequence[Mapping[str, Any]], plan: Plan, remarks: str = "", agreed: Sequence[str] = ()
) -> list[str]:
    """The Markdown page.

    Args:
        runs, scored: as ``run_plan`` stores them.
        plan: which runs are looked for.
        remarks: what a person concludes.
        agreed: lines on the agreement of the loop with verl.
    """
    return [
        "# Yardstick: where credit falls, and what it is worth",
        "",
        "In a walk over a grid of arrows it is known for each token whether it must look at the image, at which cell, "
        "and whether it is right ([data.md](data.md#walks)). Credit can therefore be compared with the truth, and "
        "learning with that of an oracle. Written by `python -m benchmarks.yardstick page` from stored runs.",
        "",
        "![The credit of each method on one wrong response, and what each learned](images/yardstick.png)",
        "",
        *([remarks.rstrip(), ""] if remarks else []),
        "## Claims",
        "",
        "A claim holds if each interval is wholly on its side, fails if each is wholly on the other, and else is open. "
        "`benchmarks/yardstick/claims.py` defines them. All numbers are of this task and policy.",
        "",
        *claim_lines(claims(runs, scored, plan, chosen_rates(runs, plan))),
        "",
        *score_lines(scored),
        *layer_lines(scored),
        *learning_lines(runs, plan),
        *(["", "## Agreement with verl", "", *agreed] if agreed else []),
    ]


def score_lines(scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of credit scores, one per kind of start: mean over the starts, with an interval over starts."""
    out = [
        "## Credit against the truth, without training",
        "",
        "0 is the uniform credit of GRPO and 1 is perfect, but for `afterwards`: there -1 is perfect. "
        "`benchmarks/yardstick/scores.py` defines each score. `first half` and `second half` are the separation among "
        "the tokens of each half of a response, `control` is that of permuted credit. "
        'Mean over the warm-up seeds, with its interval over seeds; "no interval" where all of them agree.',
    ]
    for kind, found in _by_kind(scored).items():
        given = {name for each in found for scores in each["methods"].values() for name in scores}
        names = [name for name in (*SCORES, "control") if name in given]
        out += ["", f"### From {_words(kind)} starts ({len(found)})", "", _rates(found), ""]
        out += _table("method", names, {m: [f["methods"][m] for f in found] for m in found[0]["methods"]})
    return out


def layer_lines(scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of statistics and layers."""
    out = [
        "",
        "## Statistics and layers",
        "",
        "Each statistic as if it were the factor of a token. `error` asks whether it is highest at the first error "
        "among the perceptual tokens. `share` is the attention on the own cell of a look, as a share of that on the "
        "image; `seeing` asks whether it is higher at right looks. `late / early` is the attention on the image in the "
        "last third of a response over that in the first.",
    ]
    for kind, found in _by_kind(scored).items():
        out += ["", f"### From {_words(kind)} starts ({len(found)})", ""]
        for part, first, names in (
            ("statistics", "statistic", ("separation", "first half", "second half", "precision", "error")),
            ("looks", "attention", ("share", "seeing", "late / early", "causal, right looks", "causal, right answers")),
        ):
            out += [*_table(first, names, {n: [f[part][n] for f in found] for n in found[0][part]}), ""]
    return out


def learning_lines(runs: Sequence[Run], plan: Plan) -> list[str]:
    """Tables of learning, one per kind of start."""
    best = chosen_rates(runs, plan)
    out = [
        "## Learning",
        "",
        f"{plan.steps} steps of 16 prompts x 8 rollouts. What a run learned is its mean accuracy after the start. The "
        "share is that of `oracle_plus`'s gain over GRPO. `oracle_plus` sees more than the reward. Each method has the "
        f"best of the rates {', '.join(f'{r:g}' for r in plan.rates)}, chosen by a run of its own on the first start. "
        f"In `share at one rate` all have {plan.common_rate:g}. Looks and text are the shares of right words that need "
        "the image and of those that do not. The cost is relative to a step of GRPO in this loop, of a tiny policy.",
    ]
    for kind in plan.kinds:
        grpo = learning.by_seed(runs, kind, "grpo", best.get("grpo", math.nan))
        plus = learning.by_seed(runs, kind, "oracle_plus", best.get("oracle_plus", math.nan))
        if not grpo or not plus:
            out += ["", f"### From {_words(kind)} starts", "", "Not run."]
            continue
        steps = learning.speed(plus, grpo)
        told = ", ".join(f"{_steps(fast)} against {_steps(slow)}" for fast, slow in steps.values())
        out += [
            "",
            f"### From {_words(kind)} starts",
            "",
            f"Steps to GRPO's final accuracy, `oracle_plus` against GRPO, by seed: {told}. "
            f"At most half of the steps in {len(learning.is_wide(steps))} of {len(steps)} seeds.",
            "",
            "| method | rate | seeds | final accuracy | looks | text | gain over GRPO | share | share at one rate | "
            "cost of a step |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        common = [learning.by_seed(runs, kind, m, plan.common_rate) for m in ("grpo", "oracle_plus")]
        for method in plan.compared() if kind == HALF else plan.methods:
            rate = best.get(VARIANTS[method][0] if method in VARIANTS else method, math.nan)
            own = learning.by_seed(runs, kind, method, rate)
            if not own:
                out.append(f"| {_title(method)} | not run | | | | | | | | |")
                continue
            same = learning.by_seed(runs, kind, method, plan.common_rate)
            ends = [[final(run, name) for run in own.values()] for name in ("acc", "look", "text")]
            cells = [
                f"{rate:g}",
                str(len(own)),
                *(mean(each, list(own)).text(3) for each in ends),
                learning.gain(own, grpo).text(3, sign=True),
                learning.share(own, grpo, plus).text(2),
                learning.share(same, *common).text(2) if same and all(common) else "not run",
                f"{sum(run['seconds'] for run in own.values()) / sum(run['seconds'] for run in grpo.values()):.2f}"
                if own.keys() == grpo.keys()
                else "-",
            ]
            out.append(f"| {_title(method)} | " + " | ".join(cells) + " |")
        out += other_walks(runs, plan, kind, best)
    return out


def other_walks(runs: Sequence[Run], plan: Plan, kind: str, best: Mapping[str, float]) -> list[str]:
    """A table of accuracy at the end of training on other held-out walks."""
    names = ("greedy", "new_pairs")
    rows: dict[str, list[dict[str, Any]]] = {}
    for method in plan.methods:
        own = learning.by_seed(runs, kind, method, best.get(method, math.nan))
        rows[method] = [{name: [run[name]["acc"]] for name in names} for run in own.values()]
    said = (
        "Accuracy at the end: greedy on walks as in training, and sampled on walks whose arrows have pairs of "
        "colour and direction that were never seen."
    )
    return ["", said, "", *_table("method", names, rows)]


def chosen_rates(runs: Sequence[Run], plan: Plan) -> dict[str, float]:
    """Method -> its best rate in the runs that choose it."""
    tuning = [run for run in runs if run["seed"] == plan.tuning_seed]
    return {method: rate for (_, method), rate in best_rates(tuning).items()}


def picture(runs: Sequence[Run], scored: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> None:
    """One wrong response with the credit of each method, and bars of what each learned."""
    example = next(each["example"] for each in of_kind(scored, HALF) if each["example"])
    methods = [m for m in plan.methods if m in example["credit"]]
    best = chosen_rates(runs, plan)
    figure, (strip, bars) = plt.subplots(
        1, 2, figsize=(13, 0.42 * len(methods) + 1.6), width_ratios=(2.6, 1), sharey=True, layout="constrained"
    )
    marks = example["marks"]
    first = next(at for at, mark in enumerate(marks) if mark in "xE")
    for row, method in enumerate(methods, 1):
        credit = example["credit"][method]
        total = sum(max(-c, 0) for c in credit) or 1.0
        top = max(max(-c, 0) / total for c in credit) or 1.0
        for at, value in enumerate(credit):
            share = max(-value, 0) / total / max(top, 1.5 / len(credit))
            colour = BAD if value < 0 else GOOD if value > 0 else PLAIN
            strip.barh(row, 0.9, left=at, height=0.72, color=colour, alpha=max(share, 0.06) if value < 0 else 0.8)
    for at, mark in enumerate(marks):
        colour = {"P": GOOD, "E": BAD, "x": BAD}.get(mark, PLAIN)
        strip.barh(0, 0.9, left=at, height=0.72, color=colour)
    strip.annotate("first error", (first + 0.45, -0.4), (first + 0.45, -1.1), ha="center", fontsize=9, color=INK,
                   arrowprops={"arrowstyle": "-", "color": INK})  # fmt: skip
    strip.set_yticks(range(len(methods) + 1), ["truth: right look, wrong, other", *(_title(m) for m in methods)])
    strip.set_ylim(len(methods) + 0.6, -1.3)
    strip.set_xticks([])
    strip.set_xlabel("tokens of one wrong response; orange: where its blame falls, blue: praise", fontsize=9)
    strip.set_title("Where the blame of a wrong answer falls", loc="left", fontsize=11)
    grpo, plus = (learning.by_seed(runs, HALF, m, best.get(m, math.nan)) for m in ("grpo", "oracle_plus"))
    for row, method in enumerate(methods, 1):
        own = learning.by_seed(runs, HALF, method, best.get(method, math.nan))
        share = learning.share(own, grpo, plus) if own else Estimate(math.nan)
        if math.isnan(share.value):
            bars.text(0.02, row, "not run", va="center", fontsize=8)
            continue
        bars.barh(row, share.value, height=0.6, color=GOOD)
        if not math.isnan(share.low):
            bars.plot([share.low, share.high], [row, row], color=INK, linewidth=1.2)
    bars.axvline(0, color=INK, linewidth=0.8)
    bars.set_title("Learned (GRPO 0, oracle_plus 1)", loc="left", fontsize=11)
    for axis in (strip, bars):
        axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axis.tick_params(length=0, labelsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(first: str, names: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [f"| {first} | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for title, each in rows.items():
        cells = []
        for name in names:
            values = [found[name][0] for found in each if name in found and found[name][0] is not None]
            cells.append(mean(values, range(len(values))).text(2, sign=True) if values else "-")
        lines.append(f"| {_title(title)} | " + " | ".join(cells) + " |")
    return lines


def _title(name: str) -> str:
    """The paper's name of a method, as the package gives it, and the settings of a variant; other names as they are."""
    base, settings = VARIANTS.get(name, (name, {}))
    paper, *_ = getattr(METHODS.get(f"attn_{base}"), "reference", (base,))  # a user's method may have none
    given = "".join(f", {key} {value[0] if isinstance(value, tuple) else value}" for key, value in settings.items())
    return OWN_TITLES.get(name, paper) + given


def _by_kind(scored: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds = {kind: of_kind(scored, kind) for kind in STARTS}
    return {kind: found for kind, found in kinds.items() if found}


def _rates(found: Sequence[Mapping[str, Any]]) -> str:
    rates = {name: sum(f["rates"][name] for f in found) / len(found) for name in found[0]["rates"]}
    return "Rollouts: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()) + "."


def _steps(step: int | None) -> str:
    return "never" if step is None else str(step)


def _words(kind: str) -> str:
    return kind.replace("_", "-")
