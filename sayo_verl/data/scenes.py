"""Drawn scenes with one-object questions and exact boxes: the data of the tiny task.

A scene is a grey square with one object per grid cell; shapes and colours are distinct within a scene, so every
question has one answer and needs one object. One generator serves the parquet files and the warm-up of the tiny
policy, and nothing here imports torch.

Coordinates: pixels are ``(x0, y0, x1, y1)`` with x1 and y1 exclusive; rows carry them divided by the image size.
"""

import hashlib
import io
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from sayo_verl.data.drawing import COLOURS, SHAPES, blank, draw
from sayo_verl.data.prepared import Prepared, content_hash, prepare_folder
from sayo_verl.errors import SayoError

# kind of question -> its text; {key} is the word that names the target
QUESTIONS = {"colour": "What colour is the {key}?", "shape": "What shape is the {key} object?"}
GENERATOR_VERSION = 1
ROW_GROUP_ROWS = 64
_MAX_REDRAWS = 100


@dataclass(frozen=True)
class SceneConfig:
    """What is drawn and asked.

    Attributes:
        image_size: side of the square image, in pixels.
        grid: cells per side; one object fits in a cell.
        min_objects, max_objects: objects per scene, both inclusive.
        min_radius, max_radius: half the side of an object's box, in pixels, both inclusive.
        question_kinds: any of ``"colour"`` (asked of a shape) and ``"shape"`` (asked of a colour).
        n_train, n_val: rows of the two files.
        seed: decides every scene; a row depends on the seed, its split and its index alone.
        region: whose box is rewarded, the target's or (the wrong-box control) a random other object's.
    """

    image_size: int = 96
    grid: int = 3
    min_objects: int = 5
    max_objects: int = 6
    min_radius: int = 10
    max_radius: int = 14
    question_kinds: tuple[str, ...] = ("colour", "shape")
    n_train: int = 4096
    n_val: int = 256
    seed: int = 0
    region: Literal["target", "distractor"] = "target"

    def __post_init__(self) -> None:
        most = min(self.grid**2, len(SHAPES), len(COLOURS))
        known = set(self.question_kinds) <= set(QUESTIONS) and len(self.question_kinds) > 0
        wrong = [
            (
                not 1 <= self.min_objects <= self.max_objects <= most,
                "min_objects, max_objects",
                f"1 to {most}, in order",
            ),
            (not 1 <= self.min_radius <= self.max_radius, "min_radius, max_radius", "at least 1, in order"),
            (2 * self.max_radius + 2 > self.image_size // self.grid, "max_radius", "an object that fits in its cell"),
            (not known, "question_kinds", f"some of {sorted(QUESTIONS)}"),
            (self.n_train < 1 or self.n_val < 1, "n_train, n_val", "at least 1"),
            (self.region not in ("target", "distractor"), "region", "'target' or 'distractor'"),
        ]
        for is_wrong, names, wanted in wrong:
            if is_wrong:
                got = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))
                raise SayoError(
                    "D20", "no scene can be drawn", where="SceneConfig", got=got, wanted=wanted, fix=f"change {names}"
                )

    def config_hash(self) -> str:
        """Ten hexadecimal digits; equal for equal content of the prepared folder."""
        return content_hash("scenes", GENERATOR_VERSION, self)


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; ``box`` is ``(x0, y0, x1, y1)`` in pixels."""

    shape: str
    colour: str
    box: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture and one question about it.

    Attributes:
        image: uint8 [image_size, image_size, 3], RGB.
        objects: what is in it.
        kind: kind of question, a key of ``QUESTIONS``.
        target: index of the object that the question needs.
        distractor: index of a random other object; None when there is none.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    kind: str
    target: int
    distractor: int | None

    def key_word(self, index: int) -> str:
        """The word by which this question's kind names object ``index``: its shape or its colour."""
        return self.objects[index].shape if self.kind == "colour" else self.objects[index].colour

    def attribute(self, index: int) -> str:
        """The word this question's kind asks for, of object ``index``."""
        return self.objects[index].colour if self.kind == "colour" else self.objects[index].shape

    @property
    def question(self) -> str:
        return QUESTIONS[self.kind].format(key=self.key_word(self.target))

    @property
    def answer(self) -> str:
        return self.attribute(self.target)


def sample_scene(rng: random.Random, config: SceneConfig) -> Scene:
    """Draw one scene and ask one question; only ``rng`` decides which."""
    n_objects = rng.randint(config.min_objects, config.max_objects)
    cells = rng.sample(range(config.grid**2), n_objects)
    shapes = rng.sample(SHAPES, n_objects)
    colours = rng.sample(tuple(COLOURS), n_objects)
    image = blank(config.image_size)
    side = config.image_size // config.grid
    objects = []
    for cell, shape, colour in zip(cells, shapes, colours, strict=True):
        radius = rng.randint(config.min_radius, config.max_radius)
        slack = side // 2 - radius - 1
        row, col = divmod(cell, config.grid)
        centre_x = col * side + side // 2 + rng.randint(-slack, slack)
        centre_y = row * side + side // 2 + rng.randint(-slack, slack)
        objects.append(SceneObject(shape, colour, draw(image, shape, colour, centre_x, centre_y, radius)))
    target = rng.randrange(n_objects)
    others = [i for i in range(n_objects) if i != target]
    distractor = rng.choice(others) if others else None
    return Scene(image, tuple(objects), rng.choice(config.question_kinds), target, distractor)


def image_digest(image: np.ndarray) -> str:
    """Hash of the pixels, whatever file format they are kept in."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def scene_row(scene: Scene, config: SceneConfig, *, split: str, index: int) -> dict[str, Any]:
    """One parquet row; boxes are [image][box][x0, y0, x1, y1], normalised. ``boxes`` is the rewarded one."""
    if scene.distractor is None:
        raise SayoError(
            "D21",
            "a row needs a second object, for the wrong-box control",
            where="SceneConfig.min_objects",
            got=len(scene.objects),
            wanted="at least 2",
            fix="set min_objects to 2 or more",
        )
    target, distractor = scene.objects[scene.target], scene.objects[scene.distractor]
    rewarded = target if config.region == "target" else distractor
    png = io.BytesIO()
    Image.fromarray(scene.image).save(png, format="PNG")

    def boxes(thing: SceneObject) -> list[list[list[float]]]:
        return [[[value / config.image_size for value in thing.box]]]

    return {
        "data_source": "sayo/scenes",
        "prompt": [{"role": "user", "content": "<image>" + scene.question}],
        "images": [{"bytes": png.getvalue(), "path": None}],
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": scene.answer},
        "extra_info": {
            "index": index,
            "split": split,
            "question": scene.question,
            "answer": scene.answer,
            "kind": scene.kind,
            "key_word": scene.key_word(scene.target),
            "boxes": boxes(rewarded),
            "box_names": [[rewarded.name]],
            "target_boxes": boxes(target),
            "distractor_boxes": boxes(distractor),
            "image_size_wh": [[config.image_size, config.image_size]],
        },
    }


_BOXES = pa.list_(pa.list_(pa.list_(pa.float64())))
ROW_SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {
                "index": pa.int64(),
                "split": pa.string(),
                "question": pa.string(),
                "answer": pa.string(),
                "kind": pa.string(),
                "key_word": pa.string(),
                "boxes": _BOXES,
                "box_names": pa.list_(pa.list_(pa.string())),
                "target_boxes": _BOXES,
                "distractor_boxes": _BOXES,
                "image_size_wh": pa.list_(pa.list_(pa.int64())),
            }
        ),
    }
)


def _draw_split(config: SceneConfig, split: str, n_rows: int, taken: set[str]) -> Iterable[tuple[Scene, str]]:
    """Yield ``n_rows`` scenes and their digests; an image in ``taken`` is drawn again."""
    for index in range(n_rows):
        for attempt in range(_MAX_REDRAWS):
            scene = sample_scene(random.Random(f"{config.seed}/{split}/{index}/{attempt}"), config)
            digest = image_digest(scene.image)
            if digest not in taken:
                break
        else:
            raise SayoError(
                "D22",
                "the configuration allows too few different images to keep train and held-out apart",
                where=f"row {index} of {split}",
                fix="allow more objects, radii or cells, or ask for fewer rows",
            )
        yield scene, digest


def write_scenes(folder: Path, config: SceneConfig) -> dict[str, Any]:
    """Write ``train.parquet`` and ``val.parquet`` into ``folder``; same configuration, same bytes.

    Returns:
        What the manifest says: the configuration, rows and distinct images per split.

    Raises:
        SayoError: D21 for scenes of one object, D22 when train and held-out images cannot be kept apart.
    """
    digests: dict[str, set[str]] = {}
    held_out: set[str] = set()
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("drawing scenes", total=config.n_train + config.n_val)
        for split, n_rows in (("val", config.n_val), ("train", config.n_train)):  # held-out first: train yields to it
            digests[split] = set()
            with pq.ParquetWriter(folder / f"{split}.parquet", ROW_SCHEMA) as writer:
                rows = []
                for index, (scene, digest) in enumerate(_draw_split(config, split, n_rows, held_out)):
                    rows.append(scene_row(scene, config, split=split, index=index))
                    digests[split].add(digest)
                    if len(rows) == ROW_GROUP_ROWS or index + 1 == n_rows:
                        writer.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
                        rows = []
                    progress.advance(task)
            held_out = digests["val"]
    if not digests["train"].isdisjoint(digests["val"]):
        raise AssertionError("a held-out image is also a train image")
    return {
        "kind": "scenes",
        "generator_version": GENERATOR_VERSION,
        "config": asdict(config),
        "rows": {"train": config.n_train, "val": config.n_val},
        "distinct_images": {split: len(seen) for split, seen in digests.items()},
    }


def prepare(out_root: Path | str, config: SceneConfig) -> Prepared:
    """``out_root/scenes-<hash>/`` with ``train.parquet``, ``val.parquet`` and ``manifest.json``.

    A complete folder of the same configuration is reused.

    Raises:
        SayoError: as ``write_scenes``.
    """
    return prepare_folder(out_root, f"scenes-{config.config_hash()}", lambda folder: write_scenes(folder, config))
