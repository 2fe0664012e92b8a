"""Drawn scenes with questions and exact boxes: the data of the tiny task, and harder ones of the same make.

By default a scene is a grey square with one object per grid cell; shapes and colours are distinct within a scene, so
every question has one answer and needs one object. ``sayo_verl.data.scenes.kinds`` and ``charts`` have the other kinds
of question, ``SceneConfig`` what makes them easy or hard. One generator serves the parquet files and the warm-up of the
tiny policy (whose tokenizer has only the words of the first two kinds), and nothing here imports torch.

Coordinates: pixels are ``(x0, y0, x1, y1)`` with x1 and y1 exclusive; rows carry them divided by the image size.
"""

import hashlib
import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from sayo_verl.data.prepared import Prepared, prepare_folder
from sayo_verl.data.rows import BOXES, messages_of, schema_of
from sayo_verl.data.scenes.charts import bars
from sayo_verl.data.scenes.config import BAR_KINDS, GENERATOR_VERSION, QUESTIONS, SceneConfig, is_version_1
from sayo_verl.data.scenes.drawing import add_clutter, add_noise
from sayo_verl.data.scenes.kinds import SAMPLERS, one_object
from sayo_verl.data.scenes.types import Scene, SceneObject
from sayo_verl.errors import SayoError

__all__ = [
    "GENERATOR_VERSION",
    "QUESTIONS",
    "ROW_SCHEMA",
    "Scene",
    "SceneConfig",
    "SceneObject",
    "image_digest",
    "prepare",
    "sample_scene",
    "scene_row",
    "write_scenes",
]

ROW_GROUP_ROWS = 64
_MAX_REDRAWS = 100


def sample_scene(rng: random.Random, config: SceneConfig) -> Scene:
    """Draw one scene and ask one question; only ``rng`` decides which."""
    if is_version_1(config.question_kinds):
        scene = one_object(rng, config, config.question_kinds)
    else:
        kind = rng.choice(config.question_kinds)
        if kind in QUESTIONS:
            scene = one_object(rng, config, (kind,))
        else:
            scene = bars(rng, config, kind) if kind in BAR_KINDS else SAMPLERS[kind](rng, config)
    if config.clutter or config.noise:
        image = scene.drawing.copy()
        add_clutter(image, rng, config.clutter)
        scene = replace(scene, image=add_noise(image, rng, config.noise) if config.noise else image)
    return scene


def image_digest(image: np.ndarray) -> str:
    """Hash of the pixels, whatever file format they are kept in."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def scene_row(scene: Scene, config: SceneConfig, *, split: str, index: int) -> dict[str, Any]:
    """One parquet row; boxes are [image][box][x0, y0, x1, y1], normalised. ``boxes`` are the rewarded ones."""
    if scene.distractor is None:
        field, least = ("min_bars" if scene.kind in BAR_KINDS else "min_objects"), len(scene.needed) + 1
        raise SayoError(
            "D21",
            "a row needs a further object, for the wrong-box control",
            where=f"SceneConfig.{field}, question kind {scene.kind!r}",
            got=len(scene.objects),
            wanted=f"at least {least}",
            fix=f"set {field} to {least} or more",
        )
    rewarded = scene.needed if config.region == "target" else scene.distractors
    png = io.BytesIO()
    Image.fromarray(scene.image).save(png, format="PNG")

    def boxes(indices: Sequence[int]) -> list[list[list[float]]]:
        return [[[value / config.image_size for value in scene.objects[i].box] for i in indices]]

    return {
        "data_source": "sayo/scenes",
        "prompt": messages_of(scene.question, 1, prompt=config.prompt),
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
            "box_names": [scene.box_names(rewarded)],
            "target_boxes": boxes(scene.needed),
            "distractor_boxes": boxes(scene.distractors),
            "image_size_wh": [[config.image_size, config.image_size]],
        },
    }


ROW_SCHEMA = schema_of(
    {
        "index": pa.int64(),
        "split": pa.string(),
        "question": pa.string(),
        "answer": pa.string(),
        "kind": pa.string(),
        "key_word": pa.string(),
        "boxes": BOXES,
        "box_names": pa.list_(pa.list_(pa.string())),
        "target_boxes": BOXES,
        "distractor_boxes": BOXES,
        "image_size_wh": pa.list_(pa.list_(pa.int64())),
    }
)


def _draw_split(config: SceneConfig, split: str, n_rows: int, taken: set[str]) -> Iterable[tuple[Scene, str]]:
    """Yield ``n_rows`` scenes and their digests; an image in ``taken`` is drawn again."""
    for index in range(n_rows):
        for attempt in range(_MAX_REDRAWS):
            scene = sample_scene(random.Random(f"{config.seed}/{split}/{index}/{attempt}"), config)
            digest = image_digest(scene.drawing)  # noise must not pass for another picture
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
        "config": config.content(),
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
