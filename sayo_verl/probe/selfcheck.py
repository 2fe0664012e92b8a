"""Comparison of the fast path with the reference path on this device, at the model's head shape, before a run.

Kernels are compiled for the device they run on, so a test on another device does not cover them.

Shape suffixes: B rows, H query heads, G key heads, S tokens, D head dimension.
"""

import subprocess
from collections.abc import Iterator, Sequence

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe import reference
from sayo_verl.probe.measure import kernels
from sayo_verl.probe.reference import Span, stretches
from sayo_verl.probe.statistics import FAST_LSE
from sayo_verl.probe.taps import FLASH_OF_ONE, flash_functions

TOLERANCE = 1e-4  # of masses and profiles, which lie in [0, 1], and relative to the spread of the log-sum-exp


def check_path(path: str, *, heads: int, key_heads: int, head_dim: int, device: torch.device) -> tuple[str, float]:
    """Compare the path's functions with the reference on random bfloat16 queries and keys.

    Args:
        path: as in ``StatisticsRequest``.
        heads, key_heads, head_dim: of the model's text attention.
        device: where it will run.

    Returns:
        The module that runs and its largest difference from the reference (0 for the reference itself).

    Raises:
        SayoError: P16, P17 and P29 when the path cannot run here, P24 when it differs from the reference.
    """
    try:
        return _compare(path, heads, key_heads, head_dim, device)
    except (SayoError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # raised when Triton builds its driver
        raise SayoError(
            "P29",
            "the probe's kernels cannot be built or started on this machine",
            where="sayo.probe_path",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            wanted="a C compiler (gcc, clang or CC) and Python.h, with which Triton builds",
            fix="install gcc and the headers of this Python (python3-dev), see `sayo doctor`; or set "
            "sayo.probe_path=reference, which is slower",
        ) from error


def _compare(path: str, heads: int, key_heads: int, head_dim: int, device: torch.device) -> tuple[str, float]:
    chosen = kernels(path, device)
    name = chosen.__name__.rsplit(".", 1)[-1]
    if chosen is reference:
        return name, 0.0
    generator = torch.Generator().manual_seed(0)
    # two sequences in a packed row between other tokens, longer than a tile and not a multiple of it
    spans = [Span(0, 90, 70, 85, 0, 5, 155), Span(0, 170, 131, 10, 0, 160, 141)]
    query, key = (
        torch.randn(1, n, 320, head_dim, generator=generator).to(device, torch.bfloat16) for n in (heads, key_heads)
    )
    sets = torch.randint(0, 8, (1, 320), generator=generator, dtype=torch.int32)
    sets[:, 20:] *= torch.rand(1, 300, generator=generator) < 0.05  # most keys belong to no set
    marked = [s._replace(marked=stretches(sets[0, s.key_start : s.key_start + s.n_keys] != 0)) for s in spans]
    sets = sets.to(device)
    columns = torch.randperm(155, generator=generator)[:50].to(device)
    scale = 3 * head_dim**-0.5  # sharper than random heads
    found, expected = (m.attention_masses(query, key, spans, sets, 3, scale=scale) for m in (chosen, reference))
    profiles = [
        m.attention_profile(query, key, spans[0], expected.lse[:70], columns, scale=scale) for m in (chosen, reference)
    ]
    given = chosen.attention_masses(query, key, marked, sets, 3, scale=scale, lse=expected.lse)
    differences = [found.mass - expected.mass, found.lse - expected.lse, profiles[0] - profiles[1]]
    differences.append(given.mass - expected.mass)
    if path == FAST_LSE:
        differences += [lse.T - expected.lse for lse in _kernels_own(query, key, spans, scale)]
    # NaN must fail, but every comparison with NaN is false
    largest = max(float(d.abs().nan_to_num(float("inf")).max()) for d in differences)
    if not largest <= TOLERANCE:
        raise SayoError(
            "P24",
            f"the {name} path of the probe differs from the reference path on this device",
            where="sayo.probe_path",
            got=f"largest difference {largest:.1e} ({heads} heads, {key_heads} key heads of {head_dim}, {device})",
            wanted=f"at most {TOLERANCE:.0e}",
            fix="set sayo.probe_path=reference and report it with the device, torch and triton versions",
        )
    return name, largest


def _kernels_own(query: torch.Tensor, key: torch.Tensor, spans: Sequence[Span], scale: float) -> Iterator[torch.Tensor]:
    """The log-sum-exp [H, Q] of the spans' query rows from each loaded function of FlashAttention.

    Releases of FlashAttention differ in its layout; a wrong layout gives NaN.

    Raises:
        SayoError: P31 when no function is loaded.
    """
    functions = flash_functions()
    if not functions:
        raise SayoError(
            "P31",
            "there is no FlashAttention to read the log-sum-exp from",
            where="sayo.probe_path",
            got="no function for packed rows is loaded",
            wanted="flash-attn",
            fix="set sayo.probe_path=fast, which computes its own",
        )
    bounds = torch.tensor([0, *(end for s in spans for end in (s.key_start, s.key_start + s.n_keys)), query.shape[2]])
    longest = int(bounds.diff().max())
    starts = bounds.to(query.device, torch.int32)
    packed_query, packed_key = (x[0].transpose(0, 1) for x in (query, key))
    rows = torch.cat([torch.arange(s.query_start, s.query_start + s.n_queries) for s in spans]).to(query.device)
    for _, _, function in functions:
        _, lse, *_ = function(
            packed_query,
            packed_key,
            packed_key,
            starts,
            starts,
            longest,
            longest,
            causal=True,
            softmax_scale=scale,
            return_attn_probs=True,
        )
        yield (
            lse[:, rows] if lse.shape == query.shape[1:3] else query.new_full((query.shape[1], len(rows)), float("nan"))
        )
    for _, _, function in flash_functions(FLASH_OF_ONE):
        parts = []
        for s in spans:
            q, k = (x[None, s.key_start : s.key_start + s.n_keys] for x in (packed_query, packed_key))
            _, lse, *_ = function(q, k, k, causal=True, softmax_scale=scale, return_attn_probs=True)
            if lse.shape != (1, query.shape[1], s.n_keys):
                lse = query.new_full((1, query.shape[1], s.n_keys), float("nan"))
            parts.append(lse[0, :, s.position : s.position + s.n_queries])
        yield torch.cat(parts, 1)
