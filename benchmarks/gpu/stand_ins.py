"""Replacements for packages that are not installed: flash-attn, and Ray where verl's engine runs without it.

An installed package is used. Replacements are written on every line of the report.

Shape suffixes: L tokens of all sequences back to back, S of one, H heads, D head dimension.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from typing import Any

import torch
from torch.nn.attention import varlen

BLOCK = 2048  # rows of logits per step of the cross entropy


def flash_attention(tiny: bool) -> str:
    """Make ``import flash_attn`` work and transformers regard it as installed.

    Args:
        tiny: whether transformers must also regard CUDA as available.

    Returns:
        The replacement; empty if the package is installed.
    """
    import transformers.utils.import_utils as installed

    if importlib.util.find_spec("flash_attn") is not None:
        return ""
    names = {"flash_attn_func": _dense, "flash_attn_varlen_func": _packed, "flash_attn_with_kvcache": None}
    _module("flash_attn", __version__="2.8.3", stands_in=_way(tiny), **names)
    unused = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
    _module("flash_attn.bert_padding", **dict.fromkeys(unused, _not_here))
    _module("flash_attn.ops")
    _module("flash_attn.ops.triton")
    _module("flash_attn.ops.triton.cross_entropy", cross_entropy_loss=_cross_entropy)
    installed.PACKAGE_DISTRIBUTION_MAPPING["flash_attn"] = ["flash-attn"]
    if tiny:
        installed.is_torch_cuda_available = lambda: True
    installed.is_flash_attn_2_available.cache_clear()
    if not installed.is_flash_attn_2_available():
        raise RuntimeError("transformers does not accept the replacement for flash-attn")
    return _way(tiny)


def _way(tiny: bool) -> str:
    return "torch attention, one call per sequence" if tiny else "torch.nn.attention.varlen (torch's FlashAttention 2)"


def _module(name: str, **members: Any) -> None:
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module


def _not_here(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("the replacement for flash-attn neither pads nor unpads, because rows are packed here")


def _packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    alibi_slopes: Any = None,
    block_table: Any = None,
) -> Any:
    """``flash_attn_varlen_func`` for [L, heads, D]; with ``return_attn_probs`` also float32 [H, L] and None."""
    _refuse(dropout_p, window_size, softcap, alibi_slopes, block_table)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if not q.is_cuda:
        out, lse = _one_by_one(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scale, causal)
        return (out, lse, None) if return_attn_probs else out
    parameters = _varlen_parameters()
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "window_size" not in parameters:
        options = {"is_causal": causal}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if return_attn_probs:
        options["return_aux"] = varlen.AuxRequest(lse=True)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    starts = (cu_seqlens_q.int(), cu_seqlens_k.int(), int(max_seqlen_q), int(max_seqlen_k))
    found = varlen.varlen_attn(q, k, v, *starts, scale=scale, **options)
    if not return_attn_probs:
        return found
    out, lse = found
    return out, lse if lse.shape[0] == q.shape[1] else lse.T, None  # torch documents [L, H], its kernel returns [H, L]


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of ``varlen_attn``, which differ between versions of torch."""
    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """``flash_attn_func`` for [B, S, heads, D]; with ``return_attn_probs`` also float32 [B, H, S] and None."""
    B, S, T = q.shape[0], q.shape[1], k.shape[1]
    starts_q, starts_k = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * n for n in (S, T))
    q_L, k_L, v_L = (x.flatten(0, 1) for x in (q, k, v))
    out = _packed(q_L, k_L, v_L, starts_q, starts_k, S, T, **options)
    if options.get("return_attn_probs"):
        return out[0].unflatten(0, (B, -1)), out[1].unflatten(1, (B, -1)).transpose(0, 1), None
    return out.unflatten(0, (B, -1))


def _refuse(dropout: float, window: tuple[int, int], softcap: float, alibi: Any, blocks: Any) -> None:
    if dropout or softcap or tuple(window) != (-1, -1) or alibi is not None or blocks is not None:
        raise NotImplementedError(
            "the replacement for flash-attn has no dropout, window, softcap, alibi or block table"
        )


@torch.autocast("cpu", enabled=False)  # the kernel's log-sum-exp is float32 for every model type
def _one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: list[int], ends_k: list[int], scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute plain attention sequence by sequence, and the log-sum-exp float32 [H, L]."""
    outs, lses = [], []
    for n in range(len(ends_q) - 1):
        q_HSD = q[ends_q[n] : ends_q[n + 1]].transpose(0, 1).float()
        k_HSD, v_HSD = (
            x[ends_k[n] : ends_k[n + 1]].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0).float()
            for x in (k, v)
        )
        logits = q_HSD @ k_HSD.transpose(1, 2) * scale
        if causal:
            later = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1 + logits.shape[2] - logits.shape[1])
            logits = logits.masked_fill(later, float("-inf"))
        outs.append((logits.softmax(-1) @ v_HSD).transpose(0, 1).to(q.dtype))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """flash-attn's function in blocks of rows; verl's own fall-back handles one row at a time."""
    parts = zip(logits.split(BLOCK), labels.split(BLOCK), strict=True)
    losses = [torch.nn.functional.cross_entropy(some.float(), label, reduction="none") for some, label in parts]
    return torch.cat(losses), None


class _Absent(type):
    """A name of a missing package, which works as a base class, a decorator and in annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {})

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if cls.__name__ == "is_initialized":
            return False
        if cls.__name__ in ("remote", "method"):
            return args[0] if args else lambda decorated: decorated
        raise RuntimeError(f"{cls.__name__} of a package that is not installed was called")

    def __or__(cls, other: Any) -> Any:
        return object

    __ror__ = __or__


class _AbsentPackages(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        absent = name.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if absent else None

    def exec_module(self, module: Any) -> None:
        missing = _Absent(module.__name__, (), {})
        module.__version__ = "2.60.0"  # verl compares it
        module.__getattr__ = lambda name: getattr(missing, name)


def absent_packages(*names: str) -> list[str]:
    """Make the missing ones of some packages importable, so that only a call raises; return their names."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _AbsentPackages(absent))
    return absent
