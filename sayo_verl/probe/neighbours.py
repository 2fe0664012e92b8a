"""Response tokens with similar attention to the image: the neighbours in AT-RL's graph.

AT-RL (arXiv 2602.11455) groups the tokens of a response by METIS "on the similarity of their attention patterns". Its
formulas and code are not public. This file is our interpretation. A token's pattern is its attention profile over the
image's visual tokens (mean over heads). Similarity is the cosine. A token's neighbours are the m most similar tokens.
``sayo_verl.metis`` builds the graph from them.

Shape suffixes: T tokens of one response, t and s of a chunk, V visual tokens, m neighbours.
"""

import torch

from sayo_verl.errors import SayoError


@torch.no_grad()
def top_neighbours(profile: torch.Tensor, m: int, *, chunk: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens with the attention profiles most similar to each token's own.

    Values are not checked here, so that the host does not wait for the device. The caller must refuse a profile that is
    not finite (``Measurement.finish`` does, with P25).

    Args:
        profile: [T, V] attention of each token to each visual token, any floating type, finite.
        m: number of neighbours.
        chunk: tokens handled at once; memory is chunk * T and chunk * V numbers, never T * T.

    Returns:
        index int64 [T, m] and similarity float32 [T, m], most similar first and the lower index first among equals,
        without the token itself. The similarity is the cosine in [-1, 1], and 0 if either profile is all zero. If there
        are fewer than m other tokens, index is -1 and similarity 0.

    Raises:
        SayoError: P18 for an invalid shape, type, ``m`` or ``chunk``.
    """
    if profile.ndim != 2 or not profile.is_floating_point() or m < 1 or chunk < 1:
        raise SayoError(
            "P18",
            "the attention profiles are invalid",
            where="top_neighbours",
            got=f"profile {tuple(profile.shape)} {profile.dtype}, m {m}, chunk {chunk}",
            wanted="floating [T, V], m and chunk at least 1",
            fix="request at least one neighbour; otherwise this is a defect of the probe, report it",
        )
    T, found = profile.shape[0], min(m, max(profile.shape[0] - 1, 0))
    index_Tm = torch.full((T, m), -1, dtype=torch.int64, device=profile.device)
    similarity_Tm = torch.zeros(T, m, dtype=torch.float32, device=profile.device)
    if found == 0:
        return index_Tm, similarity_Tm
    profile_TV = profile.detach()
    last_first_T = torch.arange(T - 1, -1, -1, device=profile.device)
    for first in range(0, T, chunk):
        unit_tV = _unit(profile_TV[first : first + chunk])
        # Products are float64 and ranks float32. Equal profiles then have equal similarities at any place of a matrix
        # product, so neither chunks nor devices decide between them, and no cosine is above 1. Autocast does not change
        # float64.
        parts = [(unit_tV @ _unit(part_sV).T).float() for part_sV in profile_TV.split(chunk)]
        cosine_tT = torch.cat(parts, 1)
        cosine_tT.diagonal(first).fill_(float("-inf"))  # ranks last, and topk takes at most T - 1
        # topk may take any of several equal values, so it ranks distinct integers
        rank_tT = (_in_order(cosine_tT) << 32) | last_first_T
        order_tm = T - 1 - (rank_tT.topk(found, dim=1).values & 0xFFFFFFFF)
        index_Tm[first : first + chunk, :found] = order_tm
        similarity_Tm[first : first + chunk, :found] = cosine_tT.gather(1, order_tm)
    return index_Tm, similarity_Tm


def _unit(part_sV: torch.Tensor) -> torch.Tensor:
    """float64 [s, V]: profiles scaled to length one; all-zero profiles stay zero."""
    part_sV = part_sV.double()
    norm_s1 = torch.linalg.vector_norm(part_sV, dim=1, keepdim=True)
    return part_sV / norm_s1.masked_fill(norm_s1 == 0, 1.0)


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """int64 values in the order of the float32 numbers: their bits, inverted for negative numbers."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
