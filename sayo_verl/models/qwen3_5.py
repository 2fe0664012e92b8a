"""Linear attention of Qwen3.5 over packed rows, which verl 0.9.1 computes wrong without flash-linear-attention.

A layer of linear attention carries a state from token to token, so it must know where the sequences of a packed row
end. verl passes ``cu_seqlens`` to the layer's kernel if the kernel's signature accepts that name, and else calls the
kernel once per sequence (``verl/models/transformers/qwen3_5.py: _packed_chunk_gated_delta_rule``). The kernel that
transformers 5.9 uses without flash-linear-attention accepts any name through ``**kwargs`` and ignores it: the state of
one sequence runs into the next, and no error says so. Padded rows are not affected, because padding is on the right.
"""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sayo_verl.errors import SayoError

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe")
PACKAGE = "flash-linear-attention"
INSTALL = f"pip install {PACKAGE}==0.6.0"  # its kernel has cu_seqlens, and cp_context for Ulysses
PACKED = "actor_rollout_ref.model.use_remove_padding"


def installed() -> str | None:
    """Version of flash-linear-attention; None without it."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def kernel_of(model_type: str) -> Callable[..., Any]:
    """The kernel that a model gets in this process: flash-linear-attention's, or transformers' own."""
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    return module.chunk_gated_delta_rule or module.torch_chunk_gated_delta_rule


def check_packed_kernel(kernel: Callable[..., Any], *, where: str = PACKED) -> None:
    """Refuse packed rows with a kernel that does not start each sequence anew.

    Args:
        kernel: of a layer of linear attention.
        where: the setting that packs rows.

    Raises:
        SayoError: C10.
    """
    if "cu_seqlens" not in inspect.signature(kernel).parameters:
        raise SayoError(
            "C10",
            "in packed rows the state of linear attention would run from one sequence into the next, without an error",
            where=where,
            got=f"True, and a kernel that ignores where sequences end: {kernel.__module__}.{kernel.__name__}",
            wanted=f"{PACKAGE} on a GPU, or padded rows",
            fix=f"{INSTALL}, or set {PACKED}=False",
        )


def check_packed_model(model: Any, *, packed: bool) -> None:
    """``check_packed_kernel`` for each layer of linear attention of a loaded model; nothing for padded rows."""
    if packed:
        for kernel in {m.chunk_gated_delta_rule for m in model.modules() if hasattr(m, "chunk_gated_delta_rule")}:
            check_packed_kernel(kernel)
