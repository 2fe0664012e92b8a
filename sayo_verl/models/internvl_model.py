"""InternVL's processor with its tile geometry, and guards in its model class. Imported for this family only."""

import functools
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import BatchFeature, InternVLModel
from transformers.models.got_ocr2 import image_processing_got_ocr2 as tiling
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessorKwargs

from sayo_verl.errors import SayoError

GRID_KEY = "image_tile_grid"  # where sayo_verl.probe.plan looks for the geometry of tiles


class InternVLProcessor(transformers.InternVLProcessor):
    """transformers' processor with two additions. It keeps the name, which is written into saved checkpoints.

    - The output has ``image_tile_grid``, int64 [images, 2]: columns and rows of tiles of each image, from the image's
      size. A thumbnail follows the tiles if there is more than one.
    - For images and a text without placeholders it returns only the images' tensors, without ``input_ids``. verl's
      agent loop calls the processor this way after a rollout. It needs only the tensors, and its text, decoded without
      special tokens, has lost the placeholders.
    """

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """As in transformers, for a flat list of PIL images.

        Raises:
            SayoError: C02 for a video, C03 for images that are not PIL images or a size other than the model's tile,
                C04 when the numbers of placeholders and images of a rendered prompt differ, C05 when the returned tiles
                do not match the grid.
        """
        if videos is not None:
            raise SayoError("C02", "a row has a video", where="InternVL processor", fix="remove videos from the data")
        if images is None:
            return super().__call__(text=text, **kwargs)
        images = self._image_list(images)
        grids = self._grids(images, kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        places = sum(part.count(self.image_token) for part in texts)
        if places == len(images):
            features = super().__call__(images=images, text=texts, **kwargs)
        elif any(token in part for part in texts for token in self._rendered_tokens()):
            raise SayoError(
                "C04",
                "the numbers of image placeholders and images in a prompt differ",
                where="InternVL processor",
                got=f"{places} times {self.image_token} for {len(images)} images",
                wanted="one per image",
                fix=f"write <image> once per image in the prompt, and {self.image_token} nowhere in its text",
            )
        else:
            features = super().__call__(images=images, text=[self.image_token * len(images)], **kwargs)
            for name in self.tokenizer.model_input_names:
                features.pop(name, None)
        tiles = sum(columns * rows + (columns * rows > 1) for columns, rows in grids)
        if len(features["pixel_values"]) != tiles:
            raise SayoError(
                "C05",
                "the image processor did not cut tiles by its own rule",
                where="InternVL processor",
                got=f"{len(features['pixel_values'])} tiles for images of sizes {[image.size for image in images]}",
                wanted=f"{tiles}: (columns, rows) = {grids}, and a thumbnail for more than one tile",
                fix="use the transformers version that pyproject.toml names",
            )
        features[GRID_KEY] = torch.tensor(grids, dtype=torch.int64)
        return features

    def _image_list(self, images: Any) -> list[Image.Image]:
        images = [images] if isinstance(images, Image.Image) else list(images)
        others = [type(image).__name__ for image in images if not isinstance(image, Image.Image)]
        if others or not images:
            raise SayoError(
                "C03",
                "the size of an image is known for PIL images only",
                where="InternVL processor",
                got=others or "an empty list",
                fix="pass a flat list of PIL images, or None for a text without images",
            )
        return images

    def _grids(self, images: list[Image.Image], kwargs: dict[str, Any]) -> list[tuple[int, int]]:
        """(columns, rows) of each image, by the image processor's rule and settings."""
        settings = self._merge_kwargs(
            InternVLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )["images_kwargs"]
        if "size" in settings:
            raise SayoError(
                "C03",
                "the size of a tile is fixed by the model",
                where="data.mm_processor_kwargs.size",
                got=settings["size"],
                fix="remove it; max_patches limits the number of tiles",
            )
        if not settings["crop_to_patches"]:
            return [(1, 1)] * len(images)
        own = self.image_processor
        low, high = settings.get("min_patches", own.min_patches), settings.get("max_patches", own.max_patches)
        tile = (own.size["height"], own.size["width"])
        return [tiling.get_optimal_tiled_canvas((im.height, im.width), tile, low, high) for im in images]

    def _rendered_tokens(self) -> list[str]:
        """Tokens that occur in a rendered chat, but not in a text decoded without special tokens."""
        tokenizer = self.tokenizer
        return [
            token
            for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
            if token != self.image_token and not tokenizer.decode([number], skip_special_tokens=True)
        ]


def load_processor(name_or_path: str, **kwargs: Any) -> InternVLProcessor:
    """Load the processor of a model folder or hub name.

    Raises:
        SayoError: C06 for an image processor with an unknown rule for tiles.
    """
    processor = InternVLProcessor.from_pretrained(name_or_path, **kwargs)
    known = (tiling.GotOcr2ImageProcessor, GotOcr2ImageProcessorPil)
    if not isinstance(processor.image_processor, known):
        raise SayoError(
            "C06",
            "the tile rule of this image processor is unknown",
            where=f"processor of {name_or_path}",
            got=type(processor.image_processor).__name__,
            wanted=" or ".join(cls.__name__ for cls in known),
            fix="use a checkpoint in Hugging Face format, whose name ends in -HF",
        )
    return processor


def guard_model_class() -> None:
    """Wrap ``InternVLModel.forward``, once per process.

    - ``image_tile_grid`` is for statistics and is removed.
    - A micro-batch without images still runs the vision tower, on one empty tile with weight zero. verl's padding rows
      have no image. Under FSDP every rank must gather the same layers in the same order, or all ranks wait forever.
      verl does the same for the families it supports.
    - Visual tokens without pixels (from verl's fused kernels) and Ulysses sequence parallelism (verl does not slice
      this family's inputs) would be silently wrong, so they raise C07 and C08.
    """
    original = InternVLModel.forward
    if getattr(original, "sayo_guarded", False):
        return

    @functools.wraps(original)
    def forward(
        self: InternVLModel, input_ids: Any = None, pixel_values: Any = None, image_tile_grid: Any = None, **kwargs: Any
    ) -> Any:
        _refuse_sequence_parallelism()
        first_pass = kwargs.get("past_key_values") is None and kwargs.get("inputs_embeds") is None
        if pixel_values is None and input_ids is not None and first_pass:
            kwargs["inputs_embeds"] = _embed_with_idle_vision(self, input_ids)
            input_ids = None
        return original(self, input_ids=input_ids, pixel_values=pixel_values, **kwargs)

    forward.sayo_guarded = True  # type: ignore[attr-defined]
    InternVLModel.forward = forward


def _embed_with_idle_vision(model: InternVLModel, input_ids: torch.Tensor) -> torch.Tensor:
    if (input_ids == model.config.image_token_id).any():
        raise SayoError(
            "C07",
            "a row has visual tokens but no pixels",
            where="InternVLModel.forward",
            fix="set actor_rollout_ref.model.use_fused_kernels=False; verl's fused kernels drop this family's images",
        )
    embeddings = model.get_input_embeddings()(input_ids)
    vision = model.config.vision_config
    empty = torch.zeros(1, vision.num_channels, *vision.image_size, device=embeddings.device, dtype=embeddings.dtype)
    idle = model.get_image_features(pixel_values=empty, return_dict=True).pooler_output
    return embeddings + 0.0 * idle.mean().to(embeddings.dtype)


def _refuse_sequence_parallelism() -> None:
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size

    size = get_ulysses_sequence_parallel_world_size()
    if size > 1:
        raise SayoError(
            "C08",
            "verl does not slice the inputs of InternVL under Ulysses sequence parallelism",
            where="actor_rollout_ref.actor.ulysses_sequence_parallel_size",
            got=size,
            wanted=1,
            fix="set it to 1, for actor and reference",
        )
