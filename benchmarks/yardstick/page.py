"""``docs/yardstick.md`` from stored results.

Tables and verdicts are generated. What a person concludes stands in ``REMARKS``, how to use the yardstick in ``HOWTO``.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.yardstick import learning
from benchmarks.yardstick.claims import claim_lines, claims, of_kind
from benchmarks.yardstick.learning import Run, final
from benchmarks.yardstick.loop import title
from benchmarks.yardstick.plan import HALF, Plan
from benchmarks.yardstick.starts import STARTS
from sayo_verl.estimates import Estimate, mean

REMARKS, HOWTO = (Path(__file__).with_name(name) for name in ("remarks.md", "howto.md"))
SCORES = ("separation", "first half", "second half", "precision", "blame", "afterwards", "trajectory", "look")


def page(
    runs: Sequence[Run],
    scored: Sequence[Mapping[str, Any]],
    plan: Plan,
    remarks: str = "",
    agreed: Sequence[Mapping[str, Any]] = (),
    begun: Mapping[str, Mapping[str, float]] | None = None,
) -> list[str]:
    """The Markdown page.

    Args:
        runs, scored: as ``run_plan`` stores them.
        plan: which runs are looked for.
        remarks: what a person concludes.
        agreed: results of ``agree``.
        begun: greedy rates of each start, by its name.
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
        *claim_lines(claims(runs, scored, plan)),
        "",
        *score_lines(scored),
        *layer_lines(scored),
        *learning_lines(runs, plan, begun or {}),
        *(agreement_lines(agreed) if agreed else []),
        "",
        HOWTO.read_text().rstrip(),
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
        methods = dict.fromkeys(m for f in found for m in f["methods"])
        out += _table("method", names, {m: [f["methods"][m] for f in found if m in f["methods"]] for m in methods})
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


def learning_lines(runs: Sequence[Run], plan: Plan, begun: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Tables of learning, one per kind of start. ``begun``: as for ``page``."""
    best = learning.chosen_rates(runs, plan.tuning_seed)
    out = [
        "## Learning",
        "",
        f"{plan.steps} steps of 16 prompts x 8 rollouts. What a run learned is its mean accuracy after the start. The "
        "share is that of `oracle_plus`'s gain over GRPO. `oracle_plus` sees more than the reward. Each method has the "
        f"best of the rates {', '.join(f'{r:g}' for r in plan.rates)}, chosen by a run of its own on the first start, "
        f"which says little of other starts. In `share at one rate` all have {plan.common_rate:g}, as variants and all "
        'runs from knowing starts do. "no span": `oracle_plus` gains nothing that is clear of 0. Looks and text are '
        "the shares of right words that need the image and of those that do not. The cost is relative to a step of GRPO "
        "in this loop, of a tiny policy.",
        *rate_lines(runs, plan),
    ]
    for kind in plan.kinds:
        grpo, plus = (learning.by_seed(runs, kind, m, plan.rate(m, kind, best)) for m in ("grpo", "oracle_plus"))
        if not grpo or not plus:
            out += ["", f"### From {_words(kind)} starts", "", "Not run: a comparison needs GRPO and `oracle_plus`."]
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
        for method in (*plan.methods, *(plan.trained_variants if kind == HALF else ())):
            rate = plan.rate(method, kind, best)
            own = learning.by_seed(runs, kind, method, rate)
            own = {seed: run for seed, run in own.items() if seed in grpo.keys() & plus.keys()}
            if not own:
                why = "not trained: its credit is that of GRPO here" if method in plan.untrained else "not run"
                out.append(f"| {title(method)} | {why} | | | | | | | | |")
                continue
            same = learning.by_seed(runs, kind, method, plan.common_rate)
            ends = [[final(run, name) for run in own.values()] for name in ("acc", "look", "text")]
            cells = [
                f"{rate:g}",
                str(len(own)),
                *(mean(each, list(own)).text(3) for each in ends),
                learning.gain(own, grpo).text(3, sign=True),
                _share(learning.share(own, grpo, plus)),
                _share(learning.share(same, *common)) if same and all(common) else "not run",
                f"{sum(run['seconds'] for run in own.values()) / sum(grpo[seed]['seconds'] for seed in own):.2f}",
            ]
            out.append(f"| {title(method)} | " + " | ".join(cells) + " |")
        out += other_walks(runs, plan, kind, best, begun)
    return out


def rate_lines(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A table of the runs that chose the rates, so that a reader sees how clear the choice was."""
    ends = {(r["method"], r["rate"]): final(r) for r in runs if r["seed"] == plan.tuning_seed}
    said = "Final accuracy of the runs that chose the rates, one each:"
    lines = ["", said, "", "| method | " + " | ".join(f"{r:g}" for r in plan.rates) + " |"]
    lines.append("|" + "---|" * (len(plan.rates) + 1))
    for method in plan.trained:
        cells = [f"{ends[method, r]:.3f}" if (method, r) in ends else "not run" for r in plan.rates]
        lines.append(f"| {title(method)} | " + " | ".join(cells) + " |")
    return lines


def other_walks(
    runs: Sequence[Run], plan: Plan, kind: str, best: Mapping[str, float], begun: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A table of accuracy at the end of training on other held-out walks, and greedily before it.

    Greedy accuracy tells learning to see from learning to be sure: the second raises sampled accuracy alone.
    """
    names = ("greedy", "new_pairs")
    rows: dict[str, list[dict[str, Any]]] = {}
    used = {run["start"] for run in runs if learning.kind_of(run) == kind and run["seed"] != plan.tuning_seed}
    if before := [{"greedy": [begun[start]["acc"]]} for start in sorted(used & begun.keys())]:
        rows["before training"] = before
    for method in plan.trained:
        own = learning.by_seed(runs, kind, method, plan.rate(method, kind, best))
        rows[method] = [{name: [run[name]["acc"]] for name in names} for run in own.values()]
    said = (
        "Accuracy at the end: greedy on walks as in training, and sampled on walks whose arrows have pairs of "
        "colour and direction that were never seen. Before training it is that of the checkpoint where training starts."
    )
    return ["", said, "", *_table("method", names, rows)]


def agreement_lines(agreed: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the loop and real runs of verl agree, from results of ``agree``."""
    lines = [
        "",
        "## Agreement with verl",
        "",
        "`python -m benchmarks.yardstick agree` trains each method on real verl (FSDP2, vLLM on CPU) from the first "
        "half-ignorant start. The loop then computes the advantages of verl's responses. It also makes its own updates "
        "on them, and so follows verl. `advantages` and `log-probs` are the largest differences in step 1, before any "
        "update. `followed` is that of the log-probs in the last step. `from GRPO` is how far the advantages of the "
        "method lie from GRPO's, so what a comparison could miss. The last columns are the mean reward of the first "
        'and the second half of the steps, of one seed, where at least ten were run, else "not run".',
        "",
        "| method | steps | advantages | log-probs | followed | from GRPO | verdict | reward, verl | reward, loop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in agreed:
        steps = found["steps_of_verl"]
        first, last = steps[0], steps[-1]
        own = found["loop"].get("rewards", [])
        halves = [_halves(rewards) for rewards in ([step["reward"] for step in steps], own)]
        sizes = (first["advantages"], first["log_probs"], last["log_probs"], first.get("from_grpo", 0.0))
        cells = [title(found["method"]), str(len(steps)), *(f"{size:.1e}" for size in sizes)]
        lines.append("| " + " | ".join([*cells, found["verdict"].split(":")[0], *halves]) + " |")
    notes = {found["verdict"] for found in agreed if ":" in found["verdict"]}
    return [*lines, *(line for note in sorted(notes) for line in ("", note[0].upper() + note[1:] + "."))]


def _halves(rewards: Sequence[float]) -> str:
    half = len(rewards) // 2
    return f"{fmean(rewards[:half]):.3f}, {fmean(rewards[half:]):.3f}" if len(rewards) >= 10 else "not run"


def _table(first: str, names: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [f"| {first} | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row, each in rows.items():
        cells = []
        for name in names:
            values = [found[name][0] for found in each if name in found and found[name][0] is not None]
            cells.append(mean(values, range(len(values))).text(2, sign=True) if values else "-")
        lines.append(f"| {title(row)} | " + " | ".join(cells) + " |")
    return lines


def _by_kind(scored: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds = {kind: of_kind(scored, kind) for kind in STARTS}
    return {kind: found for kind, found in kinds.items() if found}


def _rates(found: Sequence[Mapping[str, Any]]) -> str:
    rates = {name: sum(f["rates"][name] for f in found) / len(found) for name in found[0]["rates"]}
    return "Rollouts: " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()) + "."


def _share(share: Estimate) -> str:
    return "no span" if math.isnan(share.value) else share.text(2)


def _steps(step: int | None) -> str:
    return "never" if step is None else str(step)


def _words(kind: str) -> str:
    return kind.replace("_", "-")
