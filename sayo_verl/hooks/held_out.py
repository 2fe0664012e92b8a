"""Rows of verl's validation data set, as recorded rollouts show them: which rows, their images, their question."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sayo_verl.data.reading import decoded
from sayo_verl.errors import SayoError
from sayo_verl.launch.record_check import OFF

SEARCHED = 256  # rows that are searched for boxes, once enough rows with an image have been found


def choose_rows(dataset: Any, n: int, *, boxes: bool) -> list[int]:
    """The first n rows with an image, or fewer where there are fewer.

    Args:
        dataset: verl's, whose rows have ``raw_prompt``.
        n: how many.
        boxes: rows that also have a box come first, of the first ``SEARCHED`` rows.

    Raises:
        SayoError: A32 if no row has an image.
    """
    found: list[int] = []
    preferred: list[int] = []
    for row in range(len(dataset)):
        if len(preferred if boxes else found) >= n or (len(found) >= n and row >= SEARCHED):
            break
        item = dataset[row]
        if _image_parts(item["raw_prompt"]):
            found.append(row)
            if any(of_image for of_image in item["extra_info"].get("boxes") or ()):
                preferred.append(row)
    if not found:
        raise SayoError(
            "A32",
            "no held-out row has an image, so no rollout can be recorded",
            where="data.val_files",
            got=f"{len(dataset)} rows that verl has kept",
            fix=f"name other rows; {OFF}",
        )
    chosen = [*preferred, *(row for row in found if row not in preferred)] if boxes else found
    return sorted(chosen[:n])


def _image_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The parts of a prompt that are images."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [part for content in contents for part in content if part.get("type") == "image"]


def pictures_of(item: Mapping[str, Any], where: str) -> list[Image.Image]:
    """The stored images of a row, RGB."""
    pictures = []
    for part in _image_parts(item["raw_prompt"]):
        if part.get("bytes") is not None:
            pictures.append(decoded({"bytes": part["bytes"]}, where))
        elif isinstance(part["image"], Image.Image):
            pictures.append(part["image"].convert("RGB"))
        else:
            pictures.append(decoded(part["image"], where))
    return pictures


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last turn of the user."""
    content = next(message["content"] for message in reversed(messages) if message["role"] == "user")
    if isinstance(content, str):
        return content.strip()
    return "".join(part["text"] for part in content if part.get("type") == "text").strip()
