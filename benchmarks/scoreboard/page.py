"""docs/trust.md from benchmarks/results/trust.json and the tables of cases."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cost.cells import table

from scoreboard import cases
from scoreboard.figures import FIGURES

SHOWN = 100  # characters of a changed line
COMMAND = "python benchmarks/trust.py --only {name}"
HEAD = """# Trust

What was tested, how much of it holds, and what is open. `benchmarks/trust.py` writes this page.
`bash scripts/nightly.sh` measures all figures; each line names the command for its own. A figure that was not measured
says so.
"""
SITUATIONS = """## What happens when something goes wrong

On the real stack, with the tiny task on two CPU cores. **run**: seen in a run. **unit**: the real function or class
called alone. **dry**: `sayo.dry_run=True`. **read**: from the source, not run.
"""
MUTATION = """## Mutants that no test notices

A mutant is a copy of the code with one small change. {run} of {population:,} were drawn (seed {seed}). The score is
{low:.0f} to {high:.0f} % at 95 % confidence. Mutants that change only the words of errors are not drawn. {equivalent}
of the survivors change no result, for the reasons below; they count as survivors.
"""


def write_page(path: Path, stored: dict[str, Any]) -> None:
    """Write the page.

    Args:
        path: the page.
        stored: figures by name, and the date of the last full run.
    """
    path.write_text("\n".join(page(stored)).rstrip() + "\n")


def page(stored: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    figures = stored["figures"]
    lines = [HEAD, f"Last full run: {stored.get('full_run') or 'none yet'}.", "", *_open(figures), *_board(figures)]
    lines += [*_families(figures.get("numerics")), *_bad_inputs(figures.get("bad_inputs")), *_situations()]
    lines += [
        *_faults(),
        *_contract(figures.get("contract")),
        *_supply(figures.get("supply")),
        *_mutants(figures.get("mutation")),
    ]
    return lines


def _open(figures: dict[str, Any]) -> list[str]:
    """Open cases, and figures that were not measured."""
    lines = [f"- {line}" for line in cases.open_cases()]
    lines += [f"- {name}: not run ({f['not_run']})" for name, f in cases.table("faults").items() if "not_run" in f]
    waiting = [(figure.title, figures.get(name)) for name, figure in FIGURES.items()]
    lines += [f"- {title}: {result_cell(found)}" for title, found in waiting if not found or "not_measured" in found]
    return ["## Open", "", *(lines or ["Nothing is open."]), ""]


def result_cell(figure: dict[str, Any] | None) -> str:
    """``141 of 141, 2 skipped; value`` or why there is none."""
    if figure is None:
        return "not measured"
    if "not_measured" in figure:
        return f"not measured ({figure['not_measured']})"
    count = f"{figure['passed']:,} of {figure['of']:,}" if "of" in figure else ""
    count += f", {figure['skipped']:,} skipped" if figure.get("skipped") else ""
    return "; ".join(filter(None, [count, figure.get("value", "")]))


def _board(figures: dict[str, Any]) -> list[str]:
    rows = []
    measured = sum(name in figures and "not_measured" not in figures[name] for name in FIGURES)
    for name, figure in FIGURES.items():
        found = figures.get(name)
        command = figure.command or COMMAND.format(name=name)
        rows.append(
            [
                figure.title,
                result_cell(found),
                f"`{command}`",
                *((found or {}).get(key, "") for key in ("date", "version")),
            ]
        )
    return [
        f"## Twelve figures, {measured} measured",
        "",
        *table(["figure", "result", "command", "date", "version"], rows),
    ]


def _families(figure: dict[str, Any] | None) -> list[str]:
    if not figure or "families" not in figure:
        return []
    rows = [
        [name, str(found["modes"]), f"{found['max_abs']:.1e}", f"{found['mean_signed']:+.1e}"]
        for name, found in figure["families"].items()
    ]
    head = [
        "family",
        "modes of the engine",
        "largest error",
        "mean signed error (of attention masses, the mode farthest from 0)",
    ]
    return ["## Numerics", "", "Tiny models with random weights in float32, all statistics.", "", *table(head, rows)]


def _bad_inputs(figure: dict[str, Any] | None) -> list[str]:
    inputs = cases.table("bad_inputs")
    outcomes = Counter(case["outcome"] for case in inputs.values())
    areas = {"D": "data", "M": "boxes to tokens", "P": "probe", "W": "weights", "C": "clusters", "I": "advantages"}
    areas |= {"L": "launch", "R": "resume", "O": "reports"}
    rows = []
    for letter, area in areas.items():
        mine = Counter(case["outcome"] for name, case in inputs.items() if name[0] == letter)
        rows.append([f"{area} ({letter})", *(str(mine[outcome] or "") for outcome in cases.OUTCOMES)])
    rows.append(["all", *(str(outcomes[outcome]) for outcome in cases.OUTCOMES)])
    where = (
        "[`benchmarks/scoreboard/bad_inputs.toml`](../benchmarks/scoreboard/bad_inputs.toml) lists each with its tests."
    )
    failed, skipped = ((figure or {}).get(key) for key in ("failed", "not_run"))
    return [
        "## Bad inputs",
        "",
        f"{len(inputs)} inputs by outcome. {where}",
        "",
        *table(["area", *cases.OUTCOMES], rows),
        *([f"Failed in the last run: {', '.join(failed)}.", ""] if failed else []),
        *([f"Skipped in the last run: {', '.join(skipped)}.", ""] if skipped else []),
    ]


def _situations() -> list[str]:
    rows = [
        [row["situation"], row["how"], row["outcome"], row["verdict"], str(row["date"])]
        for row in cases.table("situations").get("row", [])
    ]
    return [SITUATIONS, *table(["situation", "how", "outcome", "verdict", "date"], rows)]


def _faults() -> list[str]:
    rows = [
        [
            name,
            fault["fault"],
            "<br>".join(f"`{_short(test)}`" for test in fault.get("tests", [])) or f"not run: {fault['not_run']}",
        ]
        for name, fault in cases.table("faults").items()
    ]
    return ["## Injected faults", "", *table(["", "fault", "shown by"], rows)]


def _short(test: str) -> str:
    return test.partition("::")[2]


def _contract(figure: dict[str, Any] | None) -> list[str]:
    if not figure or "names" not in figure:
        return []
    rows = []
    for version, names in figure["names"].items():
        state = (
            "as recorded (installed here)"
            if version == figure["installed"]
            else figure["others"].get(version, "not measured")
        )
        rows.append([version, str(names), state])
    return ["## Names of verl that are used", "", *table(["verl", "names with signature and source", "state"], rows)]


def _supply(figure: dict[str, Any] | None) -> list[str]:
    if not figure or "packages" not in figure:
        return []
    other = ", ".join(f"{name} ({text})" for name, text in sorted(figure["other_licences"].items()))
    return [
        "## Supply chain",
        "",
        f"- Licences: {figure['packages']} installed packages are needed by `sayo-verl[cpu]`, directly or "
        "through others; tools of the tests are not counted. "
        f"Not permissive or not declared: {other or 'none'}.",
        f"- Advisories: {figure['audit']}.",
        "",
    ]


def interval(passed: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in per cent."""
    z, p = 1.96, passed / of
    centre, half = p + z * z / (2 * of), z * (p * (1 - p) / of + z * z / (4 * of * of)) ** 0.5
    return 100 * (centre - half) / (1 + z * z / of), 100 * (centre + half) / (1 + z * z / of)


def _mutants(figure: dict[str, Any] | None) -> list[str]:
    if not figure or "survivors" not in figure:
        return []
    judged = cases.table("equivalent_mutants")
    reasons, noticed = ({line[:SHOWN]: why for line, why in judged[key].items()} for key in ("reasons", "noticed"))
    rows, equivalent = [], 0
    for name, change in figure["survivors"].items():
        new = [line[1:].strip() for line in change.splitlines() if line[:1] == "+"]
        shown = (new[0] if new else change).replace("|", "\\|")[:SHOWN]
        since = f"it does; noticed by `{noticed[shown]}`, written since" if shown in noticed else ""
        rows.append([_place(name), f"`{shown}`", reasons.get(shown, since)])
        equivalent += shown in reasons
    low, high = interval(figure["passed"], figure["of"])
    text = MUTATION.format(
        run=figure["of"],
        population=figure["population"],
        seed=figure["seed"],
        low=low,
        high=high,
        equivalent=equivalent,
    )
    return [text, *table(["where", "changed line", "why it changes no result, or what notices it"], rows)]


def _place(name: str) -> str:
    """``group.advantages`` of mutmut's name of a mutant."""
    module, _, function = name.removeprefix("sayo_verl.").rpartition(".")
    plain = function.partition("__mutmut_")[0].replace("xǁ", "").replace("ǁ", ".").removeprefix("x_")
    return f"{module}.{plain}"


def names() -> Sequence[str]:
    """The figures, in the order of the page."""
    return tuple(FIGURES)
