"""The scores of the harness beside the paper's numbers: a table, results.md and results.json.

Error code: E10 the harness left no score.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.evaluation.sets import Benchmark, BenchmarkSet


def report(benchmarks: BenchmarkSet, facts: Mapping[str, object], out: Path) -> None:
    """Print the table and write both files into ``out``.

    Raises:
        SayoError: E10.
    """
    samples = [_result(folder) for folder in sorted((out / "harness").iterdir(), key=lambda path: int(path.name))]
    rows = [row for benchmark in benchmarks.benchmarks for row in _rows(benchmark, samples, out)]
    for row in rows:
        row["paper"] = dict(zip(benchmarks.columns, row["paper"], strict=False))
    content = {"set": benchmarks.title, "paper": benchmarks.paper, "facts": dict(facts), "benchmarks": rows}
    (out / "results.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")

    header = ["benchmark", "score in %", "questions", *benchmarks.columns]
    cells = [
        [row["benchmark"], "left out" if row["left_out"] else f"{row['score']:.2f}", str(row["questions"] or "-")]
        + [f"{row['paper'][name]:.2f}" if name in row["paper"] else "-" for name in benchmarks.columns]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for line in (header, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    remarks = [f"{row['benchmark']}: {row[key]}" for row in rows for key in ("left_out", "note") if row[key]]
    paper = f"Columns with names of models: {benchmarks.paper}." if benchmarks.columns else "No numbers of a paper."
    print("\n" + "\n".join([paper, *remarks, f"{out}/results.md"]))

    lines = [
        f"# {benchmarks.title}",
        "",
        paper,
        "",
        *_markdown(
            header + ["tasks", "metric", "prompt"],
            [
                cell + [" ".join(row["tasks"]) or "-", row["metric"] or "-", row["prompt"] or "-"]
                for cell, row in zip(cells, rows, strict=True)
            ],
        ),
        "",
        *(f"- {remark}" for remark in remarks),
        "",
        *_markdown(["what", "value"], facts.items()),
    ]
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _markdown(header: Any, rows: Any) -> list[str]:
    escaped = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], "|" + "---|" * len(escaped[0]), *lines[1:]]


def _result(folder: Path) -> dict[str, Any]:
    """The newest result of a run of the harness, which exits with 0 after some of its errors."""
    found = sorted(folder.glob("**/*_results.json"))
    if not found:
        fix = "read its last lines, and look for the first traceback"
        raise SayoError(
            "E10", "the harness ended without a result", where=str(folder.parent.parent / "harness.log"), fix=fix
        )
    return json.loads(found[-1].read_text(encoding="utf-8"))


def _rows(benchmark: Benchmark, samples: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """One row, or one for each metric of a task that was named by hand."""
    if benchmark.left_out:
        return [_row(benchmark, None, 0, benchmark.metric, [])]
    scores: dict[str, list[list[float]]] = {}  # metric -> samples -> tasks
    for result in samples:
        for task in benchmark.tasks:
            for key, value in result["results"].get(task, {}).items():
                metric = key.partition(",")[0]
                if "," in key and "_stderr" not in key and isinstance(value, int | float):
                    scores.setdefault(metric, [[] for _ in samples])[samples.index(result)].append(float(value))
    wanted = [benchmark.metric] if benchmark.metric else sorted(scores)
    if not wanted or any(len(s) != len(benchmark.tasks) for m in wanted for s in scores.get(m, [[]])):
        got = ", ".join(sorted(scores)) or "no score"
        fix = f"read {out}/harness.log; a judge that does not answer leaves no score"
        raise SayoError(
            "E10",
            f"the harness gave no score for {benchmark.name}",
            where=" ".join(benchmark.tasks),
            got=got,
            wanted=benchmark.metric or "a number",
            fix=fix,
        )
    questions = sum(samples[0]["n-samples"][task]["effective"] for task in benchmark.tasks)
    return [_row(benchmark, fmean(map(fmean, scores[m])) * benchmark.scale, questions, m, scores[m]) for m in wanted]


def _row(benchmark: Benchmark, score: float | None, questions: int, metric: str, samples: list[Any]) -> dict[str, Any]:
    name = benchmark.name if benchmark.metric or not metric else f"{benchmark.name} {metric} (as the harness gives it)"
    return {
        "benchmark": name,
        "score": score,
        "questions": questions,
        "tasks": benchmark.tasks,
        "metric": metric,
        "prompt": benchmark.prompt,
        "judge": " ".join(benchmark.judge),
        "samples": samples,
        "paper": benchmark.numbers,
        "note": benchmark.note,
        "left_out": benchmark.left_out,
    }
