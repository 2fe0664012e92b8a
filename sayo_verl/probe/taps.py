"""Where queries and keys are taken inside a model, and for how long.

The capture point is the output of the attention module's query and key norms plus the rotary angles the module was
called with: independent of the attention kernel (FlashAttention, SDPA, eager), after LoRA, without an extra matrix
product, and inside the layer's own forward, where FSDP has its weights gathered. Hooks exist only between ``__enter__``
and ``__exit__`` of ``QueryKeyTap``: the training forward never sees them.

Shape suffixes: N rows of the model's batch, S tokens, H query heads, G key heads, D head dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sayo_verl.errors import SayoError


def _rotary_qwen3_vl(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

    return apply_rotary_pos_emb(query, key, cos, sin)


# Family facts: text attention class -> how its rotary embedding is applied to [N, heads, S, D] queries and keys.
ROTARY: Mapping[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {"Qwen3VLTextAttention": _rotary_qwen3_vl}
SUPPORTED_MODEL_TYPES = ("qwen3_vl",)


# FSDP2 and others subclass the modules they wrap, so a family is looked up along the class hierarchy.
def _rotary_of(module: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    return next((ROTARY[c.__name__] for c in type(module).__mro__ if c.__name__ in ROTARY), None)


Reader = Callable[[int, torch.Tensor, torch.Tensor, float], None]


def text_attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder's attention modules by layer index, found by class and not by name: FSDP and PEFT rename modules.

    Raises:
        SayoError: P02 when there are none or two claim the same index.
    """
    found = [m for m in model.modules() if _rotary_of(m) is not None]
    layers = {int(m.layer_idx): m for m in found}  # type: ignore[arg-type]
    if not layers or len(layers) != len(found):
        raise SayoError(
            "P02",
            f"found {len(found)} text attention modules for {len(layers)} layers",
            where=type(model).__name__,
            wanted=f"one per layer, of a class in {sorted(ROTARY)}",
            fix=f"use a model of type {', '.join(SUPPORTED_MODEL_TYPES)}, or set algorithm.adv_estimator=grpo",
        )
    return layers


def resolve_layers(layers: Sequence[int], n_layers: int, *, where: str) -> tuple[int, ...]:
    """Layer numbers from 0, with negative ones counted from the last.

    Raises:
        SayoError: P03 for a layer that does not exist or is named twice.
    """
    resolved = tuple(layer + n_layers if layer < 0 else layer for layer in layers)
    if not resolved or any(not 0 <= layer < n_layers for layer in resolved) or len(set(resolved)) != len(resolved):
        raise SayoError(
            "P03",
            f"the model has {n_layers} decoder layers and cannot give these",
            where=where,
            got=list(layers),
            wanted=f"distinct numbers within {-n_layers}..{n_layers - 1}",
            fix=f"set {where}=[-1] for the last layer",
        )
    return resolved


class QueryKeyTap:
    """Hands the queries and keys of some layers to a reader during one forward pass.

    Args:
        model: the (wrapped) model.
        layers: layer numbers from 0.
        read: called once per layer as ``read(layer, query [N, H, S, D], key [N, G, S, D], scale)``, rotary applied,
            detached; it must not keep what it gets.

    Raises:
        SayoError: on leaving without an exception, P04 when a layer was read a number of times other than one.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], read: Reader) -> None:
        attention = text_attention_layers(model)
        self._modules = {layer: attention[layer] for layer in layers}
        self._read = read
        self._handles: list[Any] = []
        self._taken: dict[tuple[int, str], Any] = {}
        self._reads = dict.fromkeys(layers, 0)

    def __enter__(self) -> "QueryKeyTap":
        for layer, module in self._modules.items():
            for part in ("q_norm", "k_norm"):
                self._handles.append(module.get_submodule(part).register_forward_hook(self._keep(layer, part)))
            self._handles.append(module.register_forward_pre_hook(self._keep_rotary(layer), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._hand_over(layer)))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken.clear()
        if exc_type is None and any(n != 1 for n in self._reads.values()):
            raise SayoError(
                "P04",
                "a probed layer ran a wrong number of times in one forward pass",
                where="QueryKeyTap",
                got=self._reads,
                wanted="once per layer",
                fix="disable what re-runs or skips layers in the log-prob pass (checkpointing in eval mode, layer "
                "skipping, compiled graphs)",
            )

    def _keep(self, layer: int, part: str):
        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            self._taken[layer, part] = output.detach()

        return hook

    def _keep_rotary(self, layer: int):
        def hook(_module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
            self._taken[layer, "rotary"] = kwargs["position_embeddings"]

        return hook

    def _hand_over(self, layer: int):
        rotary = _rotary_of(self._modules[layer])
        assert rotary is not None  # text_attention_layers found the module by it

        def hook(module: nn.Module, _args: object, _output: object) -> None:
            taken = [self._taken.pop((layer, part)) for part in ("q_norm", "k_norm", "rotary")]
            # the norms see [N, S, heads, D]; verl and HF both reshape before them
            query, key = taken[0].transpose(1, 2), taken[1].transpose(1, 2)
            query, key = rotary(query, key, *taken[2])
            self._reads[layer] += 1
            self._read(layer, query, key, float(module.scaling))  # type: ignore[arg-type]

        return hook
