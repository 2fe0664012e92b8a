"""The data set class for InternVL, which passes images to the processor in their stored size.

verl's own class resizes every image to Qwen's grid. verl's key ``data.custom_cls`` selects this class.
"""

from typing import Any

from omegaconf import DictConfig
from PIL import Image
from qwen_vl_utils.vision_process import to_rgb
from verl.utils.dataset.rl_dataset import RLHFDataset

from sayo_verl.errors import SayoError

_RESIZES = ("resized_height", "resized_width", "min_pixels", "max_pixels")


class InternVLDataset(RLHFDataset):
    """``RLHFDataset`` without Qwen's resize, for images only."""

    @classmethod
    def _process_multi_modal_info(
        cls, messages: list[dict], image_patch_size: int, config: DictConfig
    ) -> tuple[list[Image.Image] | None, None, None]:
        """Return the images of a conversation in order, RGB and in their stored size; None without images.

        Raises:
            SayoError: D30 for video or audio, and the errors of ``stored_image``.
        """
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        other = sorted({part["type"] for part in parts} - {"text", "image"})
        if other:
            raise SayoError(
                "D30",
                "only images and text are supported",
                where="prompt of a row",
                got=other,
                fix="remove these parts from the data",
            )
        return [stored_image(part) for part in parts if part["type"] == "image"] or None, None, None


def stored_image(part: dict[str, Any]) -> Image.Image:
    """Load the image of one part of a message.

    Raises:
        SayoError: D31 for a size that only Qwen's resize would use, D32 for anything but a PIL image or the path of a
            file.
    """
    sizes = {key: part[key] for key in _RESIZES if part.get(key) is not None}
    if sizes:
        raise SayoError(
            "D31",
            "InternVL does not support image sizes in pixels",
            where="images of a row",
            got=sizes,
            fix="remove them; data.mm_processor_kwargs.max_patches limits the number of tiles",
        )
    image = part.get("image")
    if isinstance(image, str) and "://" not in image.removeprefix("file://"):
        image = Image.open(image.removeprefix("file://"))
    if not isinstance(image, Image.Image):
        raise SayoError(
            "D32",
            "an image cannot be read",
            where="images of a row",
            got=image if isinstance(image, str) else type(image).__name__,
            wanted="{'bytes': ...} or the path of a file",
            fix="store the bytes of the image in the parquet file",
        )
    return to_rgb(image)
