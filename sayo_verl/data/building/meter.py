"""Progress of a build on stderr, and a summary of its rows at the end."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sayo_verl.data.building.folder import Built, built, verl_flags
from sayo_verl.data.building.output import Output
from sayo_verl.data.rows import REASONS

EVERY = 10.0  # seconds between lines where stderr is no terminal


class Meter:
    """A bar where stderr is a terminal, else a line every ten seconds.

    Args:
        what: names the work.
        total: how many examples there will be, where that is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self.console = Console(stderr=True)
        self._last = self._begun = time.monotonic()
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[counts]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(what, total=total, counts="")

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, examples: int, rows: int, left_out: int) -> None:
        """The figures as they are now."""
        now = time.monotonic()
        if now - self._last < (0.1 if self._bar is not None else EVERY):
            return
        self._last = now
        of = f" of {self.total:,}" if self.total else ""
        counts = f"{examples:,}{of} examples, {rows:,} rows, {left_out:,} left out"
        if self._bar is not None:
            self._bar.update(self._task, completed=examples, counts=counts)
        else:
            self.say(f"{self.what}: {counts}, {now - self._begun:.0f} s")

    def say(self, text: str) -> None:
        """A line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def finished(output: Output, meter: Meter, work: Callable[[], None]) -> Built:
    """The folder as it is where it is finished, else after ``work``; shown, and closed in any case.

    Raises:
        KeyboardInterrupt: at Ctrl-C, after saying that the folder can be gone on with.
    """
    reused = output.manifest is not None
    try:
        if not reused:
            with meter:
                work()
    except KeyboardInterrupt:
        meter.say(f"interrupted: {output.folder} holds the finished shards; the same command resumes there")
        raise
    finally:
        output.close()
    assert output.manifest is not None
    made = built(output.folder, output.manifest, reused=reused)
    show_built(made, output.manifest, meter.console)
    return made


def show_built(made: Built, manifest: Mapping[str, Any], console: Console) -> None:
    """Rows, what was left out and why, the folder, and what to give to verl."""
    table = Table(title="rows", title_justify="left")
    for column in ("rows", "boxes", "", "what it means"):
        table.add_column(column, justify="right" if column in ("rows", "boxes") else "left", overflow="fold")
    tally = manifest["tally"]
    for split, rows in made.rows.items():
        table.add_row(f"{rows:,}", "", split, "written")
    table.add_row(f"{tally.get('without_boxes', 0):,}", "", "", "of these without a box")
    table.add_row("", f"{tally.get('boxes', 0):,}", "", "in these rows")
    for reason, rows in sorted(made.left_out.items(), key=lambda item: -item[1]):
        table.add_row(f"{rows:,}", "", reason, REASONS[reason])
    for reason, boxes in sorted(manifest["boxes_left_out"].items(), key=lambda item: -item[1]):
        table.add_row("", f"{boxes:,}", reason, REASONS[reason])
    for change, images in sorted(manifest["images"].items(), key=lambda item: -item[1]):
        table.add_row(f"{images:,}", "", "image changed", change)
    console.print(table)
    console.print(f"{'reused' if made.reused else 'made'} {made.folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(verl_flags(made.files), markup=False, highlight=False, soft_wrap=True)
    if not made.rows["val"]:
        console.print(
            "no image was held out: for validation rows set a higher --val-share and --overwrite",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
