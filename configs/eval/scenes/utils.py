"""What lmms-eval calls for the task sayo_rows. A row is one of the data contract (docs/data.md)."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from sayo_verl.reward import compute_score


def doc_to_visual(row: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures of a row; the data set may have decoded them."""
    opened = (i if isinstance(i, Image.Image) else Image.open(io.BytesIO(i["bytes"])) for i in row["images"])
    return [image.convert("RGB") for image in opened]


def doc_to_text(row: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> str:
    """The prompt without its image placeholders: the harness puts all pictures before the text."""
    return "\n".join(message["content"] for message in row["prompt"]).replace("<image>", "")


def doc_to_target(row: Mapping[str, Any]) -> str:
    """The right answer."""
    return row["reward_model"]["ground_truth"]


def process_results(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Accuracy and format of the response, by the reward function of the training."""
    score = compute_score(row["data_source"], responses[0], doc_to_target(row), row["extra_info"])
    return {"accuracy": score["acc"], "format": score["format"]}
