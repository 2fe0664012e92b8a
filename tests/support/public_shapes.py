"""Configurations of published models, by their public shapes; no weights."""

import json
from pathlib import Path
from typing import Any

ROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
ROPE25 = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
# public shapes: name -> (model type, text, vision, parameters as the hub counts them)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Qwen3-VL-8B": (
        "qwen3_vl",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": ROPE3,
            "max_position_embeddings": 262144,
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        8_767_123_696,
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": ROPE3,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        4_437_815_808,
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": ROPE25,
            "max_position_embeddings": 128000,
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        8_292_166_656,
    ),
}


def write_config(name: str, folder: Path) -> Path:
    """A folder that holds the config.json of a published model."""
    kind, text, vision, _ = MODELS[name]
    tied = text.get("tie_word_embeddings", False)
    values = {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_qwen3_5_9b(folder: Path) -> Path:
    """A folder that holds config.json of Qwen3.5-9B, whose text sizes are the defaults of transformers."""
    text = {"model_type": "qwen3_5_text", "max_position_embeddings": 262144}
    values = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"out_hidden_size": 4096}}
    (folder / "config.json").write_text(json.dumps(values))
    return folder
