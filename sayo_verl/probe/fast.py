"""The statistics of ``sayo_verl.probe.reference`` as Triton kernels: same functions, same arguments, same results.

``attention_masses`` is one pass over response rows x visible keys. It is flash attention without values. Its online
softmax keeps a sum per set of keys and the sum over all keys, so it computes the log-sum-exp as well. A program handles
one tile of rows for one key head, with that head's query heads side by side in the tile. There are no atomics, so every
run gives the same bits. Besides the results it needs one small table of tiles per micro-batch, shared by its layers. A
layer costs two launches. The first, a small one, finds the tiles whose keys all belong to the same sets; there one sum
serves all sets.

If the log-sum-exp is given, as FlashAttention returns it, keys without a set (text and response) are not visited. The
work shrinks by their share.

``attention_profile`` is one pass over rows x chosen keys with a given log-sum-exp. It averages over heads in registers.

There is no fall-back: where Triton cannot run, these functions raise an error.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.reference import Masses, Span, check_inputs, check_lse, check_profile, check_sets
from sayo_verl.probe.tiles import tiles_of

TYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIMENSION = 256
_LOG2_E = 1.4426950408889634


class _Tiling(NamedTuple):
    """Lanes (row x query head) and keys of a tile, warps of a program, key tiles loaded ahead."""

    lanes: int
    keys: int
    warps: int
    stages: int


# Several programs should fit on a multiprocessor, so that one computes exponentials while another multiplies. At 128
# lanes x 64 keys x D 128 of bfloat16 one takes 65 of 227 KiB of shared memory (queries 32, keys 16 per stage). Of the
# tilings that benchmarks/on_gpu.py timed on an H100, _MASSES is the fastest that keeps everything in registers. 128
# keys were up to 13 % faster, but spill with a given log-sum-exp. The other tilings are chosen by arithmetic. Eight
# warps halve the registers that each set costs a thread. float32 products run without tensor cores (``ieee``), because
# they should be exact rather than fast. Larger tiles of them spill.
_MASSES = _Tiling(lanes=128, keys=64, warps=4, stages=2)
_MASSES_OF_MANY_SETS = _Tiling(lanes=128, keys=64, warps=8, stages=3)
_MASSES_OF_WIDE_HEADS = _Tiling(lanes=64, keys=64, warps=4, stages=2)
_PROFILE = _Tiling(lanes=64, keys=128, warps=8, stages=2)
_PROFILE_OF_WIDE_HEADS = _Tiling(lanes=64, keys=64, warps=8, stages=2)
_FLOAT32 = _Tiling(lanes=16, keys=32, warps=4, stages=1)


@torch.no_grad()
def attention_masses(
    query: torch.Tensor,
    key: torch.Tensor,
    spans: Sequence[Span],
    sets: torch.Tensor,
    n_sets: int,
    *,
    scale: float,
    lse: torch.Tensor | None = None,
) -> Masses:
    """How much attention each query row gives to each set of keys; see ``reference.attention_masses``.

    Args:
        query: [B, H, S, D] of bfloat16, float16 or float32, D at most ``MAX_HEAD_DIMENSION``; any strides (fast if D is
            contiguous).
        key: [B, G, S, D].
        spans: the sequences.
        sets: int32 [B, S] parallel to ``key``; bit k is set if the key belongs to set k.
        n_sets: K, at most ``MAX_SETS``; a few sets are fastest.
        scale: factor on the logits, usually D ** -0.5.
        lse: float32 [Q, H] of the same queries and keys. If given, only the keys in ``Span.marked`` are visited, in
            whole tiles; all keys if ``Span.marked`` is None.

    Returns:
        ``Masses`` with the query rows in the order of ``spans``.

    Raises:
        SayoError: P01 for mismatched shapes or types, P16 for tensors Triton cannot run on, P17 without Triton.
    """
    check_inputs(query, key, spans)
    check_sets(key, sets, n_sets)
    check_lse(query, spans, lse)
    kernels = _kernels(query)
    H, G, D, Q = query.shape[1], key.shape[1], query.shape[3], sum(span.n_queries for span in spans)
    mass_KQH = torch.empty(n_sets, Q, H, dtype=torch.float32, device=query.device)
    lse_QH = torch.empty(Q, H, dtype=torch.float32, device=query.device) if lse is None else lse.contiguous()
    if Q == 0:
        return Masses(mass_KQH, lse_QH)
    tiling = _masses_tiling(query.dtype, D, n_sets)
    lanes = max(tiling.lanes, _power_of_two(H // G))
    tiles, marked, key_tiles = tiles_of(tuple(spans), lanes // (H // G), tiling.keys, query.device)
    members = torch.empty(key_tiles.shape[0], 2, dtype=torch.int32, device=query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device, not on the device of the tensors
        kernels.members_kernel[(key_tiles.shape[0],)](
            sets, key_tiles, members, *sets.stride(), N_SETS=n_sets, BLOCK_N=tiling.keys
        )
        kernels.masses_kernel[(tiles.shape[0], G)](
            query.detach(),
            key.detach(),
            sets,
            members,
            tiles,
            marked,
            mass_KQH,
            lse_QH,
            *query.stride(),
            *key.stride(),
            *sets.stride(),
            Q,
            scale * _LOG2_E,
            LSE_GIVEN=lse is not None,
            GROUP=H // G,
            N_SETS=n_sets,
            BLOCK_M=lanes,
            BLOCK_N=tiling.keys,
            **_common(query, tiling, kernels.INTERPRETED),
        )
    return Masses(mass_KQH, lse_QH)


@torch.no_grad()
def attention_profile(
    query: torch.Tensor, key: torch.Tensor, span: Span, lse: torch.Tensor, columns: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Attention of one sequence's query rows to single keys, mean over heads; see ``reference.attention_profile``.

    Args:
        query, key, scale: as for ``attention_masses``.
        span: the sequence.
        lse: float32 [T, H], this sequence's rows of ``Masses.lse``.
        columns: int64 [V] positions within the sequence. The host does not check them, because it would wait for the
            device. A position outside of the sequence gives a column of NaN.

    Returns:
        float32 [T, V] in [0, 1]; 0 where a column comes after the row.

    Raises:
        SayoError: P01 for mismatched shapes or types, P16 for tensors Triton cannot run on, P17 without Triton.
    """
    check_inputs(query, key, [span])
    check_profile(span, query, lse, columns)
    kernels = _kernels(query)
    T, V, H, G = span.n_queries, columns.shape[0], query.shape[1], key.shape[1]
    profile_TV = torch.empty(T, V, dtype=torch.float32, device=query.device)
    if profile_TV.numel() == 0:
        return profile_TV
    tiling = _profile_tiling(query.dtype, query.shape[3])
    query_HTD = query.detach()[span.query_batch, :, span.query_start : span.query_start + T]
    key_GND = key.detach()[span.key_batch, :, span.key_start : span.key_start + span.n_keys]
    with torch.cuda.device_of(query):
        kernels.profile_kernel[(-(-T // tiling.lanes), -(-V // tiling.keys))](
            query_HTD,
            key_GND,
            lse.detach(),
            columns,
            profile_TV,
            *query_HTD.stride(),
            *key_GND.stride(),
            *lse.stride(),
            *columns.stride(),
            T,
            V,
            span.n_keys,
            span.position,
            scale * _LOG2_E,
            N_KEY_HEADS=G,
            GROUP=H // G,
            BLOCK_R=tiling.lanes,
            BLOCK_N=tiling.keys,
            **_common(query, tiling, kernels.INTERPRETED),
        )
    return profile_TV


def _masses_tiling(dtype: torch.dtype, D: int, n_sets: int) -> _Tiling:
    if dtype == torch.float32:
        return _FLOAT32
    if D > 128:
        return _MASSES_OF_WIDE_HEADS
    return _MASSES if n_sets <= 4 else _MASSES_OF_MANY_SETS


def _profile_tiling(dtype: torch.dtype, D: int) -> _Tiling:
    if dtype == torch.float32:
        return _FLOAT32
    return _PROFILE if D <= 128 else _PROFILE_OF_WIDE_HEADS


def _common(query: torch.Tensor, tiling: _Tiling, interpreted: bool) -> dict[str, object]:
    """Arguments of both kernels. ``ieee`` keeps tensor cores from rounding float32 to TensorFloat-32."""
    D = query.shape[3]
    return {
        "D": D,
        "D_PAD": max(16, _power_of_two(D)),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "WIDEN": interpreted and query.dtype == torch.bfloat16,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "enable_fp_fusion": True,
    }


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def _kernels(query: torch.Tensor) -> ModuleType:
    """Check that the kernels can run on such a tensor and return their module.

    Raises:
        SayoError: P01 for an unsupported type or head dimension, P16, P17.
    """
    if query.dtype not in TYPES or not 0 < query.shape[3] <= MAX_HEAD_DIMENSION:
        raise SayoError(
            "P01",
            "the fast path does not support these queries",
            where="attention statistics",
            got=f"{query.dtype}, head dimension {query.shape[3]}",
            wanted=f"one of {', '.join(map(str, TYPES))}, at most {MAX_HEAD_DIMENSION}",
            fix="use path reference",
        )
    try:
        kernels = importlib.import_module("sayo_verl.probe.kernels")
    except ImportError as error:
        raise SayoError(
            "P17",
            "the fast path needs Triton",
            where="sayo_verl.probe.fast",
            got=str(error),
            fix="pip install triton, in the version that `pip show torch` or your vLLM asks for; or use path reference",
        ) from error
    if query.device.type != "cuda" and not kernels.INTERPRETED:
        raise SayoError(
            "P16",
            "the fast path needs CUDA, or TRITON_INTERPRET=1 for testing",
            where="sayo_verl.probe.fast",
            got=f"tensors on {query.device}",
            wanted="a CUDA device",
            fix="use path reference",
        )
    return kernels
