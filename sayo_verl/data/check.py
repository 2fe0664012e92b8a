"""Checks of training parquet before a run: the row contract, every box, and a sample of the images.

The row contract stands in ``sayo_verl.data.rows``. Of ``extra_info``, rows from elsewhere need ``boxes`` alone; ``id``,
``image_keys`` and ``image_size_wh`` are checked where they are there. This is the fast form, which the launcher runs:
no processor is asked. ``sayo_verl.data.inspection.command`` is the thorough one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sayo_verl.data.reading import MAX_PIXELS, Header, digest, leaves, open_parquet, read_image, read_rows, rows_at
from sayo_verl.errors import SayoError
from sayo_verl.vision.masks import check_box

__all__ = ["MAX_PIXELS", "check_leakage", "check_parquet"]

# Data sources for which verl's own reward function evaluates the model's text or runs it as a program.
EVALUATED = ("codecontests", "apps", "codeforces", "taco")


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
            D65 two rows of one id, D66 a data source that verl evaluates, D67 an image that is not upright or not of
            the size its row says, V01-V03 malformed box.
    """
    file = open_parquet(path)
    for column in (image_key, prompt_key, "reward_model", "extra_info"):
        if column not in file.schema_arrow.names:
            raise SayoError(
                "D03",
                f"the parquet has no column {column!r}",
                where=str(path),
                got=sorted(file.schema_arrow.names),
                fix="follow the row contract in docs/data.md; the column of images is data.image_key",
            )
    n_rows = file.metadata.num_rows
    if n_rows == 0:
        raise SayoError("D03", "the parquet has no rows", where=str(path), fix="prepare it again")
    sizes: dict[int, Any] = {}
    sampled = set(range(0, n_rows, max(1, -(-n_rows // max_images)))) if max_images > 0 else set()
    with_box = decoded = 0
    ids: dict[tuple[Any, Any], str] = {}
    columns = [_without_bytes(file, image_key), prompt_key, "extra_info"]
    columns += ["data_source"] if "data_source" in file.schema_arrow.names else []
    for row, values in enumerate(read_rows(file, path, columns)):
        where = f"{path} row {row}"
        n_images, extra_info = len(values[image_key] or []), values["extra_info"] or {}
        with_box += check_boxes(extra_info, n_images, where)
        check_placeholders(values[prompt_key], n_images, where)
        check_id(values.get("data_source"), extra_info.get("id"), ids, where)
        if "data_source" in values:
            check_data_source(values["data_source"], where)
        if row in sampled:
            sizes[row] = extra_info.get("image_size_wh")
    for row, images in _chosen(file, path, image_key, sampled):
        where = f"{path} row {row}"
        for i, image in enumerate(images):
            told = sizes[row][i] if sizes[row] and i < len(sizes[row]) else None
            check_stored(read_image(image, where), told, where)
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


def check_leakage(train: Sequence[Path], val: Sequence[Path], *, image_key: str, max_images: int) -> str:
    """Look for images of the validation files among the training files, and say what was compared.

    Names (``extra_info.image_keys``, within a data source) are compared in all rows, encoded bytes in at most
    ``max_images`` rows of each side, evenly spread. Of a few shared images the sample may see none; `sayo inspect`
    compares all.

    Raises:
        SayoError: D65 for an image of both, D02 for a file that cannot be read.
    """
    keys: list[dict[Any, str]] = [{}, {}]
    hashes: list[dict[Any, str]] = [{}, {}]
    for side, paths in enumerate((train, val)):
        for path in paths:
            file = open_parquet(path)
            n_rows = file.metadata.num_rows
            whole = file.schema_arrow.names
            if image_key not in whole:
                continue  # D03 of check_parquet
            if any(name.startswith("extra_info.image_keys.") for name in leaves(file)):
                wanted = [name for name in ("data_source", "extra_info.image_keys") if name in whole or "." in name]
                for row, values in enumerate(read_rows(file, path, wanted)):
                    for key in (values["extra_info"] or {}).get("image_keys") or []:
                        keys[side].setdefault((values.get("data_source"), key), f"{path} row {row}")
            share = max(1, max_images // len(paths))
            sampled = set(range(0, n_rows, max(1, -(-n_rows // share)))) if max_images > 0 else set()
            for row, images in _chosen(file, path, image_key, sampled):
                for image in images:
                    if isinstance(image, dict) and image.get("bytes"):
                        hashes[side].setdefault(digest(image["bytes"]), f"{path} row {row}")
    for what, (of_train, of_val) in (("name", keys), ("bytes", hashes)):
        shared = of_train.keys() & of_val.keys()
        if shared:
            first = min(shared, key=lambda key: of_train[key])
            raise SayoError(
                "D65",
                f"training and validation share images, by {what}",
                where=f"{of_train[first]} and {of_val[first]}",
                got=f"{len(shared)} shared of {len(of_val)} compared",
                wanted="no image in both",
                fix="split by image, as `sayo prepare` does; or set sayo.held_out=false",
            )
    return f"{len(keys[1])} names and {len(hashes[1])} images of validation are not among {len(keys[0])} and " \
           f"{len(hashes[0])} of training"  # fmt: skip


def _chosen(file: pq.ParquetFile, path: Path, image_key: str, chosen: set[int]) -> Iterator[tuple[int, list[Any]]]:
    for row, values in rows_at(file, path, [image_key], chosen):
        yield row, values[image_key] or []


def _without_bytes(file: pq.ParquetFile, image_key: str) -> str:
    """What to read of the column of images to learn how many there are: not their bytes, where that is possible."""
    paths = [name for name in leaves(file) if name.startswith(f"{image_key}.") and name.endswith(".path")]
    return paths[0] if len(paths) == 1 else image_key


def check_id(data_source: Any, name: Any, ids: dict[tuple[Any, Any], str], where: str) -> None:
    """Refuse the id of an earlier row of its data source; ``ids`` remembers where each was. Rows without one pass.

    Raises:
        SayoError: D65.
    """
    if name is None:
        return
    if (data_source, name) in ids:
        raise SayoError(
            "D65",
            "two rows of a data source have one id",
            where=f"{where}, extra_info.id",
            got=f"{name!r}, as {ids[data_source, name]}",
            wanted="another id for each row",
            fix="prepare the data again",
        )
    ids[data_source, name] = where


def check_data_source(name: Any, where: str) -> None:
    """Refuse a name for which verl's own reward function evaluates text of the model, and no name at all.

    Raises:
        SayoError: D66.
    """
    if not isinstance(name, str) or not name.strip():
        raise SayoError("D66", "a row has no data source", where=f"{where}, data_source", got=repr(name),
                        wanted="a name", fix="name the kind of data; verl's metrics are kept by it")  # fmt: skip
    if name.lower().startswith("numina") or name.lower() in EVALUATED:
        raise SayoError(
            "D66",
            "for this data source verl's own reward function evaluates the model's text as code",
            where=f"{where}, data_source",
            got=name,
            wanted="any other name",
            fix="rename the data source, such as my/name",
        )


def check_boxes(extra_info: dict[str, Any], n_images: int, where: str) -> bool:
    """Whether a row has a box; D05 and V01-V03 for boxes that are not what the contract says."""
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


def check_placeholders(prompt: list[dict[str, Any]], n_images: int, where: str) -> None:
    """Refuse a prompt that does not name each image once; D09."""
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


def check_stored(header: Header, told: Sequence[int] | None, where: str) -> None:
    """Refuse an image that boxes were not drawn on as it is stored.

    Args:
        header: of the image.
        told: ``[width, height]`` of ``extra_info.image_size_wh``; None: the row does not say.
        where: names the row.

    Raises:
        SayoError: D67.
    """
    if header.orientation != 1:
        raise SayoError(
            "D67",
            "a stored image is not upright: its EXIF orientation turns it in a viewer, and not in verl",
            where=where,
            got=f"EXIF orientation {header.orientation}",
            wanted="1 or none",
            fix="turn the pixels and remove the tag, as `sayo prepare` does; boxes belong to the stored pixels",
        )
    if told is not None and list(told) != [header.width, header.height]:
        raise SayoError(
            "D67",
            "a stored image has another size than its row says",
            where=f"{where}, extra_info.image_size_wh",
            got=f"{header.width} x {header.height}",
            wanted=" x ".join(map(str, told)),
            fix="prepare the data again: boxes may be of another picture",
        )
