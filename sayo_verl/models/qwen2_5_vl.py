"""A repair of verl 0.9.1 with transformers 5: Qwen2.5-VL crashes on micro-batches without an image."""

import functools
from typing import Any

from sayo_verl.models.internvl import model_type_of

MODEL_TYPE = "qwen2_5_vl"


def activate() -> None:
    """Wrap ``hf_processor``, which every process that loads a model calls. The plug-in calls this once per process."""
    import verl.workers.config.model as model_config

    stock = model_config.hf_processor

    @functools.wraps(stock)
    def hf_processor(name_or_path: str, **kwargs: Any) -> Any:
        if model_type_of(name_or_path) == MODEL_TYPE:
            guard_image_free()
        return stock(name_or_path, **kwargs)

    model_config.hf_processor = hf_processor


def guard_image_free() -> None:
    """Replace ``_get_input_embeds`` of verl's Qwen2-VL forward, once per process.

    For a micro-batch without an image, verl runs a blank image through the vision tower and adds 0 times its mean, so
    that FSDP uses every parameter on every rank. It takes the mean of the tower's return value, which in transformers 5
    is an output object: ``AttributeError: 'BaseModelOutputWithPooling' object has no attribute 'mean'``. verl's padding
    rows have no image, so runs with images only crash too. The replacement takes the mean of the visual tokens.
    Micro-batches with an image or a video go to verl's function.
    """
    import torch
    import verl.models.transformers.qwen2_vl as qwen2_vl
    from verl.utils.transformers_compat import unpack_visual_output

    original = qwen2_vl._get_input_embeds
    if getattr(original, "sayo_guarded", False):
        return

    @functools.wraps(original)
    def _get_input_embeds(
        model: Any,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        pixel_values_videos: Any = None,
        image_grid_thw: Any = None,
        video_grid_thw: Any = None,
    ) -> Any:
        if pixel_values is not None or pixel_values_videos is not None:
            return original(
                model, input_ids, attention_mask, pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw
            )
        embeds = model.get_input_embeddings()(input_ids)
        vision = model.config.vision_config
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        side = 2 * vision.spatial_merge_size  # 2 x 2 visual tokens
        blank = torch.zeros(side * side, patch, dtype=embeds.dtype, device=embeds.device)
        grid = torch.tensor([[1, side, side]], device=embeds.device)
        visual, _ = unpack_visual_output(model.visual(blank, grid_thw=grid))
        if attention_mask is not None:
            attention_mask = attention_mask.to(embeds.device)
        return embeds + 0.0 * visual.mean(), attention_mask

    _get_input_embeds.sayo_guarded = True  # type: ignore[attr-defined]
    qwen2_vl._get_input_embeds = _get_input_embeds
