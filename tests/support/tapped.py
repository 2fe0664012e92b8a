"""Tiny decoders with a tap."""

import importlib
from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLTextConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeTextConfig,
    Qwen3VLTextConfig,
)

from sayo_verl.models.families import FAMILIES
from sayo_verl.probe.taps import (
    ForwardTap,
)

WHERE = "algorithm.attn.region.layers"


LAYERS = 3


SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # at 0.02 attention is near uniform and a wrong key goes unseen
}


EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def rope(**sections: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **sections}


# Qwen3.5, here without layers of linear attention: a quarter of each head is rotated
GATED = {
    "head_dim": 32,
    "layer_types": ["full_attention"] * LAYERS,
    "rope_parameters": rope(mrope_section=[2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
}


# decoder class in FAMILIES -> its configuration; head_dim is not hidden_size / heads where a family allows it
TEXT = {
    "Qwen3VLTextModel": lambda: Qwen3VLTextConfig(
        **SIZES, head_dim=16, rope_parameters=rope(mrope_section=[4, 2, 2], mrope_interleaved=True)
    ),
    "Qwen3VLMoeTextModel": lambda: Qwen3VLMoeTextConfig(
        **SIZES,
        **EXPERTS,
        head_dim=16,
        mlp_only_layers=[1],
        rope_parameters=rope(mrope_section=[4, 2, 2], mrope_interleaved=True),
    ),
    "Qwen2_5_VLTextModel": lambda: Qwen2_5_VLTextConfig(**SIZES, rope_parameters=rope(mrope_section=[2, 1, 1])),
    "Qwen3_5TextModel": lambda: Qwen3_5TextConfig(**SIZES, **GATED),
    "Qwen3_5MoeTextModel": lambda: Qwen3_5MoeTextConfig(**SIZES, **GATED, **EXPERTS),
    "Qwen3Model": lambda: Qwen3Config(**SIZES, head_dim=16, rope_parameters=rope()),
    "Qwen3MoeModel": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, rope_parameters=rope()),
}


DECODERS = sorted(TEXT)


PACKAGES = {
    "Qwen3VLTextModel": "qwen3_vl",
    "Qwen3VLMoeTextModel": "qwen3_vl_moe",
    "Qwen2_5_VLTextModel": "qwen2_5_vl",
    "Qwen3_5TextModel": "qwen3_5",
    "Qwen3_5MoeTextModel": "qwen3_5_moe",
    "Qwen3Model": "qwen3",
    "Qwen3MoeModel": "qwen3_moe",
}


def modeling(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{PACKAGES[name]}.modeling_{PACKAGES[name]}")


def build(name: str, *, attention: str = "eager", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random text model; also norms and biases are random, so that leaving one out shows."""
    config = TEXT[name]()
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # grouped products have no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(modeling(name), name)(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape).to(dtype)
    return model


def inputs(name: str, B: int = 2, S: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 50, (B, S), generator=generator)
    positions = torch.arange(S).expand(B, S).clone()
    if not name.startswith(("Qwen3Model", "Qwen3Moe")):  # time, height and width, as in an image
        positions = torch.stack([positions, positions // 2, positions % 3])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids), "use_cache": False}


class Reads:
    """Keeps clones of everything that a tap hands over."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
        self.order: list[int] = []
        self.hidden: list[torch.Tensor] = []
        self.gradients: list[bool] = []

    def attention(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        self.gradients += [query.requires_grad, key.requires_grad, torch.is_grad_enabled()]
        self.order.append(layer)
        self.layers[layer] = query.clone(), key.clone(), scale

    def last_hidden(self, hidden: torch.Tensor) -> None:
        self.gradients += [hidden.requires_grad, torch.is_grad_enabled()]
        self.hidden.append(hidden.clone())


def causal_weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """float64 [B, H, S, S], heads one at a time."""
    B, H, S, _ = query.shape
    out = torch.zeros(B, H, S, S, dtype=torch.float64)
    for h in range(H):
        logits = query[:, h].double() @ key[:, h // (H // key.shape[1])].double().transpose(1, 2) * scale
        out[:, h] = logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    return out


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    )


def training_step(model: nn.Module, name: str, tap: bool) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """(output, gradients, state of the generator) of one forward and backward with dropout on."""
    model.zero_grad()
    torch.manual_seed(11)
    reads = Reads()
    if tap:
        with ForwardTap(model, range(LAYERS), reads.attention, reads.last_hidden):
            hidden = model(**inputs(name)).last_hidden_state
        assert reads.order == list(range(LAYERS))
    else:
        hidden = model(**inputs(name)).last_hidden_state
    hidden.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return hidden.detach(), gradients, torch.get_rng_state()


def rotary_functions() -> dict[str, Any]:
    """Every function that a tap may replace, as it is now."""
    targets = {t for family in FAMILIES.values() for functions in family.attention.values() for t in functions}
    return {t: getattr(importlib.import_module(t.split(":")[0]), t.split(":")[1]) for t in sorted(targets)}
