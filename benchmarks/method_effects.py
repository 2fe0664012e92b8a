"""Comparison of every method with its paired baseline on the tiny task: several seeds, one start, held-out scenes.

    python benchmarks/method_effects.py --policy "$(sayo prepare policy)" --scenes "$(sayo prepare synthetic)"

runs ``scripts/run_tiny.sh`` (real verl, Ray, FSDP2 and vLLM on CPU, three to five minutes a run) for each condition and
seed, evaluates the last checkpoint on held-out scenes with plain transformers (``sayo evaluate``), and writes
``docs/methods_tiny.md`` and ``docs/images/methods_tiny.png``. All train on accuracy plus format. Finished runs are not
repeated. The folder of an interrupted run is renamed and the run starts again. Step times are valid only on an idle
machine.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from region_effect import MEASURES, ROOT, measure, train


@dataclass(frozen=True)
class Condition:
    """One job.

    Attributes:
        method: METHOD of ``scripts/run_tiny.sh``.
        title: in tables.
        baseline: name of the condition to compare with; None for a baseline.
        overrides: hydra overrides.
        own: the method's own metric in training, and its title.
    """

    method: str
    title: str
    baseline: str | None = None
    overrides: tuple[str, ...] = ()
    own: tuple[str, str] | None = None


TOP, REST = "algorithm.attn.anchor.weighting=top", "algorithm.attn.anchor.weighting=rest"
CONDITIONS = {
    "grpo": Condition("grpo", "GRPO"),
    "dapo": Condition("dapo", "DAPO"),
    "region": Condition("region", "SAYO", "grpo", own=("sayo/region_reward/mean", "r_v")),
    "dual": Condition("dual", "VGPO", "dapo", own=("sayo/late_early_visual_score", "late / early visual score")),
    "anchor": Condition("anchor", "AT-RL (our reading)", "grpo", own=("sayo/anchor_share", "anchor share")),
    "anchor_top": Condition("anchor", "AT-RL, top 15 % of tokens only", "grpo", (TOP,)),
    "anchor_rest": Condition("anchor", "AT-RL's control: the other 85 % only", "grpo", (REST,)),
    "faithful": Condition(
        "faithful", "Faithful-MR1 (our reading)", "grpo", own=("sayo/faithful_ratio/mean", "F, ungated")
    ),
}
SHOWN = ("accuracy", "target_attention", "named_first", "named", "format", "response_tokens", "entropy")
COLOURS = {"grpo": "#000000", "dapo": "#59636e"}


def series(out: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in training."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["data"][name]) for r in records if r["step"] > 0 and name in r["data"]]


def smoothed(points: list[tuple[int, float]], window: int = 5) -> list[tuple[int, float]]:
    """Mean of the last ``window`` values at each step."""
    values = [value for _, value in points]
    return [(step, statistics.mean(values[max(0, i + 1 - window) : i + 1])) for i, (step, _) in enumerate(points)]


def plot(runs: dict[str, list[Path]], picture: Path) -> None:
    """Draw training accuracy of each method and its baseline, with a line per seed and the mean in bold."""
    shown = [name for name in runs if CONDITIONS[name].baseline in runs]
    columns = min(3, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.1 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        for job, colour in ((CONDITIONS[name].baseline, "#59636e"), (name, "#0072B2")):
            lines = [smoothed(series(out, "sayo/accuracy/mean") or accuracy_of_grpo(out)) for out in runs[job]]
            for line in lines:
                axis.plot(*zip(*line, strict=True), color=colour, linewidth=0.7, alpha=0.5)
            mean = [(points[0][0], statistics.mean(v for _, v in points)) for points in zip(*lines, strict=True)]
            axis.plot(*zip(*mean, strict=True), color=colour, linewidth=2.2, label=CONDITIONS[job].title)
        axis.set_title(CONDITIONS[name].title, fontsize=10, loc="left")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy while training\n(mean of 5 steps)")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def accuracy_of_grpo(out: Path) -> list[tuple[int, float]]:
    """Accuracy of a run with verl's own method, which logs only accuracy plus format; format is nearly always 1."""
    return [(step, value - 1.0) for step, value in series(out, "critic/score/mean")]


def spread(values: list[float], decimals: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    tail = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{tail}"


def difference(values: list[float], baseline: list[float]) -> str:
    """Paired difference over seeds, with its standard error."""
    gaps = [a - b for a, b in zip(values, baseline, strict=True)]
    error = f" (se {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f})" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.3f}{error}"


def step_seconds(out: Path) -> float:
    """Median over the steps without the first, which includes start-up."""
    return statistics.median(value for step, value in series(out, "timing_s/step") if step > 1)


def page(
    runs: dict[str, list[Path]],
    measured: dict[str, list[dict[str, float]]],
    start: dict[str, float],
    seeds: list[int],
    steps: int,
) -> list[str]:
    """The Markdown page."""
    lines = [
        "# Every method on the tiny task",
        "",
        f"Written by `benchmarks/method_effects.py`: {steps} steps of 16 prompts x 8 rollouts, seeds "
        f"{', '.join(map(str, seeds))}, one warmed-up policy. Every job is rewarded for accuracy and format; a method "
        "adds its own credit. Measured on held-out scenes (256, four samples each at temperature 1) with plain "
        "transformers. Mean ± standard deviation over seeds.",
        "",
        "![Accuracy while training, each method over its baseline](images/methods_tiny.png)",
        "",
        "| | " + " | ".join(MEASURES[name] for name in SHOWN) + " |",
        "|---" * (len(SHOWN) + 1) + "|",
        "| start | " + " | ".join(f"{start[name]:.3f}" for name in SHOWN) + " |",
    ]
    for job, results in measured.items():
        cells = [spread([r[name] for r in results]) for name in SHOWN]
        lines.append(f"| {CONDITIONS[job].title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Against the paired baseline",
        "",
        "Same seeds, same prompts; difference of the held-out figures, mean and standard error over seeds.",
        "",
        "| | baseline | accuracy | pooled R_a, high-entropy tokens (a) | target named first | entropy "
        "| step time, ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for job, results in measured.items():
        base = CONDITIONS[job].baseline
        if base in measured:
            cells = [
                difference([r[n] for r in results], [r[n] for r in measured[base]])
                for n in ("accuracy", "target_attention", "named_first", "entropy")
            ]
            ratios = [step_seconds(a) / step_seconds(b) for a, b in zip(runs[job], runs[base], strict=True)]
            row = [CONDITIONS[job].title, CONDITIONS[base].title, *cells, spread(ratios, 2)]
            lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "## What each method measured while it trained",
        "",
        "| | metric | first 5 steps | last 5 steps |",
        "|---|---|---|---|",
    ]
    for job in measured:
        if CONDITIONS[job].own:
            name, title = CONDITIONS[job].own
            curves = [[value for _, value in series(out, name)] for out in runs[job]]
            ends = [
                spread([statistics.mean(part(curve)) for curve in curves])
                for part in (lambda c: c[:5], lambda c: c[-5:])
            ]
            lines.append(f"| {CONDITIONS[job].title} | {title} (`{name}`) | {ends[0]} | {ends[1]} |")
    return lines


def main() -> None:
    """Run missing jobs, measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "method_effects")
    parser.add_argument("--policy", required=True, help="the start, as printed by `sayo prepare policy`")
    parser.add_argument("--scenes", type=Path, required=True, help="a folder of `sayo prepare synthetic`")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "methods_tiny.md")
    parser.add_argument(
        "--remarks",
        type=Path,
        default=ROOT / "benchmarks" / "method_effects_remarks.md",
        help="hand-written remarks, added below the tables",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = measure(Path(args.policy), args.scenes, args.out / "start.json")
    runs: dict[str, list[Path]] = {name: [] for name in args.conditions}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in args.conditions}
    for seed in args.seeds:
        for name in args.conditions:
            condition, out = CONDITIONS[name], args.out / f"{name}-{seed}"
            seconds = train(
                out,
                seed,
                args.steps,
                args.steps,
                {"METHOD": condition.method},
                args.policy,
                *condition.overrides,
            )
            model = out / "checkpoints" / f"global_step_{args.steps}" / "actor" / "huggingface"
            runs[name].append(out)
            measured[name].append(measure(model, args.scenes, out / f"held_out_{args.steps}.json"))
            figures = {key: round(measured[name][-1][key], 3) for key in SHOWN}
            print(f"{name}, seed {seed}: {seconds:.0f} s, {figures}", flush=True)
    plot(runs, args.page.parent / "images" / "methods_tiny.png")
    lines = page(runs, measured, start, args.seeds, args.steps)
    remarks = [args.remarks.read_text()] if args.remarks.exists() else []
    args.page.write_text("\n".join([*lines, "", *remarks]))
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
