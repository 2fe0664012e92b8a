"""A tiny InternVL in Hugging Face format (``InternVLForConditionalGeneration`` with a Qwen3 text model), made offline.

The tokenizer, processor and configuration have the shape of the published checkpoints of InternVL3.5 (``-HF``): named
special tokens ``<img>``, ``</img>``, ``<IMG_CONTEXT>`` and ``<video>``, GotOcr2's tiling image processor whose own
``crop_to_patches`` is off (the processor turns it on), and a chat template that puts one ``<IMG_CONTEXT>`` per image.
A tile of 64 px is 4 x 4 patches of 16 px and, after the pixel shuffle, 2 x 2 tokens.

    python tests/support/tiny_internvl.py FOLDER [SEED]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from sayo_verl.tiny.policy import CHAT_TEMPLATE, END, PAD, TAGS
from sayo_verl.tiny.policy import build_tokenizer as build_qwen_tokenizer

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n").replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>\\n"
)
TILE, PATCH, SHUFFLE = 64, 16, 0.5
TOKENS_PER_TILE = int((TILE // PATCH * SHUFFLE) ** 2)
MAX_TILES = 6


def build_tokenizer() -> Qwen2Tokenizer:
    """The byte-level BPE of the tiny Qwen3-VL with InternVL's special tokens."""
    bpe = json.loads(build_qwen_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],
        eos_token=END,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=["<|im_start|>"],
        model_specific_special_tokens=dict(NAMED_TOKENS),
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_processor(
    *,
    tile: int = TILE,
    max_tiles: int = MAX_TILES,
    tokens_per_tile: int = TOKENS_PER_TILE,
    crop_to_patches: bool = False,
) -> InternVLProcessor:
    """Tokenizer, tiling image processor and chat template.

    Args:
        tile: pixels per side of a tile; 448 in the published checkpoints.
        max_tiles: most tiles of an image, the thumbnail aside; 12 there.
        tokens_per_tile: visual tokens of a tile; 256 there.
        crop_to_patches: the image processor's own setting, which transformers' processor overrules and vLLM reads.
    """
    size, half = {"height": tile, "width": tile}, [0.5, 0.5, 0.5]
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size=dict(size),
            image_mean=half,
            image_std=half,
            min_patches=1,
            max_patches=max_tiles,
            crop_to_patches=crop_to_patches,
        ),
        video_processor=InternVLVideoProcessor(size=dict(size), image_mean=half, image_std=half),
        tokenizer=build_tokenizer(),
        image_seq_length=tokens_per_tile,
        chat_template=TEMPLATE,
    )


def build_model(processor: InternVLProcessor, *, seed: int = 0, layers: int = 2) -> InternVLForConditionalGeneration:
    """Random float32 weights. The class and position embeddings, which transformers starts at zero, are drawn as well:
    otherwise the place of a patch would hardly matter, and a test could not see tokens in a wrong order."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.08,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": token_id(END),
        "pad_token_id": token_id(PAD),
        "tie_word_embeddings": False,
    }
    vision = {
        "architectures": ["InternVisionModel"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_bias": True,
        "use_qk_norm": False,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "initializer_range": 0.08,
        "layer_scale_init_value": 0.1,
    }
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(NAMED_TOKENS["context_image_token"]),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=SHUFFLE,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).float().eval()
        embeddings = model.model.vision_tower.embeddings
        for parameter in (embeddings.cls_token, embeddings.position_embeddings):
            parameter.normal_(std=0.5)
    model.generation_config = GenerationConfig(eos_token_id=[token_id(END)], pad_token_id=token_id(PAD))
    return model


def save_policy(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """Everything that transformers, verl and vLLM load, in one folder."""
    built = build_processor()
    build_model(built, seed=seed, layers=layers).save_pretrained(folder)
    built.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(save_policy(Path(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0))
