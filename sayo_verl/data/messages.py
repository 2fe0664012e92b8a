"""The prompt of a row as a chat template takes it, and the row's pictures."""

import re
from typing import Any

from PIL import Image

from sayo_verl.data.contract import check_placeholders
from sayo_verl.data.reading import decoded
from sayo_verl.reward.prompts import IMAGE_TAG


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row's prompt with its images in their places, as a chat template takes it; ``_where`` names the row.

    Raises:
        SayoError: D09 when the numbers of placeholders and images differ.
    """
    check_placeholders(row["prompt"], {IMAGE_TAG: len(row["images"] or [])}, row["_where"])
    out = []
    for message in row["prompt"]:
        content = message["content"]
        parts: list[dict[str, Any]] = content if isinstance(content, list) else []
        for piece in re.split(f"({IMAGE_TAG})", content) if isinstance(content, str) else ():
            if piece == IMAGE_TAG:
                parts.append({"type": "image"})
            elif piece:
                parts.append({"type": "text", "text": piece})
        out.append({"role": message["role"], "content": parts})
    return out


def images_of(row: dict[str, Any]) -> list[Image.Image]:
    """The row's pictures, RGB, with the errors of ``sayo_verl.data.reading``; ``_where`` names the row."""
    return [decoded(image, row["_where"]) for image in row["images"] or []]
