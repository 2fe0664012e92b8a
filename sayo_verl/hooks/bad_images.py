"""Rows whose image cannot be decoded: named, and left out if ``sayo.bad_rows`` allows it.

verl opens the images of a row lazily. One that is cut short fails where the row is pickled: in the trainer, or in a
worker of the data loader, where the error is lost and the run waits without end. Here a row is decoded where it is
read. verl decodes it there next, so this costs nothing.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

from sayo_verl.errors import SayoError
from sayo_verl.hooks.rollout_errors import broken_image, row_name
from sayo_verl.report.causes import one_line

ALLOWED = "_sayo_bad_rows"  # attribute of the training data set: rows that may be left out
LEFT_OUT = "sayo_left_out"  # key of extra_info, which the trainer removes: rows in whose place this one is


class LeftOut(NamedTuple):
    """A row that was left out: its position in the data, its name as ``row_name`` gives it, its image and error."""

    position: int
    name: str
    image: str


def bad_image(row: str, image: str, allowed: int = 0, left_out: int = 0) -> SayoError:
    """X24."""
    return SayoError(
        "X24",
        "an image cannot be decoded" if not left_out else "too many rows have an image that cannot be decoded",
        where=row,
        got=image + (f"; {left_out} rows were left out before" if left_out else ""),
        wanted=f"at most {allowed} such rows (sayo.bad_rows)" if allowed else None,
        fix="replace the image, or remove the row; sayo.preflight_images=1000000 decodes every image before the run; "
        f"sayo.bad_rows={max(10, 2 * allowed)} leaves out and counts so many rows of the training data",
    )


def name_bad_images(rl_dataset: ModuleType) -> None:
    """Make verl's data set decode the images of a row, and put the next row in the place of a bad one.

    Args:
        rl_dataset: ``verl.utils.dataset.rl_dataset``.
    """
    cls: Any = rl_dataset.RLHFDataset
    read = cls.__getitem__

    @functools.wraps(read)
    def __getitem__(self: Any, item: int) -> dict:
        allowed = int(getattr(self, ALLOWED, 0))
        left_out: list[LeftOut] = []
        while True:
            position = (item + len(left_out)) % len(self)
            row, image = _read(read, self, position)
            if image is None:
                break
            if len(left_out) >= min(allowed, len(self) - 1):
                raise bad_image(row_name(row), image, allowed)
            left_out.append(LeftOut(position, row_name(row), image))
        if left_out:
            row["extra_info"] = {**row["extra_info"], LEFT_OUT: left_out}
        return row

    cls.__getitem__ = __getitem__


def _read(read: Any, dataset: Any, item: int) -> tuple[dict, str | None]:
    """The row, and what is wrong with its images. verl raises for one whose header it cannot read."""
    try:
        row = read(dataset, item)
    except OSError as error:
        return dataset.dataframe[item], one_line(error)
    # Paths are decoded by the agent loop only, which notes what fails.
    return row, broken_image(row["raw_prompt"], paths=False)


def take_left_out(batch: Any) -> list[LeftOut]:
    """Remove ``LEFT_OUT`` from a batch of prompts, and return the rows that were left out."""
    found: list[LeftOut] = []
    for info in batch["extra_info"] if "extra_info" in batch.keys() else ():
        info = getattr(info, "data", info)
        if isinstance(info, dict):
            found += info.pop(LEFT_OUT, [])
    return found
