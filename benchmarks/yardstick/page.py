"""``docs/yardstick.md`` from stored results.

Tables and verdicts are generated. What a person concludes stands in ``REMARKS``, what scores mean in ``WORDS``, and how
to use the yardstick in ``HOWTO``.
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

REMARKS, WORDS, HOWTO = (Path(__file__).with_name(name) for name in ("remarks.md", "words.md", "howto.md"))
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
        "A claim holds if all its intervals lie on the side that it needs. It fails if all lie on the other side. Else "
        'it is open. "in part": some of its numbers were not run. `benchmarks/yardstick/claims.py` defines the '
        "numbers, which are of this task and policy alone.",
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
        WORDS.read_text().rstrip(),
    ]
    for kind, found in _by_kind(scored).items():
        given = {name for each in found for scores in each["methods"].values() for name in scores}
        names = [name for name in (*SCORES, "control") if name in given]
        out += ["", f"### From {_words(kind)} starts ({len(found)})", "", _rates(found), ""]
        methods = dict.fromkeys(m for f in found for m in f["methods"])
        by_title = {title(m): [f["methods"][m] for f in found if m in f["methods"]] for m in methods}
        out += _table("method", names, by_title)
    return out


def layer_lines(scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tables of statistics and layers."""
    out = [
        "",
        "## Statistics and layers",
        "",
        "Each statistic as if it were the factor of a token. `row of the token`: of the row in which the token is the "
        "input; the others are of the row that sampled it. `error` asks whether the statistic is highest at the first "
        "error among the looks. `share` is the attention on the own cell of a look, as a share of that on the image; "
        "`seeing` asks whether it is higher at right looks. `late / early` is the attention on the image in the last "
        "third of a response over that in the first. `causal` is attention weighted by dependence on the image, "
        "against the share of right looks and against right answers of the same prompt.",
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
    out = [
        "## Learning",
        "",
        f"{plan.steps} steps of 16 prompts x 8 rollouts, all methods at the learning rate {plan.common_rate:g}. What a "
        "run learned is the mean of its accuracies after the start. The *share* is a method's gain over GRPO, divided "
        "by that of `oracle_plus`, which sees more than the reward. Looks and text are the shares of right words that "
        "need the image and of those that do not. The cost is relative to a step of GRPO in this loop, whose policy is "
        'tiny. "no span": `oracle_plus` gains nothing that is clear of 0.',
    ]
    for kind in plan.kinds:
        grpo, plus = (learning.by_seed(runs, kind, m, plan.common_rate) for m in ("grpo", "oracle_plus"))
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
            "| method | seeds | final accuracy | looks | text | gain over GRPO | share | cost of a step |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in (*plan.methods, *(plan.trained_variants if kind == HALF else ())):
            own = learning.by_seed(runs, kind, method, plan.common_rate)
            own = {seed: run for seed, run in own.items() if seed in grpo.keys() & plus.keys()}
            if not own:
                why = "not trained: its credit is that of GRPO here" if method in plan.untrained else "not run"
                out.append(f"| {title(method)} | {why} | | | | | | |")
                continue
            ends = [[final(run, name) for run in own.values()] for name in ("acc", "look", "text")]
            cells = [
                str(len(own)),
                *(mean(each, list(own)).text(3) for each in ends),
                learning.gain(own, grpo).text(3, sign=True),
                _share(learning.share(own, grpo, plus)),
                f"{sum(run['seconds'] for run in own.values()) / sum(grpo[seed]['seconds'] for seed in own):.2f}",
            ]
            out.append(f"| {title(method)} | " + " | ".join(cells) + " |")
        out += other_walks(runs, plan, kind, begun)
    return [*out, *best_lines(runs, plan)]


def best_lines(runs: Sequence[Run], plan: Plan) -> list[str]:
    """A table of each method at the best of the rates that were tried, and of the runs that chose it."""
    heading = "### Each method at a rate of its own"
    tuning = learning.tuning_runs(runs, plan.tuning_seed)
    if not tuning:
        return ["", heading, "", "Not run."]
    best = learning.chosen_rates(runs, plan.tuning_seed)
    ends = learning.finals(tuning)
    starts = sorted({f"{_words(learning.kind_of(run))} {run['start'].rsplit('-', 2)[1]}" for run in tuning})
    grpo, plus = (learning.by_seed(runs, HALF, m, best.get(m, math.nan)) for m in ("grpo", "oracle_plus"))
    tried = [f"final at {rate:g}" for rate in plan.rates]
    lines = [
        "",
        heading,
        "",
        "The first columns are the final accuracies of the runs that chose the rates, with a seed of training of their "
        f"own. They are means over these starts: {', '.join(starts)}.",
        "",
        "| " + " | ".join(["method", *tried, "rate", "gain over GRPO", "share"]) + " |",
        "|" + "---|" * (len(tried) + 4),
    ]
    for method in plan.trained:
        cells = [f"{ends[method, r]:.3f}" if (method, r) in ends else "not run" for r in plan.rates]
        own = learning.by_seed(runs, HALF, method, best.get(method, math.nan))
        own = {seed: run for seed, run in own.items() if seed in grpo.keys() & plus.keys()}
        gains = (
            [learning.gain(own, grpo).text(3, sign=True), _share(learning.share(own, grpo, plus))]
            if own
            else ["not run"] * 2
        )
        cells += [f"{best[method]:g}" if method in best else "-", *gains]
        lines.append(f"| {title(method)} | " + " | ".join(cells) + " |")
    return lines


def other_walks(runs: Sequence[Run], plan: Plan, kind: str, begun: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of accuracy at the end of training on other held-out walks, and greedily before it.

    Greedy accuracy tells learning to see from learning to be sure: the second raises sampled accuracy alone.
    """
    names = ("greedy", "change", "new_pairs")
    rows: dict[str, list[dict[str, Any]]] = {}
    used = {run["start"] for run in runs if learning.kind_of(run) == kind and run["seed"] != plan.tuning_seed}
    if before := [{"greedy": [begun[start]["acc"]]} for start in sorted(used & begun.keys())]:
        rows["before training"] = before
    for method in plan.trained:
        own = learning.by_seed(runs, kind, method, plan.common_rate)
        rows[title(method)] = [
            {
                "greedy": [run["greedy"]["acc"]],
                "change": [run["greedy"]["acc"] - begun[run["start"]]["acc"] if run["start"] in begun else None],
                "new_pairs": [run["new_pairs"]["acc"]],
            }
            for run in own.values()
        ]
    said = (
        "Accuracy at the end: greedy on walks as in training, and its change from the checkpoint where training "
        "starts; and sampled on walks whose arrows have pairs of colour and direction that were never seen."
    )
    return ["", said, "", *_table("method", names, rows, decimals=3)]


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


def _table(
    first: str, names: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]], decimals: int = 2
) -> list[str]:
    lines = [f"| {first} | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row, each in rows.items():
        cells = []
        for name in names:
            values = [found[name][0] for found in each if name in found and found[name][0] is not None]
            cells.append(mean(values, range(len(values))).text(decimals, sign=True) if values else "-")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
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
