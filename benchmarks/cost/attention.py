"""Causal attention of a packed row, sequence by sequence, without a dense mask of tokens x tokens.

Shape suffixes: N sequences, S tokens of one, L of all back to back, D head dimension.
"""

import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class PackedAttention:
    """An attention function for transformers that runs each sequence separately, by a fused kernel or eagerly.

    It raises an error if transformers passes a mask.

    Attributes:
        bounds: first and last + 1 position of each sequence.
        eager: layers computed eagerly, with transformers' own function for the family.
        kept: list for the weights of eager layers, as with ``output_attentions``; None: dropped.
    """

    name = "sequence_by_sequence"

    def __init__(self) -> None:
        self.bounds: Sequence[tuple[int, int]] = ()
        self.eager: frozenset[int] = frozenset()
        self.kept: list[torch.Tensor] | None = None
        self._flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()

    def backend(self, device: torch.device) -> str:
        """Description of the attention kernel on a device."""
        if device.type == "cuda" and self._flash:
            import flash_attn

            return getattr(flash_attn, "stands_in", "flash_attn_varlen_func of flash-attn")
        return "torch's fused scaled_dot_product_attention (flash kernel forced), one call per sequence"

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None or query.shape[0] != 1 or self.bounds[-1][1] != query.shape[2]:
            mask = None if attention_mask is None else tuple(attention_mask.shape)
            raise RuntimeError(f"wanted one packed row and no mask, got queries {tuple(query.shape)} and mask {mask}")
        if module.layer_idx in self.eager:
            return self._eagerly(module, query, key, value, scaling), None
        if query.is_cuda and self._flash:
            return self._varlen(query, key, value, scaling)[None], None
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # an error if it cannot run, never the dense fall-back
            parts = [
                nn.functional.scaled_dot_product_attention(
                    query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling, enable_gqa=True
                )
                for a, b in self.bounds
            ]
        return torch.cat(parts, 2).transpose(1, 2), None

    def _varlen(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        starts = _starts(tuple(self.bounds), query.device)
        longest = max(b - a for a, b in self.bounds)
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [L, heads, D]
        return flash_attn_varlen_func(*rows, starts, starts, longest, longest, softmax_scale=scaling, causal=True)

    def _eagerly(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        function = sys.modules[type(module).__module__].eager_attention_forward
        outputs = []
        for a, b in self.bounds:
            mask = causal_mask(b - a, query.dtype, query.device)
            at = slice(a, b)
            out, weights = function(module, query[:, :, at], key[:, :, at], value[:, :, at], mask, scaling, dropout=0.0)
            outputs.append(out)
            if self.kept is not None:
                self.kept.append(weights)
        return torch.cat(outputs, 1)


@functools.lru_cache(maxsize=1)  # not once per layer, because the copy waits for the device
def _starts(bounds: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """int32 [N + 1]: starts of the sequences, and the end."""
    return torch.tensor([0, *(b for _, b in bounds)], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=1)  # a case has sequences of one length; masks of other cases must not count as memory
def causal_mask(S: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, 1, S, S]: the most negative number above the diagonal, as in transformers."""
    return torch.full((S, S), torch.finfo(dtype).min, dtype=dtype, device=device).triu_(1)[None, None]


ATTENTION = PackedAttention()
ALL_ATTENTION_FUNCTIONS.register(PackedAttention.name, ATTENTION)
