"""A comparison of runs for a terminal, as Markdown, and as a page."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sayo_verl.estimates import Estimate
from sayo_verl.report import catalogue as c
from sayo_verl.report.compare import Comparison, Row
from sayo_verl.report.groups import Group
from sayo_verl.report.panels import WINDOW, drawn, panel_figure
from sayo_verl.report.recorded import by_prompt
from sayo_verl.report.verdict import plain, prompt_key
from sayo_verl.view.figure import COLOURS, style
from sayo_verl.view.page import page, table, text
from sayo_verl.view.seen import SeenPrompt, SeenResponse
from sayo_verl.view.store import read_steps
from sayo_verl.view.viewer import mount

_NONE = "–"  # noqa: RUF001 (a dash in an empty cell)
MOST_PROMPTS = 2  # shown side by side
MAPS_BUDGET = 5_000_000


def intro(shown: Comparison) -> list[str]:
    """What the numbers are, as sentences."""
    first, last = shown.steps
    baseline = shown.groups[shown.baseline].label
    chosen = f"The baseline is {baseline}" + (", chosen automatically (--baseline)." if shown.automatic else ".")
    intervals = "Brackets: 95 % interval over seeds, by Student's t; one seed has none."
    if not any(len(group.members) > 1 for group in shown.groups):
        intervals = "Each group has one run (n=1), so no difference can be told from the noise between seeds."
    said = [f"Means of the training steps {first} to {last}. {intervals}"]
    return [*said, chosen] if len(shown.groups) > 1 else said


def verdict(shown: Comparison) -> list[str]:
    """The difference in task reward to the baseline, as sentences."""
    said = ["These runs are not comparable (reasons above)."] if shown.unfair else []
    reward = next((row for row in shown.rows if row.text == c.SCORE.label), None)
    if reward is None:
        return [*said, "The task reward (critic/score/mean) was not measured in the last steps that all runs have."]
    base = shown.groups[shown.baseline].label
    for group, difference, how in zip(shown.groups, reward.differences, shown.pairing, strict=True):
        if difference is None or math.isnan(difference.value):
            continue
        number = f"{_difference(difference, reward).rstrip('*')}, {how}, n={difference.n}"
        way = "higher" if difference.value > 0 else "lower"
        if math.isnan(difference.low):
            said.append(f"{group.label} minus {base}: task reward {number}; one seed cannot show a difference.")
        elif difference.excludes(0):
            said.append(f"{group.label}: task reward clearly {way} than {base} ({number}).")
        else:
            said.append(f"{group.label}: no clear difference in task reward to {base} ({number}).")
    return said


def header(shown: Comparison, first: str) -> list[str]:
    return [first, *(f"{group.label} (n={len(group.members)})" for group in shown.groups)]


def cells(shown: Comparison, rows: Sequence[Row]) -> list[list[str]]:
    """Means, as texts."""
    return [
        [row.text, *(_cell(cell, row, len(g.members)) for cell, g in zip(row.cells, shown.groups, strict=True))]
        for row in rows
    ]


def differences(shown: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the differences to the baseline; a star marks an interval without 0."""
    others = [i for i in range(len(shown.groups)) if i != shown.baseline]
    head = ["minus the baseline", *(f"{shown.groups[i].label} ({shown.pairing[i]})" for i in others)]
    rows = []
    for row in (*shown.rows, *shown.cost):
        found = [_difference(row.differences[i], row) for i in others]
        if set(found) != {_NONE}:
            rows.append([row.text, *found])
    return head, rows


def tables(shown: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of every table."""
    yield "Final table", header(shown, "metric"), cells(shown, shown.rows)
    if len(shown.groups) > 1:
        yield "Differences (*: the interval does not contain 0)", *differences(shown)
    if shown.cost:
        yield "Cost per step (median)", header(shown, ""), cells(shown, shown.cost)


def print_comparison(shown: Comparison, console: Console) -> None:
    """Print all tables and remarks."""
    for reason in shown.unfair:
        console.print(f"[bold red]not comparable:[/] {escape(reason)}", soft_wrap=True, highlight=False)
    for title, head, rows in tables(shown):
        made = Table(title=title, title_justify="left", header_style="bold")
        for i, column in enumerate(head):
            made.add_column(escape(column), justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*map(escape, row))
        console.print(made)
    for sentence in (*verdict(shown), *intro(shown), *shown.notes):
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def markdown(shown: Comparison) -> str:
    """The comparison as Markdown."""
    lines = ["# Comparison of runs", "", *_unfair(shown), *(f"- {_plain(sentence)}" for sentence in verdict(shown)), ""]
    for title, head, rows in tables(shown):
        lines += [f"## {title}", "", _line(head), "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
        lines += [*map(_line, rows), ""]
    lines += [f"- {_plain(sentence)}" for sentence in (*intro(shown), *shown.notes)]
    lines += ["", *(f"- {_plain(g.label)}: {', '.join(f'`{run.path}`' for run in g.runs)}" for g in shown.groups)]
    return "\n".join(lines) + "\n"


def comparison_page(shown: Comparison) -> str:
    """The comparison as a page."""
    unfair = ""
    if shown.unfair:
        reasons = "".join(f"<li>{text(reason)}</li>" for reason in shown.unfair)
        unfair = f'<p class="warn"><b>These runs are not comparable:</b></p><ul class="warn">{reasons}</ul>'
    said = "".join(f"<li>{text(sentence)}</li>" for sentence in verdict(shown))
    meant = "".join(f'<p class="note">{text(sentence)}</p>' for sentence in intro(shown))
    body = [f"<h1>Comparison of runs</h1>{unfair}<ul>{said}</ul>{meant}"]
    for title, head, rows in tables(shown):
        made = table([text(cell) for cell in head], [[text(row[0]), *map(_aligned, row[1:])] for row in rows])
        body.append(f"<h2>{text(title)}</h2>{made}")
    body.append(_curves(shown))
    if shown.notes:
        body.append("<h2>Remarks</h2><ul>" + "".join(f"<li>{text(note)}</li>" for note in shown.notes) + "</ul>")
    folders = [
        [text(group.label), f"<span>{text(run.path)}</span>", text(c.estimator_of(run)), text(run.steps[-1])]
        for group in shown.groups
        for run in group.runs
    ]
    body.append(f"<h2>Runs</h2>{table(['group', 'folder', 'method', 'steps'], folders)}")
    beside, data = _side_by_side(shown.groups)
    return page("Comparison of runs", "\n".join([*body, beside]), data=data, viewer=bool(data))


def _curves(shown: Comparison) -> str:
    groups: Mapping[str, Sequence[Any]] = {group.label: group.runs for group in shown.groups[: len(COLOURS)]}
    if len(groups) == 1:
        groups = {"": next(iter(groups.values()))}
    panels = c.panels_of([run for runs in groups.values() for run in runs])
    with matplotlib.rc_context(style()):
        figures = [(panel_figure(panel, groups), f"{plain(panel.title)} by training step") for panel in panels]
        shapes = drawn(figures)
    key = " ".join(
        f'<span style="white-space:nowrap;margin-right:1.2rem"><span aria-hidden="true" style="display:inline-block;'
        f'width:1.6rem;height:.25rem;vertical-align:middle;background:var(--c{i})"></span> {text(label)} '
        f"(n={len(runs)})</span>"
        for i, (label, runs) in enumerate(groups.items())
        if label
    )
    more = len(shown.groups) - len(groups)
    left_out = f" {more} more groups are in the tables only." if more else ""
    return (
        f"<h2>Curves</h2><p>{key}</p>{shapes}"
        f'<p class="note">Bold: mean of the last {WINDOW} steps; over several seeds, their mean; shaded: '
        f"95 % interval.{left_out}</p>"
    )


def _side_by_side(groups: Sequence[Group]) -> tuple[str, dict[str, Any]]:
    """Viewers of prompts that several groups recorded at the same step; the slider moves between the groups."""
    recorded: dict[Hashable, tuple[SeenPrompt, dict[str, dict[int, Sequence[SeenResponse]]]]] = {}
    for group in groups:
        run = next((run for run in group.runs if (run.path / "rollouts").is_dir()), None)
        for prompt, of_steps in by_prompt(read_steps(run.path, [])) if run else []:
            entry = recorded.setdefault(prompt_key(prompt), (prompt, {}))
            entry[1][group.label] = {step.step: responses for step, responses in of_steps}
    body, data = "", dict[str, Any]()
    shared = [(prompt, of_group) for prompt, of_group in recorded.values() if len(of_group) > 1]
    for i, (prompt, of_group) in enumerate(shared[:MOST_PROMPTS]):
        steps = set.intersection(*(set(steps) for steps in of_group.values()))
        if not steps:
            continue
        states = {f"{label}, step {max(steps)}": responses[max(steps)] for label, responses in of_group.items()}
        shown, islands = mount(f"beside-{i}", prompt, states, budget=MAPS_BUDGET // MOST_PROMPTS)
        body, data = body + shown, data | islands
    left_out = len(recorded) - len(shared)
    said = f" {left_out} prompts are left out: other groups have other pictures, grids or boxes." if left_out else ""
    title = (
        f"<h2>The same prompt in the groups</h2><p>One run per group. The slider moves between the groups.{said}</p>"
    )
    return (title + body, data) if body else ("", {})


def _cell(cell: Estimate, row: Row, members: int) -> str:
    if math.isnan(cell.value):
        return _NONE
    some = f" (n={cell.n})" if cell.n != members else ""
    return (cell.text(row.decimals) if not math.isnan(cell.low) else f"{cell.value:.{row.decimals}f}") + some


def _difference(one: Estimate | None, row: Row) -> str:
    if one is None or math.isnan(one.value):
        return _NONE
    if math.isnan(one.low):
        return f"{one.value:+.{row.decimals}f}"
    return one.text(row.decimals, sign=True) + ("*" if one.excludes(0) else "")


def _aligned(cell: str) -> str:
    return f'<span style="white-space:nowrap">{text(cell)}</span>'


def _unfair(shown: Comparison) -> list[str]:
    if not shown.unfair:
        return []
    return ["**These runs are not comparable:**", "", *(f"- {_plain(reason)}" for reason in shown.unfair), ""]


def _plain(sentence: str) -> str:
    """A text for Markdown, which renders HTML."""
    return sentence.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")


def _line(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, row)) + " |"
