"""Tiny random models of each family with their real processors, made offline; patches of a process taken back.

Every one-dimensional weight is random too: a probe that leaves out the weight of a query norm or the bias of a
projection must not pass for exact.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.tiny_internvl import save_policy as save_internvl
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from sayo_verl.tiny.policy import (
    CHAT_TEMPLATE,
    END,
    IMAGE,
    MERGE_SIZE,
    PAD,
    TEMPORAL_PATCH_SIZE,
    VIDEO,
    VISION_END,
    VISION_START,
    TinyPolicyConfig,
    build_model,
    build_processor,
    build_tokenizer,
)


@dataclass(frozen=True)
class TinyFamily:
    """What the tests must know of a family.

    Attributes:
        build: writes the model and its processor into a folder.
        cell: pixels per side of a visual token; of a tile where an image becomes several (``tiles``).
        layers: decoder layers of the tiny model.
        linear: layers of linear attention, which have no attention matrix.
        tiles: the visual tokens of an image are tiles of 2 x 2 and a thumbnail, not one grid.
        packed_needs_flash: verl replaces the text attention of packed rows by a call of flash-attn, whatever
            ``attn_implementation`` says.
        fused: strategies under which verl's fused kernels run.
        sequence_parallel: verl slices the family's inputs.
    """

    build: Callable[[Path], None]
    cell: int
    layers: int
    linear: tuple[int, ...] = ()
    tiles: bool = False
    packed_needs_flash: bool = False
    fused: tuple[str, ...] = ("fsdp", "fsdp2")
    sequence_parallel: bool = True


def tiny_qwen3_vl(folder: Path) -> None:
    """Dense Qwen3-VL: 4 query and 2 key heads, one deepstack level."""
    config = TinyPolicyConfig(layers=3)
    processor = build_processor(config)
    _save(build_model(config, processor), processor, folder)


def tiny_qwen3_vl_moe(folder: Path) -> None:
    """Qwen3-VL-MoE: 2 of 4 experts a token, one decoder layer without experts, 4 query heads on 1 key head."""
    processor = build_processor(TinyPolicyConfig())
    text = {
        **_text(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "rope_parameters": _rope(mrope_section=[4, 4, 4], mrope_interleaved=True),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.1,
    }
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_image_tokens(processor.tokenizer))
    _save(_random(Qwen3VLMoeForConditionalGeneration, config, seed=1), processor, folder)


def tiny_qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL: 28 px a visual token, windows of 2 x 2 of them in the first vision block, 6 query on 2 key heads."""
    tokenizer = build_tokenizer()
    sizes = {"patch_size": 14, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE}
    limits = {"shortest_edge": 28**2, "longest_edge": (8 * 28) ** 2}  # in pixels: 1 to 64 visual tokens
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(limits), **sizes),
        video_processor=Qwen2VLVideoProcessor(size=dict(limits), **sizes),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    text = {
        **_text(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "rope_parameters": _rope(mrope_section=[2, 3, 3]),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "out_hidden_size": 96,
        "initializer_range": 0.1,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_image_tokens(tokenizer))
    _save(_random(Qwen2_5_VLForConditionalGeneration, config, seed=2), processor, folder)


# The last layer reads what linear attention made of the sequence, as all but one of a released model do.
QWEN3_5_LAYERS = ["full_attention", "full_attention", "linear_attention", "full_attention"]


def tiny_qwen3_5(folder: Path, layers: Sequence[str] = QWEN3_5_LAYERS) -> None:
    """Qwen3.5: gated attention with a quarter of each head rotated, one layer of linear attention, 4 query and 2 key
    heads."""
    processor = build_processor(TinyPolicyConfig())
    config = Qwen3_5Config(
        text_config=_qwen3_5_text(processor.tokenizer)
        | {"intermediate_size": 96, "num_key_value_heads": 2, "layer_types": list(layers)},
        vision_config=_QWEN3_5_VISION,
        **_image_tokens(processor.tokenizer),
    )
    _save(_random(Qwen3_5ForConditionalGeneration, config, seed=4), processor, folder)


def tiny_qwen3_5_moe(folder: Path) -> None:
    """Qwen3.5-MoE: as ``tiny_qwen3_5``; 2 of 4 experts and a shared one a token, 4 query heads on 1 key head."""
    processor = build_processor(TinyPolicyConfig())
    experts = {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
    }
    config = Qwen3_5MoeConfig(
        text_config=_qwen3_5_text(processor.tokenizer) | experts,
        vision_config=_QWEN3_5_VISION,
        **_image_tokens(processor.tokenizer),
    )
    _save(_random(Qwen3_5MoeForConditionalGeneration, config, seed=5), processor, folder)


def tiny_internvl(folder: Path) -> None:
    """InternVL in Hugging Face format, see tests/support/tiny_internvl.py."""
    _save(AutoModelForImageTextToText.from_pretrained(save_internvl(folder, layers=3)), None, folder)


TINY = {
    "qwen3_vl": TinyFamily(tiny_qwen3_vl, cell=32, layers=3),
    "qwen3_vl_moe": TinyFamily(tiny_qwen3_vl_moe, cell=32, layers=3),
    "qwen2_5_vl": TinyFamily(tiny_qwen2_5_vl, cell=28, layers=3, packed_needs_flash=True, fused=("fsdp",)),
    "qwen3_5": TinyFamily(tiny_qwen3_5, cell=32, layers=4, linear=(2,)),
    "qwen3_5_moe": TinyFamily(tiny_qwen3_5_moe, cell=32, layers=4, linear=(2,)),
    "internvl": TinyFamily(tiny_internvl, cell=64, layers=3, tiles=True, fused=(), sequence_parallel=False),
}

# verl's Ulysses exchange of linear attention lies in flash-linear-attention, which needs a GPU; that of gated full
# attention does not
FULL_QWEN3_5 = TinyFamily(lambda folder: tiny_qwen3_5(folder, ["full_attention"] * 4), cell=32, layers=4)


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.12,  # at 0.02 attention is near uniform and a wrong column goes unseen
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "tie_word_embeddings": False,
    }


_QWEN3_5_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "initializer_range": 0.1,
}


def _qwen3_5_text(tokenizer: Any) -> dict[str, Any]:
    return {
        **_text(tokenizer),
        "hidden_size": 64,
        "num_hidden_layers": len(QWEN3_5_LAYERS),
        "num_attention_heads": 4,
        "head_dim": 32,
        "layer_types": QWEN3_5_LAYERS,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": _rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
    }


def _rope(**sections: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **sections}


def _image_tokens(tokenizer: Any) -> dict[str, Any]:
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return {**ids, "tie_word_embeddings": False}


def _random(model_class: type[PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).float().eval()


@torch.no_grad()
def _save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


# ---- forwards and functions that verl and the adapters replace for the whole process

_PATCHED = (
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen3_5.modeling_qwen3_5",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    "transformers.models.internvl.modeling_internvl",
    "transformers.integrations.flash_attention",
    "verl.models.transformers.qwen2_vl",
    "verl.workers.rollout.utils",
)


@contextmanager
def patches_undone() -> Iterator[None]:
    """Undo on leaving what loading a model into verl changes: functions of these modules and of their classes."""
    before = [(owner, dict(vars(owner))) for name in _PATCHED for owner in _owners(importlib.import_module(name))]
    try:
        yield
    finally:
        for owner, names in before:
            for name, value in list(vars(owner).items()):
                if name not in names:
                    delattr(owner, name)
                elif value is not names[name]:
                    setattr(owner, name, names[name])


def _owners(module: Any) -> list[Any]:
    return [module, *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)]


def require_own_forwards(model: PreTrainedModel) -> None:
    """verl's forwards drop attentions, and a comparison of verl or an adapter with itself would prove nothing."""
    replaced = sorted(
        {
            type(module).__name__
            for module in model.modules()
            # functools.wraps gives a replacement the name of what it wraps, but not its globals
            if type(module).forward.__globals__["__name__"].split(".")[0] not in ("transformers", "torch")
        }
    )
    assert not replaced, f"replaced forwards are still in place: {replaced}"


# ---- adapters


@torch.no_grad()
def trained_lora(folder: Path, out: Path, rank: int = 4) -> tuple[Path, Path]:
    """An adapter whose second factor is random, as after training, and the model with it merged.

    Returns:
        ``(adapter folder, folder of the merged model with its processor)``.
    """
    from peft import LoraConfig, get_peft_model

    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    require_own_forwards(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules="all-linear", bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapted = get_peft_model(base, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(out / "adapter")
    adapted.merge_and_unload().save_pretrained(out / "merged")
    AutoProcessor.from_pretrained(folder).save_pretrained(out / "merged")
    return out / "adapter", out / "merged"
