"""Files of recorded rollouts: JSON of prompts and responses, and their images.

    RUN/rollouts/step-000010.json       the rollouts of the policy that has had 10 updates
    RUN/rollouts/images/HASH.png        the stored images, once each

A step is written under a temporary name and then renamed, so a reader sees all of it or nothing. A number that is not
finite is ``null`` in JSON and NaN after reading. float32 values survive exactly.

Shape suffixes: T response tokens, V visual tokens, L decoder layers, H query heads.
"""

import base64
import hashlib
import io
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sayo_verl.errors import SayoError
from sayo_verl.view.maps import Packed
from sayo_verl.view.seen import HeadTable, MapSet, SeenImage, SeenPrompt, SeenResponse
from sayo_verl.vision.grids import Tile

SCHEMA = 1
FOLDER, IMAGES = "rollouts", "images"
_URI = "data:image/png;base64,"

Recorded = tuple[SeenPrompt, Sequence[SeenResponse]]


@dataclass(frozen=True)
class RecordedStep:
    """One file.

    Attributes:
        step: updates that the policy has had; 0 is the policy before training.
        seconds: what the recording cost.
        written: seconds since 1970.
        prompts: each with its responses.
        notes: sentences for a reader, such as which weights generated the responses.
    """

    step: int
    seconds: float
    written: float
    prompts: tuple[tuple[SeenPrompt, tuple[SeenResponse, ...]], ...]
    notes: tuple[str, ...] = ()


def step_file(run: Path | str, step: int) -> Path:
    return Path(run) / FOLDER / f"step-{step:06d}.json"


def write_step(
    run: Path | str,
    step: int,
    prompts: Sequence[Recorded],
    seconds: float,
    notes: Sequence[str] = (),
) -> int:
    """Write the rollouts of one step; an earlier file of the same step is replaced.

    Args:
        run: the run's folder.
        step: updates that the policy has had.
        prompts: each with its responses.
        seconds: what the recording cost.
        notes: sentences for a reader.

    Returns:
        Bytes written, images that were there already left out.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    file = step_file(run, step)
    images = file.parent / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    written = 0

    def picture(image: Image.Image) -> str:
        nonlocal written
        digest = hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()
        name = f"{digest[:24]}.png"
        if not (images / name).exists():
            written += _write(images / name, _png(image))
        return name

    record = {
        "schema": SCHEMA,
        "step": step,
        "seconds": _number(seconds),
        "written": time.time(),
        "notes": list(notes),
        "prompts": [
            {"prompt": prompt_to_json(prompt, picture), "responses": [response_to_json(r) for r in responses]}
            for prompt, responses in prompts
        ],
    }
    return written + _write(file, json.dumps(record, allow_nan=False).encode())


def read_steps(run: Path | str, notes: list[str] | None = None) -> list[RecordedStep]:
    """Read all recorded steps of a run, in the order of their steps.

    A run that resumes an earlier checkpoint writes its steps again. Until it has reached a later step of the abandoned
    attempt, that file is older than the file of an earlier step. Such steps are left out.

    Args:
        run: the run's folder. Without recorded rollouts the list is empty.
        notes: gets a sentence for each file that is left out; None: the first invalid file raises.

    Raises:
        SayoError: see ``read_step``; only if ``notes`` is None.
    """
    pictures: dict[str, Image.Image] = {}
    steps: list[RecordedStep] = []
    for file in sorted((Path(run) / FOLDER).glob("step-*.json"), key=lambda file: (len(file.name), file.name)):
        try:
            steps.append(read_step(file, pictures))
        except SayoError as error:
            if notes is None:
                raise
            notes.append(str(error))
    kept: list[RecordedStep] = []
    abandoned: list[RecordedStep] = []
    newest = -math.inf
    for one in steps:
        (kept if one.written >= newest else abandoned).append(one)
        newest = max(newest, one.written)
    if notes is not None and abandoned:
        left = ", ".join(str(one.step) for one in abandoned)
        notes.append(f"recorded rollouts of an abandoned attempt are left out: steps {left}")
    return kept


def read_step(file: Path, pictures: dict[str, Image.Image] | None = None) -> RecordedStep:
    """Read one file.

    Args:
        file: of ``write_step``.
        pictures: images read so far by file name, so that steps share them; extended.

    Raises:
        SayoError: A27 if the file cannot be read, A28 if it is cut or invalid, A29 for another schema, A30 if an image
            cannot be read.
    """
    pictures = {} if pictures is None else pictures

    def picture(name: str) -> Image.Image:
        if name not in pictures:
            # the name alone, so that a file cannot name one outside the folder
            pictures[name] = _open(file.parent / IMAGES / Path(name).name, file)
        return pictures[name]

    try:
        record = json.loads(file.read_bytes())
    except OSError as error:
        raise SayoError(
            "A27",
            "recorded rollouts cannot be read",
            where=str(file),
            got=error.strerror,
            fix="make the file readable, or delete it",
        ) from error
    except ValueError as error:  # bad JSON and bad UTF-8
        raise _invalid(file, error) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise SayoError(
            "A29",
            "recorded rollouts have another schema",
            where=str(file),
            got=f"schema {schema!r}",
            wanted=f"schema {SCHEMA}",
            fix="read them with the version of sayo-verl that wrote them (run.json), or delete them",
        )
    try:
        prompts = []
        for pair in record["prompts"]:
            prompt = prompt_from_json(pair["prompt"], picture)
            responses = tuple(response_from_json(one) for one in pair["responses"])
            for one in responses:
                _check(prompt, one)
            prompts.append((prompt, responses))
        return RecordedStep(
            step=int(record["step"]),
            seconds=_back(record["seconds"]),
            written=float(record["written"]),
            prompts=tuple(prompts),
            notes=tuple(map(str, record["notes"])),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _invalid(file, f"{type(error).__name__}: {error}") from error


def prompt_to_json(prompt: SeenPrompt, picture: Callable[[Image.Image], str] | None = None) -> dict[str, Any]:
    """A prompt for JSON.

    Args:
        prompt: the prompt.
        picture: stores an image and returns its name; None: the image itself, as a ``data:`` address of a PNG.
    """
    named = picture or (lambda image: _URI + base64.b64encode(_png(image)).decode())
    return {
        "where": prompt.where,
        "question": prompt.question,
        "answer": prompt.answer,
        "region_tokens": prompt.region_tokens,
        "region": None if prompt.region is None else np.flatnonzero(prompt.region).tolist(),
        "images": [
            {
                "picture": named(image.picture),
                "tiles": [[t.rows, t.cols, t.x0, t.y0, t.x1, t.y1] for t in image.tiles],
                "boxes": [list(box) for box in image.boxes],
                "names": list(image.names),
            }
            for image in prompt.images
        ],
    }


def prompt_from_json(record: Mapping[str, Any], picture: Callable[[str], Image.Image] | None = None) -> SeenPrompt:
    """The reverse of ``prompt_to_json``; ``picture`` opens an image by its name."""
    images = []
    for image in record["images"]:
        name = image["picture"]
        if name.startswith(_URI):
            opened = Image.open(io.BytesIO(base64.b64decode(name.removeprefix(_URI)))).convert("RGB")
        elif picture is not None:
            opened = picture(name)
        else:
            raise ValueError(f"no folder for the image {name!r}")
        boxes = tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in image["boxes"])
        images.append(SeenImage(opened, tuple(Tile(*tile) for tile in image["tiles"]), boxes, tuple(image["names"])))
    tokens = sum(image.tokens for image in images)
    return SeenPrompt(
        where=record["where"],
        question=record["question"],
        images=tuple(images),
        answer=record["answer"],
        region_tokens=int(record["region_tokens"]),
        region=_mask(record["region"], tokens),
    )


def response_to_json(response: SeenResponse) -> dict[str, Any]:
    """A response for JSON."""
    return {
        "pieces": list(response.pieces),
        "words": [list(word) for word in response.words],
        "values": {name: _numbers(values_T) for name, values_T in response.values.items()},
        "maps": [_map_to_json(one) for one in response.maps],
        "facts": {
            name: fact if isinstance(fact, str) else _number(float(fact)) for name, fact in response.facts.items()
        },
        "notes": list(response.notes),
        "heads": None if response.heads is None else _heads_to_json(response.heads),
    }


def response_from_json(record: Mapping[str, Any]) -> SeenResponse:
    """The reverse of ``response_to_json``."""
    return SeenResponse(
        pieces=tuple(record["pieces"]),
        words=tuple((int(start), int(end)) for start, end in record["words"]),
        values={name: _array(values) for name, values in record["values"].items()},
        maps=tuple(_map_from_json(one) for one in record["maps"]),
        facts={name: fact if isinstance(fact, str) else _back(fact) for name, fact in record["facts"].items()},
        notes=tuple(record["notes"]),
        heads=None if record["heads"] is None else _heads_from_json(record["heads"]),
    )


def _map_to_json(one: MapSet) -> dict[str, Any]:
    return {
        "name": one.name,
        "label": one.label,
        "total": one.total.to_json(),
        "words": None if one.words is None else one.words.to_json(),
        "steady": None if one.steady is None else np.flatnonzero(one.steady).tolist(),
    }


def _map_from_json(record: Mapping[str, Any]) -> MapSet:
    total = Packed.from_json(record["total"])
    steady = _mask(record["steady"], total.shape[1])
    words = None if record["words"] is None else Packed.from_json(record["words"])
    return MapSet(record["name"], record["label"], total, words, steady)


def _heads_to_json(heads: HeadTable) -> dict[str, Any]:
    values = {name: [_numbers(row_H) for row_H in table_LH] for name, table_LH in heads.values.items()}
    return {"layers": list(heads.layers), "values": values}


def _heads_from_json(record: Mapping[str, Any]) -> HeadTable:
    values = {name: np.stack([_array(row) for row in table]) for name, table in record["values"].items()}
    return HeadTable(tuple(map(int, record["layers"])), values)


def _check(prompt: SeenPrompt, response: SeenResponse) -> None:
    """Raise ValueError unless the lengths fit, which a file that was edited may break."""
    for name in {"accuracy", "reward", "advantage"} & response.facts.keys():
        if isinstance(response.facts[name], str):
            raise ValueError(f"{name} is not a number: {response.facts[name]!r}")
    if any(len(values_T) != len(response.pieces) for values_T in response.values.values()):
        raise ValueError("values and pieces differ in length")
    for one in response.maps:
        rows = len(response.words)
        for packed in (one.total, one.words):
            if packed is not None:
                try:
                    packed.unpack()
                except zlib.error as error:
                    raise ValueError(f"map {one.name!r}: {error}") from error
        if one.total.shape != (1, prompt.tokens) or (one.words and one.words.shape != (rows, prompt.tokens)):
            raise ValueError(f"map {one.name!r} does not fit {prompt.tokens} visual tokens and {rows} words")


def _mask(places: Sequence[int] | None, length: int) -> np.ndarray | None:
    """bool [length], true at the places; None for None."""
    if places is None:
        return None
    mask = np.zeros(length, bool)
    mask[np.array(places, int)] = True
    return mask


def _numbers(values: np.ndarray) -> list[float | None]:
    # the shortest text of a float32, which is shorter than that of the same number as float64
    return [float(str(value)) if math.isfinite(value) else None for value in np.asarray(values, np.float32)]


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([_back(value) for value in values], np.float32)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _back(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _write(file: Path, data: bytes) -> int:
    """Write ``data`` as a whole or not at all; return its length."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)


def _open(image: Path, file: Path) -> Image.Image:
    """A30 if an image of recorded rollouts cannot be read."""
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:  # also Pillow's error for a damaged image
        raise SayoError(
            "A30",
            "an image of recorded rollouts cannot be read",
            where=str(image),
            got=error.strerror or str(error),
            fix=f"copy the folder {image.parent} again, or delete {file.name}",
        ) from error


def _invalid(file: Path, got: object) -> SayoError:
    return SayoError(
        "A28",
        "recorded rollouts are cut or invalid",
        where=str(file),
        got=got,
        wanted="a file that a run has written",
        fix="copy the file again, or delete it; other steps are not affected",
    )
