"""Tables of tiles that divide a micro-batch's work among Triton programs, built on the host once for all layers."""

import functools
from collections.abc import Sequence

import torch

from sayo_verl.probe.reference import Span
from sayo_verl.probe.transfer import to_device


@functools.lru_cache(maxsize=16)  # one per micro-batch in flight is enough; tables are small
def tiles_of(
    spans: tuple[Span, ...], rows: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divide the work of a micro-batch into tiles, with the fields that ``kernels`` reads.

    Args:
        spans: the sequences.
        rows: query rows of a tile, at most.
        keys: of a tile.
        device: of the tables.

    Returns:
        int32 [tiles, 10], tiles of query rows of one sequence; int32 [stretches, 2], the keys to visit with a given
        log-sum-exp; int32 [key tiles, 3].
    """
    tiles: list[tuple[int, ...]] = []
    stretches: list[tuple[int, int]] = []
    key_tiles: list[tuple[int, int, int]] = []
    done = 0
    for span in spans:
        marked = whole_tiles(((0, span.n_keys),) if span.marked is None else span.marked, keys)
        tables = len(stretches), len(marked), len(key_tiles)
        for first in range(0, span.n_queries, rows):
            tiles.append(
                (
                    span.query_batch,
                    span.query_start + first,
                    min(rows, span.n_queries - first),
                    span.position + first,
                    span.key_batch,
                    span.key_start,
                    done + first,
                    *tables,
                )
            )
        stretches += marked
        seen = span.position + span.n_queries  # by the last row; later keys are not needed
        key_tiles += [(span.key_batch, span.key_start + n, min(keys, seen - n)) for n in range(0, seen, keys)]
        done += span.n_queries
    # tiles with most keys start first, so that the last ones are short
    tiles.sort(key=lambda tile: -tile[3])
    tables_of = ((tiles, 10), (stretches or [(0, 0)], 2), (key_tiles or [(0, 0, 0)], 3))
    on_device = to_device([torch.tensor(table, dtype=torch.int32).view(-1, n) for table, n in tables_of], device)
    return on_device[0], on_device[1], on_device[2]


def whole_tiles(stretches: Sequence[tuple[int, int]], keys: int) -> list[tuple[int, int]]:
    """Widen stretches to whole tiles of keys and merge those that meet, so that no key is visited twice."""
    found: list[tuple[int, int]] = []
    for first, end in sorted(stretches):
        first, end = first // keys * keys, -(-end // keys) * keys
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return found
