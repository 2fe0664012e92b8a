"""Which response tokens look at the image alike: the graph that a partitioner such as METIS takes.

AT-RL (arXiv 2602.11455) groups the tokens of a response by METIS "on the similarity of their attention patterns". Its
formulas and code are not public. This file is our reading: a token's pattern is its attention profile over the image's
visual tokens (mean over heads), alike means cosine, the graph joins each token to the few that are most like it, and
weights are the cosines in whole numbers, as METIS wants them. Nothing here imports METIS.

Shape suffixes: T tokens of one response, t of a chunk, V visual tokens, m neighbours, P directed pairs, E entries of
the adjacency (two per edge).
"""

from typing import NamedTuple

import torch

from sayo_verl.errors import SayoError

MAX_LEVELS = 2**20


class Graph(NamedTuple):
    """An undirected graph without self loops, in compressed rows: METIS's ``xadj``, ``adjncy`` and ``adjwgt``.

    Attributes:
        offsets: int64 [T+1]; token i's neighbours lie at offsets[i] .. offsets[i+1] - 1 of the other two.
        neighbours: int64 [E], ascending within a token; j is among i's exactly when i is among j's.
        weights: int64 [E], 1 or more, the same in both directions.
    """

    offsets: torch.Tensor
    neighbours: torch.Tensor
    weights: torch.Tensor


@torch.no_grad()
def top_neighbours(profile: torch.Tensor, m: int, *, chunk: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose attention profiles are most like each token's own: edges of AT-RL's graph in our reading.

    Args:
        profile: [T, V] attention of each token to each visual token, any floating type.
        m: neighbours asked for.
        chunk: tokens handled at once; memory is chunk * T and T * V numbers, never T * T.

    Returns:
        index int64 [T, m] and similarity float32 [T, m], most alike first and the lower index first among equals; the
        token itself is left out. The similarity is the cosine in [-1, 1], and 0 where either profile is all zero. Where
        there are fewer than m other tokens, index is -1 and similarity 0.

    Raises:
        SayoError: P18 for shapes and numbers that do not fit, P25 for a profile that is not finite.
    """
    if profile.ndim != 2 or not profile.is_floating_point() or m < 1 or chunk < 1:
        raise SayoError(
            "P18",
            "the attention profiles do not fit",
            where="top_neighbours",
            got=f"profile {tuple(profile.shape)} {profile.dtype}, m {m}, chunk {chunk}",
            wanted="floating [T, V], m and chunk at least 1",
            fix="ask for at least one neighbour; else this is a defect of the probe, report it",
        )
    _check_finite(profile, where="top_neighbours")
    T, found = profile.shape[0], min(m, max(profile.shape[0] - 1, 0))
    # Products in float64, ranks by float32: profiles that are equal give equal similarities wherever they stand in a
    # matrix product, so that neither chunks nor devices decide between them, and no cosine is above 1. Autocast leaves
    # float64 alone.
    profile_TV = profile.detach().double()
    norm_T1 = torch.linalg.vector_norm(profile_TV, dim=1, keepdim=True)
    unit_TV = profile_TV / norm_T1.masked_fill(norm_T1 == 0, 1.0)
    index_Tm = torch.full((T, m), -1, dtype=torch.int64, device=profile.device)
    similarity_Tm = torch.zeros(T, m, dtype=torch.float32, device=profile.device)
    for first in range(0, T, chunk):
        cosine_tT = (unit_TV[first : first + chunk] @ unit_TV.T).float()
        cosine_tT.diagonal(first).fill_(float("-inf"))  # comes last, and there are at most T - 1 others to take
        values_tT, order_tT = cosine_tT.sort(dim=1, descending=True, stable=True)
        index_Tm[first : first + chunk, :found] = order_tT[:, :found]
        similarity_Tm[first : first + chunk, :found] = values_tT[:, :found]
    return index_Tm, similarity_Tm


@torch.no_grad()
def adjacency(index: torch.Tensor, similarity: torch.Tensor, *, levels: int = 1000) -> Graph:
    """The graph of ``top_neighbours`` as METIS takes it: i and j are joined when either is among the other's m.

    Args:
        index: int64 [T, m]; -1 for none. A token's own index and repetitions count for nothing.
        similarity: floating [T, m] in [-1, 1]; what stands beside -1 is not looked at.
        levels: weight of similarity 1. An edge weighs round(levels * similarity), by the larger of the two directions
            if they differ, and is dropped when that is not positive: METIS takes positive whole numbers only.

    Returns:
        ``Graph``, on the device of the inputs. Tokens without an edge have an empty row.

    Raises:
        SayoError: P18 for shapes and numbers that do not fit, P25 for a similarity that is not finite.
    """
    T = index.shape[0] if index.ndim == 2 else 0
    fits = index.ndim == 2 and index.shape == similarity.shape and index.dtype == torch.int64
    fits = fits and similarity.is_floating_point() and 1 <= levels <= MAX_LEVELS
    if not fits or (index.numel() and (int(index.min()) < -1 or int(index.max()) >= T)):
        raise SayoError(
            "P18",
            "the neighbours do not fit",
            where="adjacency",
            got=f"index {tuple(index.shape)} {index.dtype}{_extremes(index)}, similarity {tuple(similarity.shape)} "
            f"{similarity.dtype}, levels {levels}",
            wanted=f"int64 [T, m] in -1 .. T - 1, floating [T, m], levels in 1 .. {MAX_LEVELS}",
            fix="pass what top_neighbours returned",
        )
    is_edge_Tm = (index >= 0) & (index != torch.arange(T, device=index.device)[:, None])
    source_P, m_P = is_edge_Tm.nonzero(as_tuple=True)
    target_P, similarity_P = index[source_P, m_P], similarity[source_P, m_P].double()
    _check_finite(similarity_P, where="adjacency")
    if similarity_P.numel() and float(similarity_P.abs().max()) > 1:
        raise SayoError(
            "P18",
            "a similarity is no cosine",
            where="adjacency",
            got=_extremes(similarity_P).strip(),
            wanted="-1 .. 1",
            fix="pass what top_neighbours returned",
        )
    weight_P = (levels * similarity_P).round().long()
    source_P, target_P, weight_P = (x[weight_P > 0] for x in (source_P, target_P, weight_P))
    both_ways_E = torch.cat([source_P * T + target_P, target_P * T + source_P])
    # One sort by place and then weight: the last entry of a place is the larger of its directions.
    code_E = (both_ways_E * (levels + 1) + weight_P.repeat(2)).sort().values
    place_E, weight_E = code_E // (levels + 1), code_E % (levels + 1)
    last_E = torch.ones_like(place_E, dtype=torch.bool)
    last_E[:-1] = place_E[1:] != place_E[:-1]
    place_E, weight_E = place_E[last_E], weight_E[last_E]
    # a row begins at the first entry that lies at or behind its first place
    offsets = torch.searchsorted(place_E, torch.arange(T + 1, device=index.device) * T)
    return Graph(offsets, place_E % max(T, 1), weight_E)


def _extremes(values: torch.Tensor) -> str:
    return f" {values.min().item()} .. {values.max().item()}" if values.numel() else ""


def _check_finite(values: torch.Tensor, *, where: str) -> None:
    """Refuse NaN and infinities: they would be sorted somewhere.

    Raises:
        SayoError: P25.
    """
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise SayoError(
            "P25",
            "an attention profile or similarity is not finite",
            where=where,
            got=f"{wrong} of {values.numel()} values",
            wanted="finite numbers",
            fix="look for NaN in the model's queries and keys; if they are finite, this is a defect of the probe",
        )
