"""Which response tokens look at the image alike: the neighbours of which AT-RL's graph is made.

AT-RL (arXiv 2602.11455) groups the tokens of a response by METIS "on the similarity of their attention patterns". Its
formulas and code are not public. This file is our reading: a token's pattern is its attention profile over the image's
visual tokens (mean over heads), alike means cosine, and a token's neighbours are the few most like it. The graph is
made of them in ``sayo_verl.partition``.

Shape suffixes: T tokens of one response, t of a chunk, V visual tokens, m neighbours.
"""

import torch

from sayo_verl.errors import SayoError


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
    wrong = int((~profile.isfinite()).sum())
    if wrong:  # they would be sorted somewhere
        raise SayoError(
            "P25",
            "an attention profile is not finite",
            where="top_neighbours",
            got=f"{wrong} of {profile.numel()} values",
            wanted="finite numbers",
            fix="look for NaN in the model's queries and keys; if they are finite, this is a defect of the probe",
        )
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
