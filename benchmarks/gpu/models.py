"""Whole models of the true shape with random weights, and rows in the form of verl's agent loop; no download."""

from types import SimpleNamespace
from typing import Any

import torch
from cost.shapes import REAL, TINY, Lengths, Shape
from cost.workload import mrope_positions, rope_parameters
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLImageProcessor, Qwen3VLConfig

# Vision towers of both families, as in config.json. They do not depend on the size of the text model.
_QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_QWEN2_5_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_SMALL_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
_SMALL_QWEN3 = {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
BOX = [0.2, 0.3, 0.7, 0.8]


def shape_of(family: str, tiny: bool) -> Shape:
    """The measured shape of a family, ``qwen3_vl`` or ``qwen2_5_vl``."""
    return next(shape for shape in (TINY if tiny else REAL) if shape.family == family)


def hf_config(shape: Shape, tiny: bool) -> Any:
    """The configuration of the whole model; its image tokens are the last ids of the vocabulary."""
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope_parameters(shape),
    }
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: shape.vocabulary - 4 + i for i, name in enumerate(names)}
    config: Any
    if shape.family == "qwen3_vl":
        vision = {**_QWEN3_VISION, **(_SMALL_VISION | _SMALL_QWEN3 if tiny else {}), "out_hidden_size": shape.hidden}
        text |= {"head_dim": shape.head_dim}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        config.architectures = ["Qwen3VLForConditionalGeneration"]
    else:
        small = _SMALL_VISION | {"fullatt_block_indexes": [1]} if tiny else {}
        vision = {**_QWEN2_5_VISION, **small, "out_hidden_size": shape.hidden}
        text |= {"use_sliding_window": False, "bos_token_id": None, "eos_token_id": None}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
        config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def at_random(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a model on the device with random weights, without a checkpoint of 17 GB."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with device:
            return AutoModelForImageTextToText.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)


def loader_at_random(device: torch.device) -> Any:
    """Return a replacement for transformers' auto class in verl's engine."""

    def from_pretrained(*, config: Any, torch_dtype: torch.dtype, **_: Any) -> Any:
        return at_random(config, torch_dtype, device)

    return SimpleNamespace(from_pretrained=from_pretrained)


def image_processor(config: Any, half: bool = False, tokens: int = 16384) -> Qwen2VLImageProcessor:
    """The family's image processor.

    Args:
        config: of the model.
        half: mean and standard deviation 0.5, as Qwen3-VL has them.
        tokens: maximum visual tokens of an image.
    """
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if half else {}
    return Qwen2VLImageProcessor(
        size={"shortest_edge": side**2, "longest_edge": tokens * side**2},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        **means,
    )


def row_lengths(tiny: bool) -> list[Lengths]:
    """Lengths of one call's rows: two or more micro-batches of 16,384 tokens, with several image and response sizes."""
    if tiny:
        return [Lengths(4, (3, 2), 4, 9), Lengths(3, (2, 4), 5, 6), Lengths(4, (3, 3), 2, 1)]
    sizes = [((32, 32), 512), ((32, 32), 300), ((24, 40), 1024), ((64, 64), 512), ((32, 32), 2048), ((16, 16), 700)]
    return [Lengths(60 + i, image, 64, response) for i, (image, response) in enumerate(sizes * 2)]


def random_rows(config: Any, every: list[Lengths]) -> list[dict[str, Any]]:
    """Return one dict per row with the fields of verl's agent loop: one image, one box, random text and pixels."""
    vision, generator = config.vision_config, torch.Generator().manual_seed(0)
    merge, values = vision.spatial_merge_size, 3 * vision.temporal_patch_size * vision.patch_size**2
    rows = []
    for i, n in enumerate(every):
        ids = torch.randint(0, config.vision_start_token_id, (n.total,), generator=generator)
        ids[n.before : n.before + n.image_tokens] = config.image_token_id
        ones = torch.ones(n.response, dtype=torch.int64)
        grid = [1, n.image[0] * merge, n.image[1] * merge]
        pixels = torch.randn(n.image_tokens * merge**2, values, generator=generator)
        rows.append(
            {
                "prompts": ids[: n.prompt],
                "responses": ids[n.prompt :],
                "input_ids": ids,
                "position_ids": torch.cat([torch.arange(n.total)[None], mrope_positions(n)]),
                "response_mask": ones,
                "loss_mask": ones,
                "multi_modal_inputs": {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])},
                "extra_info": {"index": i, "boxes": [[BOX]]},
                "uid": f"u{i // 2}",
            }
        )
    return rows
