"""Checks of a training parquet before a run: the row contract, every box, and a sample of the images.

The row contract (what verl needs, and what the attention methods add in ``extra_info``):

    data_source   string
    prompt        list of {role, content}; the user's content holds one "<image>" for each image
    images        list of {bytes, path}: encoded PNG, JPEG or WEBP
    reward_model  {style, ground_truth}
    extra_info    {index, boxes, ...}; boxes[image][box] = [x0, y0, x1, y1], normalised to [0, 1] of the stored image
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from sayo_verl.errors import SayoError
from sayo_verl.vision.masks import check_box

MAX_PIXELS = 50_000_000  # refused by the header, before decoding: an image bomb or a mistake


def check_parquet(path: Path, *, image_key: str, prompt_key: str, need_boxes: bool, max_images: int) -> str:
    """Check one file and say what was checked.

    Args:
        path: an existing file.
        image_key: column of images (``data.image_key``).
        prompt_key: column of messages (``data.prompt_key``).
        need_boxes: whether the run's method needs target boxes.
        max_images: decode the images of at most so many rows, evenly spread over the file; none if not positive.

    Raises:
        SayoError: D02 unreadable parquet, D03 column missing, D04 no row has a box, D05 boxes not nested by image,
            D06 image missing, D07 image corrupt, D08 image too large, D09 placeholders and images differ in number,
            V01-V03 malformed box.
    """
    try:
        file = pq.ParquetFile(path)
        columns = set(file.schema_arrow.names)
    except (OSError, ValueError) as error:  # Arrow's own errors are among these
        raise _unreadable(path, error) from error
    for column in (image_key, prompt_key, "reward_model", "extra_info"):
        if column not in columns:
            raise SayoError(
                "D03",
                f"the parquet has no column {column!r}",
                where=str(path),
                got=sorted(columns),
                fix="follow the row contract in sayo_verl/data/check.py; the column of images is data.image_key",
            )
    n_rows = file.metadata.num_rows
    if n_rows == 0:
        raise SayoError("D03", "the parquet has no rows", where=str(path), fix="prepare it again")
    stride = max(1, -(-n_rows // max_images)) if max_images > 0 else 0
    with_box = decoded = 0
    for row, values in enumerate(_rows(file, path, [image_key, prompt_key, "extra_info"])):
        where = f"{path} row {row}"
        images = values[image_key] or []
        with_box += _check_boxes(values["extra_info"] or {}, len(images), where)
        _check_placeholders(values[prompt_key], len(images), where)
        if stride and row % stride == 0:
            for image in images:
                _check_image(image, where)
                decoded += 1
    if need_boxes and with_box == 0:
        raise SayoError(
            "D04",
            "no row has a target box, so there is no region to reward",
            where=str(path),
            wanted="extra_info.boxes[image][box] = [x0, y0, x1, y1] in [0, 1]",
            fix="add boxes, or set algorithm.adv_estimator=grpo",
        )
    return f"{n_rows} rows, {with_box} with boxes, {decoded} images decoded"


def _rows(file: pq.ParquetFile, path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as plain containers. A file with a sound footer can still have a damaged page, which shows only here."""
    try:
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> SayoError:
    return SayoError("D02", f"the parquet file cannot be read ({' '.join(str(error).split())})", where=str(path),
                     fix="prepare it again; it may have been cut short")  # fmt: skip


def _check_boxes(extra_info: dict[str, Any], n_images: int, where: str) -> bool:
    boxes = extra_info.get("boxes")
    if not boxes:
        return False
    nested = all(isinstance(b, list) and all(isinstance(v, list) for v in b) for b in boxes)
    if not nested or len(boxes) != n_images:
        raise SayoError(
            "D05",
            "boxes are not nested by image",
            where=f"{where}, extra_info.boxes",
            got=f"{len(boxes)} entries for {n_images} images: {str(boxes)[:80]}",
            wanted="boxes[image][box] = [x0, y0, x1, y1]",
            fix="write one list of boxes per image, empty for an image without one",
        )
    for image in boxes:
        for box in image:
            check_box(box, where=f"{where}, extra_info.boxes")
    return any(len(image) for image in boxes)


def _check_placeholders(prompt: list[dict[str, Any]], n_images: int, where: str) -> None:
    told = sum(message["content"].count("<image>") for message in prompt if isinstance(message["content"], str))
    if told != n_images:
        raise SayoError(
            "D09",
            "the prompt does not name each image once" if n_images else "the row has no image but its prompt names one",
            where=where,
            got=f"{told} <image> placeholders, {n_images} images",
            wanted="as many placeholders as images",
            fix="put one <image> into the user's message for each image, and store the image's bytes",
        )


def _check_image(image: Any, where: str) -> None:
    data = image.get("bytes") if isinstance(image, dict) else None
    path = image.get("path") if isinstance(image, dict) else None
    if not data and not path:
        raise SayoError("D06", "an image has neither bytes nor a path", where=where,
                        fix="store the encoded image as {'bytes': ..., 'path': None}")  # fmt: skip
    try:
        source = io.BytesIO(data) if data else Path(path)  # type: ignore[arg-type]
        with Image.open(source) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise SayoError("D08", "an image is too large", where=where, got=f"{picture.width} x {picture.height}",
                                wanted=f"at most {MAX_PIXELS} pixels", fix="resize it")  # fmt: skip
            picture.load()
    except FileNotFoundError as error:
        raise SayoError("D06", "an image file is missing", where=where, got=path, fix="correct the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SayoError("D07", f"an image cannot be decoded ({error})", where=where,
                        fix="remove the row or store the image again") from error  # fmt: skip
