"""Attention mass on marked keys: the plain path. Exact, chunked over query rows, float32.

For one sequence and one layer: softmax over *all* causal keys of the sequence, then the sum over each marked set of
keys, then the mean over heads. Nothing of size T x S outlives a chunk, K/V heads are not replicated, and no autograd
graph is built.

Shape suffixes: T query rows, t rows of a chunk, S keys (tokens of the sequence), H query heads, G key heads (H is a
multiple of G), D head dimension, K marked sets.
"""

import torch

from sayo_verl.errors import SayoError


@torch.no_grad()
def attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    marked: torch.Tensor,
    *,
    scale: float,
    chunk: int = 128,
) -> torch.Tensor:
    """Share of attention that each query row gives to each marked set of keys.

    Args:
        query: [T, H, D], after rotary embedding.
        key: [S, G, D], after rotary embedding, of the same sequence only.
        positions: int [T], position of each query row within the sequence; a row attends to keys 0..position.
        marked: bool [K, S].
        scale: factor on the logits, usually D ** -0.5.
        chunk: query rows handled at once; bounds memory at chunk * H * S float32.

    Returns:
        float32 [K, T] in [0, 1], mean over heads.

    Raises:
        SayoError: P01 for shapes that do not fit.
    """
    T, H, D = query.shape
    S, G, _ = key.shape
    if H % G or key.shape[2] != D or positions.shape != (T,) or marked.ndim != 2 or marked.shape[1] != S:
        raise SayoError(
            "P01",
            "query, key, positions and marked keys do not fit",
            where="attention_mass",
            got=f"query {tuple(query.shape)}, key {tuple(key.shape)}, positions {tuple(positions.shape)}, "
            f"marked {tuple(marked.shape)}",
            wanted="[T, H, D], [S, G, D], [T], [K, S] with H a multiple of G",
            fix="this is a defect of the capture; report it with the model family and verl's settings",
        )
    out_KT = torch.zeros(marked.shape[0], T, dtype=torch.float32, device=query.device)
    if T == 0:
        return out_KT
    # The engine runs the model under autocast; without this, autocast would cast the float32 products back to bfloat16.
    with torch.autocast(device_type=query.device.type, enabled=False):
        key_GDS = key.detach().float().permute(1, 2, 0)
        marked_SK = marked.float().T
        columns_S = torch.arange(S, device=query.device)
        for start in range(0, T, chunk):
            rows = slice(start, min(start + chunk, T))
            # [G, (H/G) * t, D] @ [G, D, S]: every key head serves its own query heads without being copied
            query_t = query[rows].detach().float()
            t = query_t.shape[0]
            grouped = query_t.view(t, G, H // G, D).permute(1, 2, 0, 3).reshape(G, (H // G) * t, D)
            logits = (grouped @ key_GDS * scale).view(G, H // G, t, S)
            logits.masked_fill_(columns_S[None, :] > positions[rows][:, None], float("-inf"))
            mean_over_heads_tS = logits.softmax(-1).mean((0, 1))
            out_KT[:, rows] = (mean_over_heads_tS @ marked_SK).T
    return out_KT
