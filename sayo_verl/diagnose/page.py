"""The files of a diagnosis: ``report.html``, a PNG and a CSV per finding, ``summary.json``."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sayo_verl import __version__
from sayo_verl.diagnose.analysis import Finding, Line
from sayo_verl.estimates import Estimate
from sayo_verl.view.figure import COLOURS, FAINT, GREY, inline, style
from sayo_verl.view.page import page, table, text
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.viewer import mount

STYLE: Any = style()
WIDTH, HEIGHT = 4.8, 3.4  # inches of a panel; a phone shows it whole
LONG = 15  # rows of a table that is shown folded
REPORT, SUMMARY = "report.html", "summary.json"
Example = tuple[str, SeenPrompt, SeenResponse]  # what it is an example of


def write_files(
    out: Path,
    title: str,
    facts: Sequence[str],
    first: Sequence[str],
    findings: Sequence[Finding],
    examples: Sequence[Example],
    settings: Mapping[str, Any],
) -> Path:
    """Write everything; the page last.

    Args:
        out: folder.
        title: of the page.
        facts: sentences on what was run.
        first: the sentences that matter.
        findings: in the order of the page.
        examples: responses to look at.
        settings: of the run, for ``summary.json``.

    Returns:
        The page.
    """
    with matplotlib.rc_context(STYLE):
        for finding in findings:
            if finding.left_out:
                for suffix in (".csv", ".png"):  # of an earlier run of this folder
                    (out / f"{finding.name}{suffix}").unlink(missing_ok=True)
                continue
            _write_csv(out / f"{finding.name}.csv", finding)
            if finding.panels or finding.grids:
                draw(finding).savefig(
                    out / f"{finding.name}.png", dpi=160, facecolor="white", metadata={"Software": None}
                )
        body, data = _body(title, facts, first, findings, examples)
    summary = {
        "version": __version__,
        "settings": settings,
        "sentences": list(first),
        "findings": {
            f.name: {
                "sentences": list(f.sentences),
                "left_out": f.left_out or None,
                "estimates": {name: _numbers(estimate) for name, estimate in f.facts.items()},
            }
            for f in findings
        },
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    file = out / REPORT
    file.write_text(page(title, body, data=data, viewer=bool(examples)), encoding="utf-8")
    return file


def _numbers(estimate: Estimate) -> dict[str, float | int | None]:
    finite = {name: getattr(estimate, name) for name in ("value", "low", "high")}
    return {name: None if math.isnan(v) else v for name, v in finite.items()} | {"n": estimate.n}


def _write_csv(file: Path, finding: Finding) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(finding.header)
        writer.writerows(["" if isinstance(v, float) and math.isnan(v) else v for v in row] for row in finding.rows)


# ---------------------------------------------------------------------------------------------------------- the page


def _body(
    title: str,
    facts: Sequence[str],
    first: Sequence[str],
    findings: Sequence[Finding],
    examples: Sequence[Example],
) -> tuple[str, dict[str, Any]]:
    parts = [f"<h1>{text(title)}</h1>"]
    parts += [f"<p><strong>{text(sentence)}</strong></p>" for sentence in first]
    parts += [f'<p class="note">{text(" ".join(facts))}</p>']
    shown = [f for f in findings if not f.left_out]
    links = " · ".join(f'<a href="#{f.name}">{text(f.title)}</a>' for f in shown)
    extra = ' · <a href="#examples">Responses to look at</a>' if examples else ""
    parts.append(f'<nav class="note">{links}{extra}</nav>')
    for finding in shown:
        parts.append(f'<section id="{finding.name}"><h2>{text(finding.title)}</h2>')
        parts += [f"<p>{text(sentence)}</p>" for sentence in finding.sentences]
        drawn = [inline(figure, f"{finding.title}. {panel}") for panel, figure in _figures(finding)]
        if drawn:
            parts.append(f'<div style="display:flex;flex-wrap:wrap;gap:1rem 2rem">{"".join(drawn)}</div>')
        if finding.table:
            head, *rows = [[text(cell) for cell in row] for row in finding.table]
            long = len(rows) > LONG
            parts.append(
                f"<details><summary>{len(rows)} numbers</summary>{table(head, rows)}</details>"
                if long
                else table(head, rows)
            )
        files = f"{finding.name}.csv" + (f", {finding.name}.png" if drawn else "")
        needed = [need for need in finding.needs if need in ("boxes", "a ground truth")]
        needs = f"Needs {' and '.join(needed)}. " if needed else ""
        reference = f"{finding.reference}. " if finding.reference else ""
        parts.append(f'<p class="note">{text(reference + needs)}Files: {text(files)}</p></section>')
    data: dict[str, Any] = {}
    if examples:
        parts.append(
            '<section id="examples"><h2>Responses to look at</h2><p>The responses whose tokens look most and least at '
            "the target, among right and wrong answers. Point at a word.</p>"
        )
        for n, (label, prompt, response) in enumerate(examples):
            html, islands = mount(f"example{n}", prompt, {"": [response]}, budget=1_500_000)
            parts.append(f"<h3>{text(label)}</h3>{html}")
            data |= islands
        parts.append("</section>")
    missing = [f for f in findings if f.left_out]
    if missing:
        parts.append("<h2>Left out</h2>")
        parts += [f"<p>{text(f.title)}: {text(f.left_out)}.</p>" for f in missing]
    parts.append(
        "<h2>How to read this</h2><p>R_a compares the attention of a token on a visual token of the target with that "
        "on an average visual token of the image: 0.5 is no preference, 1 is the target alone. It is taken of each "
        "token alone and then averaged, because R_a of pooled tokens grows with their number although nobody looks "
        "differently. Numbers in brackets are 95 % intervals over questions: a bootstrap, or Student's t of the "
        "jackknife below 10 questions. Many things are "
        "compared here, so one interval in twenty misses the truth. A correlation does not say what causes what.</p>"
    )
    return "\n".join(parts), data


# ------------------------------------------------------------------------------------------------------- the figures


def draw(finding: Finding) -> Figure:
    """All panels of a finding side by side, under ``STYLE``."""
    count = len(finding.panels) or len(finding.grids)
    figure = Figure(figsize=(WIDTH * count, HEIGHT), layout="constrained")
    for n, axis in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        _panel(axis, finding, n)
    return figure


def _figures(finding: Finding) -> list[tuple[str, Figure]]:
    """One figure per panel, with its title."""
    drawn = []
    for n, title in enumerate([panel[0] for panel in finding.panels] or finding.grids):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        _panel(figure.subplots(), finding, n)
        drawn.append((title, figure))
    return drawn


def _panel(axis: Axes, finding: Finding, n: int) -> None:
    if finding.grids:
        _grid(axis, *list(finding.grids.items())[n], [int(row[0]) for row in finding.rows])
        return
    title, x_label, y_label, guide = finding.panels[n]
    axis.set_title(title)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    lines = [line for line in finding.lines if line.panel == n]
    for i, line in enumerate(lines):
        _line(axis, line, bool(finding.bars), (i - (len(lines) - 1) / 2) * 0.14)
    if finding.bars:
        axis.set_xticks(range(len(finding.bars)), finding.bars)
        axis.set_xlim(-0.5, len(finding.bars) - 0.5)
    elif all(float(x).is_integer() for line in lines for x in line.x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(y=0.16)
    axis.grid(axis="y")
    axis.set_axisbelow(True)
    if guide is not None:
        axis.axhline(guide[0], color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1, label=guide[1])
    if len(lines) > 1 or guide is not None:
        axis.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2, borderaxespad=0)


def _line(axis: Axes, line: Line, apart: bool, shift: float) -> None:
    """A curve with its intervals as a band; single points with bars where the places are names."""
    x = np.array(line.x, float) + (shift if apart else 0)
    y, low, high = (np.array([getattr(v, name) for v in line.y]) for name in ("value", "low", "high"))
    colour, known = COLOURS[line.colour % len(COLOURS)], np.isfinite(low)
    shape: dict[str, Any] = {
        "linestyle": "none" if apart else "--" if line.dashed else "-",
        "color": colour,
        "label": line.label,
    }
    axis.plot(x, y, marker="o", markersize=4, markerfacecolor="#ffffff" if line.dashed else colour, **shape)
    if apart:
        axis.vlines(x[known], low[known], high[known], color=colour, linewidth=1.5, zorder=1)
    else:
        axis.fill_between(x[known], low[known], high[known], color=colour, alpha=0.15, linewidth=0)


def _grid(axis: Axes, title: str, values_LH: np.ndarray, layers: Sequence[int]) -> None:
    """Layers downwards, heads across."""
    L, H = values_LH.shape
    numbers = list(dict.fromkeys(layers))
    shown = axis.imshow(values_LH, aspect="auto", cmap="viridis", interpolation="nearest")
    axis.set_title(title)
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    step = max(1, math.ceil(L / 8))
    axis.set_yticks(range(0, L, step), [str(n) for n in numbers[::step]])
    axis.set_xticks(range(0, H, max(1, math.ceil(H / 8))))
    bar = axis.figure.colorbar(shown, ax=axis)
    bar.outline.set_edgecolor(FAINT)
