"""Capture of queries, keys and hidden states inside a model, for one forward pass.

The capture point is the call of the family's rotary function within the forward of a requested layer. What that call
returns is what the attention kernel gets, for every kernel (FlashAttention, SDPA, eager, verl's own forward of
Qwen2.5-VL). It comes after QK-norm and LoRA and before Ulysses exchanges heads for tokens, and needs no additional
matrix product or rotation. Hooks on the layers show which layer makes the call. Hooks and the wrapped function exist
only between ``__enter__`` and ``__exit__`` of ``ForwardTap``, so the training forward never runs them.

On request the log-sum-exp of the logits is captured too, where FlashAttention is called for packed rows. The kernel
computes it anyway and returns it with ``return_attn_probs``; its output does not change.

Shape suffixes: B rows of the model's batch, S tokens, H query heads, G key heads, D head dimension.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sayo_verl.errors import SayoError
from sayo_verl.models.families import FAMILIES

# layer number, query [B, H, S, D], key [B, G, S, D], scale of the logits; with ``with_lse`` also log-sum-exp [H, S]
ReadAttention = Callable[..., None]
ReadHidden = Callable[[torch.Tensor], None]

ROTARY: Mapping[str, tuple[str, ...]] = {
    name: f for family in FAMILIES.values() for name, f in family.attention.items()
}
FLASH = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.flash))
# called by every family's attention when a packed row holds one sequence, as in a micro-batch of one row
FLASH_OF_ONE = ("transformers.modeling_flash_attention_utils:_flash_fn",)
FULL_ATTENTION = "full_attention"  # as in ``layer_types`` of config.json
DECODERS = {name for family in FAMILIES.values() for name in family.decoder}


def _class_in(module: nn.Module, names: Any) -> str | None:
    """The first of a module's classes in ``names``; FSDP2 and others subclass the modules they wrap."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in names), None)


def text_decoder(model: nn.Module) -> nn.Module:
    """Find the text model: the only module of a known decoder class.

    Raises:
        SayoError: P02 for no such module or more than one.
    """
    found = [module for module in model.modules() if _class_in(module, DECODERS)]
    if len(found) != 1:
        raise SayoError(
            "P02",
            f"found {len(found)} text models of a known family",
            where=type(model).__name__,
            wanted=f"one, of a class in {sorted(DECODERS)}",
            fix=f"use a model of type {', '.join(FAMILIES)}, or set algorithm.adv_estimator=grpo",
        )
    return found[0]


# A model is searched once, because a real one has thousands of modules and the search would cost more than the probe.
# If a module is replaced later, its layer is not read and P04 stops the run.
_FOUND: WeakKeyDictionary[nn.Module, tuple[dict[int, nn.Module], nn.Module]] = WeakKeyDictionary()


def text_attention_layers(model: nn.Module) -> tuple[dict[int, nn.Module], int]:
    """The decoder's attention modules by layer index, and its number of layers; a layer may have no such module.

    Raises:
        SayoError: P02 for no modules or two of the same index.
    """
    if model in _FOUND:
        layers, decoder = _FOUND[model]
        return layers, len(decoder.layers)  # type: ignore[arg-type]
    decoder = text_decoder(model)
    found = [module for module in decoder.modules() if _class_in(module, ROTARY)]
    layers = {int(module.layer_idx): module for module in found}  # type: ignore[arg-type]
    if not layers or len(layers) != len(found):
        raise SayoError(
            "P02",
            f"found {len(found)} text attention modules for {len(layers)} layers",
            where=type(model).__name__,
            wanted=f"one per layer, of a class in {sorted(ROTARY)}",
            fix=f"use a model of type {', '.join(FAMILIES)}, or set algorithm.adv_estimator=grpo",
        )
    _FOUND[model] = layers, decoder
    return layers, len(decoder.layers)  # type: ignore[arg-type]


def resolve_layers(layers: Sequence[int], n_layers: int, *, where: str) -> tuple[int, ...]:
    """Convert layer numbers, which may count from the last, to numbers from 0.

    Raises:
        SayoError: P03 for a layer that does not exist or is named twice.
    """
    resolved = tuple(layer + n_layers if layer < 0 else layer for layer in layers)
    if not resolved or any(not 0 <= layer < n_layers for layer in resolved) or len(set(resolved)) != len(resolved):
        raise SayoError(
            "P03",
            f"the model has {n_layers} decoder layers, but not these",
            where=where,
            got=list(layers),
            wanted=f"distinct numbers within {-n_layers}..{n_layers - 1}",
            fix=f"{where} -1 is the last layer" if where.startswith("--") else f"set {where}=[-1] for the last layer",
        )
    return resolved


def describe_layers(layers: Sequence[int], n_layers: int) -> str:
    """Name layers, numbered from 0, for a reader who may count from 1."""
    if list(layers) == [n_layers - 1]:
        return f"layer index {layers[0]}, the last of {n_layers}"
    return f"layer index {', '.join(map(str, layers))} of {n_layers} layers, counted from 0"


def attention_kinds(attention: Mapping[int, nn.Module], n_layers: int) -> list[str]:
    """What each layer of a model attends with, in the words of ``layer_types`` of config.json if it can be read."""
    kinds = ["no softmax attention"] * n_layers
    for layer, module in attention.items():
        # only families with such layers define the attribute; it is None in a full-attention layer
        window = vars(module).get("sliding_window")
        kinds[layer] = FULL_ATTENTION if window is None else f"a sliding window of {window} tokens"
    return kinds


def configured_kinds(text: Any) -> list[str]:
    """What each layer attends with, from the text model's config alone: only families that mix kinds name them."""
    return list(getattr(text, "layer_types", None) or [FULL_ATTENTION] * text.num_hidden_layers)


def check_full_attention(layers: Sequence[int], kinds: Sequence[str], *, where: str) -> None:
    """Refuse layers in which a token does not attend to all tokens before it.

    Args:
        layers: numbers from 0.
        kinds: of each layer of the model: ``layer_types`` of config.json, or ``attention_kinds``.
        where: names the setting.

    Raises:
        SayoError: P11 for a linear-attention or sliding-window layer.
    """
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL_ATTENTION]
    others = {n: kinds[n] if n < len(kinds) else "no such layer" for n in layers if n not in full}
    if others:
        one = len(others) == 1
        raise SayoError(
            "P11",
            f"layer{'' if one else 's'} {', '.join(map(str, others))} "
            f"{'is not a full-attention layer' if one else 'are not full-attention layers'}",
            where=where,
            got=others,
            wanted=f"one of {full}",
            fix=f"name full-attention layers in {where}",
        )


def asked_layers(model: nn.Module, layers: Sequence[int], *, where: str) -> dict[int, int]:
    """Map each requested layer, as named, to its number from 0.

    Raises:
        SayoError: P02 for an unknown model, P03 for a missing layer, P11 for a layer without full attention.
    """
    attention, n_layers = text_attention_layers(model)
    numbers = {layer: resolve_layers([layer], n_layers, where=where)[0] for layer in layers}
    check_full_attention(list(numbers.values()), attention_kinds(attention, n_layers), where=where)
    return numbers


def _rotary(target: str) -> tuple[ModuleType, str]:
    """The module and name of a family's rotary function.

    Raises:
        SayoError: P26 when the installed transformers does not have it.
    """
    source, name = target.split(":")
    module = importlib.import_module(source)
    if not hasattr(module, name):
        raise SayoError(
            "P26",
            "the installed transformers has no such rotary function",
            where="sayo_verl/models/families.py",
            got=f"transformers {version('transformers')}",
            wanted=target,
            fix="install the version of transformers that pyproject.toml names",
        )
    return module, name


def flash_functions(targets: Sequence[str] = FLASH) -> list[tuple[ModuleType, str, Callable[..., Any]]]:
    """FlashAttention's functions in loaded modules. A name may be empty if flash-attn is not installed.

    ``FLASH`` names those for sequences of different lengths, ``FLASH_OF_ONE`` those of one length.
    """
    places = [(sys.modules.get(source), name) for source, _, name in (target.partition(":") for target in targets)]
    found = [(module, name, getattr(module, name, None)) for module, name in places if module is not None]
    return [(module, name, function) for module, name, function in found if function is not None]


class ForwardTap:
    """Passes queries and keys of some layers, and the last hidden states, to readers during one forward pass.

    Args:
        model: the (wrapped) model.
        layers: layer numbers from 0; may be empty.
        read: called once per layer, inside the layer's forward; it must not keep its arguments.
        read_hidden: called once, with the output of the text model's last norm; None: not needed.
        with_lse: pass the log-sum-exp of packed rows as well; ``read`` is then called after the attention kernel.

    Raises:
        SayoError: P02 and P11 for a model or layer that cannot be read. On exit without an exception: P04 when a layer
            or the hidden states were not read exactly once, P31 when a layer's kernel returned no log-sum-exp.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int],
        read: ReadAttention,
        read_hidden: ReadHidden | None = None,
        *,
        with_lse: bool = False,
    ) -> None:
        attention, n_layers = text_attention_layers(model)
        check_full_attention(layers, attention_kinds(attention, n_layers), where="the layers of a statistic")
        self._modules = {layer: attention[layer] for layer in layers}
        self._norm = _FOUND[model][1].get_submodule("norm") if read_hidden else None
        targets = dict.fromkeys(t for m in self._modules.values() for t in ROTARY[str(_class_in(m, ROTARY))])
        self._rotaries = [_rotary(target) for target in targets]
        self._read, self._read_hidden = read, read_hidden
        self._handles: list[Any] = []
        self._originals: list[tuple[Any, str, Any]] = []
        self._with_lse = with_lse
        # queries and keys whose kernel has not run yet
        self._pending: tuple[torch.Tensor, torch.Tensor, float] | None = None
        self._without_lse: dict[int, str] = {}
        self._current: int | None = None
        self._reads: dict[int | str, int] = dict.fromkeys(layers, 0)
        if read_hidden:
            self._reads["hidden"] = 0

    def __enter__(self) -> "ForwardTap":
        for layer, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._begin(layer)))
            # also when the forward fails, so that a later call of the function is not attributed to this layer
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        for python_module, name in self._rotaries:
            original = getattr(python_module, name)
            self._originals.append((python_module, name, original))
            setattr(python_module, name, self._listening(original))
        for python_module, name, original in flash_functions((*FLASH, *FLASH_OF_ONE)) if self._with_lse else ():
            self._originals.append((python_module, name, original))
            setattr(python_module, name, self._with_its_lse(original))
        if self._norm is not None:
            self._handles.append(self._norm.register_forward_hook(self._take_hidden))
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for python_module, name, original in self._originals:
            setattr(python_module, name, original)
        self._handles.clear()
        self._originals.clear()
        if exc_type is None and self._without_lse:
            raise SayoError(
                "P31",
                "the attention kernel returned no log-sum-exp of the probed tokens",
                where="ForwardTap",
                got=self._without_lse,
                wanted="one number for each head and token of the queries that were read, from flash-attn's "
                "function for packed rows",
                fix="set sayo.probe_path=fast, which computes its own",
            )
        if exc_type is None and any(n != 1 for n in self._reads.values()):
            raise SayoError(
                "P04",
                "a probed layer was read a wrong number of times in one forward pass",
                where="ForwardTap",
                got=self._reads,
                wanted="once per layer",
                fix="disable what re-runs, skips or compiles layers or replaces their rotary embedding in the log-prob "
                "pass (activation checkpointing in eval mode, layer skipping, torch.compile, fused attention)",
            )

    def _begin(self, layer: int):
        def hook(_module: nn.Module, _args: object) -> None:
            self._current = layer

        return hook

    def _end(self, _module: nn.Module, _args: object, _output: object) -> None:
        if self._pending is not None and self._current is not None:
            self._without_lse[self._current] = "FlashAttention was not called for packed rows"
        self._current = self._pending = None

    def _listening(self, original: Callable[..., tuple[torch.Tensor, torch.Tensor]]):
        def rotate(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            query, key = original(*args, **kwargs)
            if self._current is not None:
                self._reads[self._current] += 1
                scale = float(self._modules[self._current].scaling)  # type: ignore[arg-type]
                if self._with_lse:
                    self._pending = query.detach(), key.detach(), scale
                else:
                    with torch.no_grad():
                        self._read(self._current, query.detach(), key.detach(), scale)
            return query, key

        return rotate

    def _with_its_lse(self, original: Callable[..., Any]):
        def attend(*args: Any, **kwargs: Any) -> Any:
            if self._pending is None or self._current is None:  # of another layer or the vision tower
                return original(*args, **kwargs)
            output, lse, *_ = original(*args, **kwargs, return_attn_probs=True)
            lse = lse[0] if lse.ndim == 3 and lse.shape[0] == 1 else lse  # [1, H, S] for a row with one sequence
            (query, key, scale), self._pending = self._pending, None
            seen = kwargs["q"] if "q" in kwargs else args[0]
            if lse.shape != query.shape[1:3] or seen.dtype != query.dtype:
                self._without_lse[self._current] = (
                    f"{tuple(lse.shape)} of {seen.dtype} for {query.shape[1]} heads and {query.shape[2]} tokens of "
                    f"{query.dtype}"
                )
                return output
            with torch.no_grad():
                self._read(self._current, query, key, scale, lse.detach())
            return output

        return attend

    def _take_hidden(self, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        assert self._read_hidden is not None  # the hook was set because of it
        self._reads["hidden"] += 1
        with torch.no_grad():
            self._read_hidden(output.detach())
