"""Attention statistics of packed or padded sequences: the plain path and the signatures that both paths share.

For every response row and head, over *all* causal keys of the row's own sequence:

    lse    = log sum_j exp(scale * q.k_j)
    mass_k = sum over the keys j of set k of exp(scale * q.k_j - lse)

and, when a method needs single columns, the profile: the mean over heads of exp(scale * q.k_j - lse) for chosen keys j.
No tensor of size T x S outlives a chunk. Key heads are not replicated and no autograd graph is built. The arithmetic is
float32 for all input types. ``sayo_verl.probe.fast`` computes the same in Triton.

Shape suffixes: B rows of the model's tensors, S tokens of such a row, H query heads, G key heads (H is a multiple of
G), D head dimension, Q query rows of all sequences back to back, T query rows of one sequence, t of a chunk, N keys of
one sequence, K sets of keys, V chosen keys of one sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sayo_verl.errors import SayoError

MAX_SETS = 31  # a key's sets are the bits of an int32


class Span(NamedTuple):
    """Positions of one sequence's query rows and keys, as plain numbers, so that a layer costs no host work.

    Attributes:
        query_batch, query_start: the first query row is ``query[query_batch, :, query_start]``.
        n_queries: number of consecutive query rows.
        position: of the first query row in its sequence; row i attends to the keys 0 .. position + i.
        key_batch, key_start: the sequence's first key is ``key[key_batch, :, key_start]``.
        n_keys: length of the sequence.
        marked: stretches (first, end) from ``stretches`` that contain all keys of any set; None: unknown. With a given
            log-sum-exp no other keys are visited.
    """

    query_batch: int
    query_start: int
    n_queries: int
    position: int
    key_batch: int
    key_start: int
    n_keys: int
    marked: tuple[tuple[int, int], ...] | None = None


class Masses(NamedTuple):
    """Results per head; the caller reduces over heads.

    Attributes:
        mass: float32 [K, Q, H] in [0, 1].
        lse: float32 [Q, H] in nats.
    """

    mass: torch.Tensor
    lse: torch.Tensor


def check_inputs(query: torch.Tensor, key: torch.Tensor, spans: Sequence[Span]) -> None:
    """Refuse tensors and spans that do not match; both paths call it first.

    Raises:
        SayoError: P01.
    """
    fits = query.ndim == key.ndim == 4 and query.shape[3] == key.shape[3] and key.shape[1] > 0
    fits = fits and query.shape[1] % key.shape[1] == 0
    fits = fits and query.device == key.device and query.dtype == key.dtype
    outside = [
        span
        for span in spans
        if not (
            fits
            and 0 <= span.query_batch < query.shape[0]
            and 0 <= span.key_batch < key.shape[0]
            and 0 <= span.query_start <= span.query_start + span.n_queries <= query.shape[2]
            and 0 <= span.key_start <= span.key_start + span.n_keys <= key.shape[2]
            and 0 <= span.position <= span.position + span.n_queries <= span.n_keys
        )
    ]
    if not fits or outside:
        raise SayoError(
            "P01",
            "queries, keys and sequences do not match",
            where="attention statistics",
            got=f"query {tuple(query.shape)} {query.dtype}, key {tuple(key.shape)} {key.dtype}, "
            f"{f'outside: {outside[0]}' if outside else f'{len(spans)} sequences'}",
            wanted="[B, H, S, D] and [B, G, S, D] of one type and device, H a multiple of G, sequences inside them",
            fix="this is a defect of the capture; report it with the model family and verl's settings",
        )


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
    chunk: int = 128,
) -> Masses:
    """How much attention each query row gives to each set of keys.

    Args:
        query: [B, H, S, D], after rotary embedding; any strides.
        key: [B, G, S, D], after rotary embedding.
        spans: the sequences.
        sets: int32 [B, S] parallel to ``key``; bit k is set if the key belongs to set k.
        n_sets: K, at most ``MAX_SETS``.
        scale: factor on the logits, usually D ** -0.5.
        lse: float32 [Q, H] log-sum-exp of the same queries and keys; None: computed here.
        chunk: query rows handled at once; limits memory to chunk * H * S float32.

    Returns:
        ``Masses`` with the query rows in the order of ``spans``.

    Raises:
        SayoError: P01 for mismatched shapes.
    """
    check_inputs(query, key, spans)
    check_sets(key, sets, n_sets)
    check_lse(query, spans, lse)
    H, Q = query.shape[1], sum(span.n_queries for span in spans)
    mass_KQH = torch.empty(n_sets, Q, H, dtype=torch.float32, device=query.device)
    lse_QH = torch.empty(Q, H, dtype=torch.float32, device=query.device) if lse is None else lse
    bits_K = torch.arange(n_sets, device=query.device, dtype=torch.int32)
    done = 0
    for span in spans:
        sets_N = sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
        member_KN = ((sets_N >> bits_K[:, None]) & 1).float()
        if lse is not None and span.marked is not None:  # as in the fast path, so that a wrong stretch shows here too
            visited_N = torch.zeros_like(member_KN[0])
            for begin, end in span.marked:
                visited_N[begin:end] = 1.0
            member_KN = member_KN * visited_N
        for first, rows, logits_GgtN in _logits(query, key, span, scale, chunk):
            n = logits_GgtN.shape[-1]
            at = slice(done + first, done + first + rows)
            if lse is None:
                max_Ggt = logits_GgtN.amax(-1)
                p_GgtN = logits_GgtN.sub_(max_Ggt[..., None]).exp_()
                sum_Ggt = p_GgtN.sum(-1)
                lse_QH[at] = (max_Ggt + sum_Ggt.log()).reshape(H, rows).T
            else:
                p_GgtN = logits_GgtN.sub_(lse[at].T.reshape(*logits_GgtN.shape[:3], 1)).exp_()
                sum_Ggt = torch.ones_like(p_GgtN[..., 0])
            with torch.autocast(query.device.type, enabled=False):
                for mass_QH, member_N in zip(mass_KQH, member_KN, strict=True):
                    # one by one, because the bits of a set's mass must not depend on the other sets
                    mass_QH[at] = (p_GgtN @ member_N[:n] / sum_Ggt).reshape(H, rows).T
        done += span.n_queries
    return Masses(mass_KQH, lse_QH)


@torch.no_grad()
def attention_profile(
    query: torch.Tensor,
    key: torch.Tensor,
    span: Span,
    lse: torch.Tensor,
    columns: torch.Tensor,
    *,
    scale: float,
    chunk: int = 128,
) -> torch.Tensor:
    """Attention of one sequence's query rows to single keys, mean over heads.

    Args:
        query, key, scale, chunk: as for ``attention_masses``.
        span: the sequence.
        lse: float32 [T, H], this sequence's rows of ``Masses.lse``.
        columns: int64 [V] positions within the sequence, 0 .. n_keys - 1.

    Returns:
        float32 [T, V] in [0, 1]; 0 where a column comes after the row, NaN for a column outside of the sequence.

    Raises:
        SayoError: P01 for mismatched shapes.
    """
    check_inputs(query, key, [span])
    check_profile(span, query, lse, columns)
    H = query.shape[1]
    profile_TV = torch.zeros(span.n_queries, columns.shape[0], dtype=torch.float32, device=query.device)
    if columns.shape[0] == 0:
        return profile_TV
    inside_V = (columns >= 0) & (columns < span.n_keys)
    chosen = key[span.key_batch : span.key_batch + 1, :, span.key_start + torch.where(inside_V, columns, 0)]
    narrow = span._replace(key_batch=0, key_start=0, n_keys=columns.shape[0])
    for first, rows, logits_GgtV in _logits(query, chosen, narrow, scale, chunk, causal=False):
        p_HtV = logits_GgtV.reshape(H, rows, -1).sub_(lse[first : first + rows].T[..., None]).exp_()
        positions_t = torch.arange(span.position + first, span.position + first + rows, device=query.device)
        profile_TV[first : first + rows] = p_HtV.mean(0).masked_fill_(columns > positions_t[:, None], 0.0)
    return profile_TV.masked_fill_(~inside_V, float("nan"))


def _logits(query: torch.Tensor, key: torch.Tensor, span: Span, scale: float, chunk: int, causal: bool = True):
    """Yield (first row, rows, float32 logits [G, H/G, t, n]) of one sequence in chunks; causal: up to the last row."""
    H, G, D = query.shape[1], key.shape[1], query.shape[3]
    key_GND = key[span.key_batch, :, span.key_start : span.key_start + span.n_keys].detach().float()
    for first in range(0, span.n_queries, chunk):
        rows = min(chunk, span.n_queries - first)
        start = span.query_start + first
        query_HtD = query[span.query_batch, :, start : start + rows].detach().float()
        n = span.position + first + rows if causal else span.n_keys
        # The engine runs the model under autocast, which would cast these products to bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            # [G, H/G * t, D] @ [G, D, n]: no key head is copied for its query heads
            logits = query_HtD.reshape(G, H // G * rows, D) @ key_GND[:, :n].transpose(1, 2)
        logits = logits.mul_(scale).view(G, H // G, rows, n)
        if causal:
            positions_t = torch.arange(span.position + first, span.position + first + rows, device=query.device)
            logits.masked_fill_(torch.arange(n, device=query.device) > positions_t[:, None], float("-inf"))
        yield first, rows, logits


def check_sets(key: torch.Tensor, sets: torch.Tensor, n_sets: int) -> None:
    """Refuse sets that do not match the keys.

    Raises:
        SayoError: P01.
    """
    wanted = (key.shape[0], key.shape[2])
    fits = tuple(sets.shape) == wanted and sets.device == key.device
    if not fits or sets.dtype != torch.int32 or not 0 < n_sets <= MAX_SETS:
        raise SayoError(
            "P01",
            "the sets of keys do not match the keys",
            where="attention_masses",
            got=f"sets {tuple(sets.shape)} {sets.dtype} on {sets.device}, {n_sets} sets",
            wanted=f"{wanted} torch.int32 on {key.device}, 1 to {MAX_SETS} sets",
            fix="this is a defect of the capture; report it with the model family and verl's settings",
        )


def check_lse(query: torch.Tensor, spans: Sequence[Span], lse: torch.Tensor | None) -> None:
    """Refuse a log-sum-exp without exactly one number for each query row and head.

    Raises:
        SayoError: P01.
    """
    wanted = (sum(span.n_queries for span in spans), query.shape[1])
    if lse is None or (tuple(lse.shape) == wanted and lse.dtype == torch.float32 and lse.device == query.device):
        return
    raise SayoError(
        "P01",
        "the log-sum-exp does not match the query rows",
        where="attention_masses",
        got=f"{tuple(lse.shape)} {lse.dtype} on {lse.device}",
        wanted=f"{wanted} torch.float32 on {query.device}",
        fix="this is a defect of the capture; report it with verl's settings",
    )


def stretches(marked_N: torch.Tensor, gap: int = 64) -> tuple[tuple[int, int], ...]:
    """Find stretches (first, end) that cover all True of a CPU mask; those at most ``gap`` apart are merged."""
    at = marked_N.nonzero().flatten()
    if at.numel() == 0:
        return ()
    breaks = (at.diff() > gap).nonzero().flatten()
    firsts = torch.cat([at[:1], at[breaks + 1]]).tolist()
    ends = (torch.cat([at[breaks], at[-1:]]) + 1).tolist()
    return tuple(zip(firsts, ends, strict=True))


def check_profile(span: Span, query: torch.Tensor, lse: torch.Tensor, columns: torch.Tensor) -> None:
    """Refuse a log-sum-exp or columns that do not match the sequence.

    Raises:
        SayoError: P01.
    """
    fits = tuple(lse.shape) == (span.n_queries, query.shape[1]) and lse.device == columns.device == query.device
    if not fits or columns.ndim != 1 or columns.dtype != torch.int64:
        raise SayoError(
            "P01",
            "log-sum-exp and columns do not match the sequence",
            where="attention_profile",
            got=f"lse {tuple(lse.shape)} on {lse.device}, columns {tuple(columns.shape)} {columns.dtype} on "
            f"{columns.device}",
            wanted=f"lse {(span.n_queries, query.shape[1])}, int64 [V], on {query.device}",
            fix="this is a defect of the capture; report it with the model family and verl's settings",
        )
