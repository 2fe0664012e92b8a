"""Answers of a model over a set, scored and measured, one file per row; an interrupted run goes on where it was.

Random numbers are seeded per row, so a run that was interrupted gives the same responses.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sayo_verl.command_line import progress_bar
from sayo_verl.data.reading import open_parquet, read_rows
from sayo_verl.diagnose.answers import Answer, needs_of, read_row, usable_methods, whole, write_row
from sayo_verl.diagnose.config import Asked
from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.look.answer import accuracy_of
from sayo_verl.look.observe import Observer
from sayo_verl.look.prompt import Prompt
from sayo_verl.methods import Needs
from sayo_verl.probe.statistics import log_probs_key

SETTINGS = "settings.json"
ROW_FILE = re.compile(r"row-\d{6}\.npz")
WEIGHTS = ("*.safetensors", "*.bin", "config.json")


class Row(NamedTuple):
    """A row of the set, its number, and words that name it."""

    number: int
    where: str
    values: Mapping[str, Any]


def rows_of(asked: Asked) -> Iterator[Row]:
    """The rows that are asked for, with or without an image."""
    number = 0
    for path in asked.files():
        file = open_parquet(path)
        for i, row in enumerate(read_rows(file, path, file.schema_arrow.names)):
            if number == asked.rows:
                return
            yield Row(number, f"row {i} of {path.name}", row)
            number += 1


def collect(observer: Observer, asked: Asked, out: Path) -> list[Answer]:
    """The responses of a model to the rows of a set; those that ``out`` holds already are read from there.

    Args:
        observer: of the model, which is loaded if a row is missing.
        asked: which rows, and how the model answers.
        out: folder of this model's files.

    Raises:
        SayoError: W30 for a set without rows, W31 for one without images, W32 if ``out`` was made with other settings,
            W33 if the model writes no response, W36 for a folder that cannot be written, and the first fault of a row.
    """
    methods, _ = usable_methods()
    needs = needs_of(methods.values())
    settings = _settings(observer.name, asked, needs)
    check_settings(out, settings)
    rows = list(rows_of(asked))
    with_image = [row for row in rows if len(row.values.get("images") or [])]
    where = str(asked.data)
    raise_first(
        [
            Rule("W30", not rows, "the set has no row", where, "name a parquet file with rows"),
            Rule("W31", not with_image, "no row of the set has an image", where,
                 "name a set with images; attention to images is what is measured", got=f"{len(rows)} rows"),
        ]
    )  # fmt: skip
    answers: list[Answer] = []
    with progress_bar() as progress:
        bar = progress.add_task(f"{Path(observer.name).name}: answering and measuring", total=len(with_image))
        for row in with_image:
            file = out / f"row-{row.number:06d}.npz"
            stored = read_row(file)
            if stored is None:
                stored = list(_measured(observer, row, asked, needs))
                _store(file, stored, settings)
            answers += stored
            progress.advance(bar)
    if not answers:
        raise SayoError(
            "W33",
            "the model gives no response that can be measured",
            where=f"--model {observer.name}",
            got=f"special tokens only, {len(with_image)} rows x {asked.samples} responses",
            fix="raise --max-new-tokens, or look at one row: sayo look",
        )
    return answers


def _settings(model: str, asked: Asked, needs: Needs) -> dict[str, Any]:
    """All that decides what a row's file holds."""
    folder = Path(model)
    weights = sorted(f for pattern in WEIGHTS for f in folder.glob(pattern)) if folder.is_dir() else []
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model,
        "weights": [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in weights],
        "data": [[str(f.resolve()), f.stat().st_size] for f in asked.files() if f.exists()],
        "samples": asked.samples,
        "temperature": asked.temperature,
        "max_new_tokens": asked.max_new_tokens,
        "seed": asked.seed,
        "statistics": sorted(s.key for s in needs.statistics.statistics),
        "interventions": [intervention.key for intervention in needs.interventions],
    }


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the measured rows of a folder were made with these settings.

    Settings without a measured row are those of a run that failed before its first one: they bind nobody.

    Raises:
        SayoError: W32 for other settings, or for a folder with files of something else.
    """
    file = folder / SETTINGS
    with writable(folder):
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    rows = [name for name in names if ROW_FILE.fullmatch(name)]
    if not rows and set(names) <= {SETTINGS}:
        return
    found = _read_settings(file) if rows else None
    if found is None:
        raise SayoError(
            "W32",
            "the folder holds files, but none of a diagnosis",
            where=str(folder),
            wanted=f"an empty folder, or one with a readable {SETTINGS}",
            fix="choose another --out",
        )
    changed = {name: found.get(name) for name, value in settings.items() if found.get(name) != value}
    if changed:
        raise SayoError(
            "W32",
            "this diagnosis was started with other settings",
            where=str(file),
            got={name: settings[name] for name in changed},
            wanted=changed,
            fix=f"give those settings, or another --out; to start over: rm -r {folder}",
        )


def _read_settings(file: Path) -> dict[str, Any] | None:
    """None for a missing or invalid file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _store(file: Path, answers: Sequence[Answer], settings: Mapping[str, Any]) -> None:
    """Write the file of a row; the first row of a folder brings the settings with it."""
    with writable(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        if _read_settings(file.with_name(SETTINGS)) != settings:
            with whole(file.with_name(SETTINGS)) as out:
                out.write(json.dumps(settings, indent=1).encode())
        write_row(file, answers)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """W36 for what the file system raises while results are written into a folder."""
    try:
        yield
    except OSError as error:
        raise SayoError(
            "W36",
            f"the results cannot be written ({error.strerror or error})",
            where=str(folder),
            fix="free space, or name a folder that can be written with --out; finished rows are kept",
        ) from error


def _measured(observer: Observer, row: Row, asked: Asked, needs: Needs) -> Iterator[Answer]:
    """The responses to one row that have more than special tokens."""
    prompt, tokenizer = observer.prompt(row.values, row.where), observer.processor.tokenizer
    special, first = set(tokenizer.all_special_ids), True
    seed = int.from_bytes(hashlib.sha256(f"{asked.seed}/{row.number}".encode()).digest()[:7])
    responses = observer.answer(
        [prompt] * asked.samples, max_new_tokens=asked.max_new_tokens, temperature=asked.temperature, seed=seed
    )
    for sample, ids in enumerate(responses):
        if special.issuperset(ids):
            continue
        text = tokenizer.decode(ids, skip_special_tokens=True)
        measured = observer.measure(prompt, ids, needs.statistics, interventions=needs.interventions)
        values = {s.key: tensor.numpy() for s, tensor in measured.statistics.items()}
        values |= {"entropy": measured.entropy.numpy(), "log_probs": measured.log_probs.numpy()}
        values |= {log_probs_key(i): changed.numpy() for i, changed in measured.counterfactuals.items()}
        if first:
            values |= _seen(observer, prompt, ids)
        yield Answer(
            row=row.number,
            sample=sample,
            where=row.where,
            question=prompt.seen.question,
            truth=prompt.seen.answer,
            text=text,
            ids=list(ids),
            accuracy=accuracy_of(row.values, text),
            image_tokens=measured.image_tokens,
            region_tokens=measured.region_tokens,
            finished=ids[-1] in observer.ends,
            values=values,
        )
        first = False


def _seen(observer: Observer, prompt: Prompt, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Numbers per layer and head, and sinks."""
    seen = observer.observe(prompt, ids, maps=("mean",))
    assert seen.heads is not None
    values = {f"heads/{name}": array for name, array in seen.heads.values.items()}
    values["heads/layers"] = np.array(seen.heads.layers)
    values |= {f"seen/{name}": seen.values[name] for name in ("image_mass", "sink_mass", "border_mass")}
    mean = next(maps for maps in seen.maps if maps.name == "mean")
    total_V = mean.total.unpack()[0]
    steady_V = np.zeros(len(total_V), bool) if mean.steady is None else mean.steady
    values["seen/steady_share"] = np.array(total_V[steady_V].sum() / max(total_V.sum(), 1e-30))
    values["seen/border_chance"] = np.array(seen.facts["border_chance"])
    return values
