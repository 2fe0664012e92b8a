"""Positions of a micro-batch's rows in the model's tensors, computed on the host and copied once.

Shape suffixes: B rows of the model's batch, S tokens of such a row, L tokens of all sequences back to back,
Q query rows, V visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.reference import Span, stretches
from sayo_verl.probe.shard import Shard
from sayo_verl.probe.transfer import to_device


@dataclass(frozen=True)
class Placement:
    """Positions that a layer needs of its micro-batch; tensors are on the device.

    Attributes:
        spans: the sequences that have query rows on this rank.
        span_rows: the row of each span.
        key_sets: int32 [B, S], bit k is set if the key belongs to set k.
        rows_at: int64 [Q], positions of query rows among the L tokens.
        query_at: int64 [Q], positions of query rows among this rank's tokens.
        columns: for each row int64 [V], its visual tokens, counted from its first token.
        hidden_columns: for each row int64, its visual tokens with hidden states on this rank, counted from the first
            hidden state.
        tokens_at: int64, positions of response tokens among the L tokens.
        lengths: of the rows.
    """

    spans: list[Span]
    span_rows: list[int]
    key_sets: torch.Tensor
    rows_at: torch.Tensor
    query_at: torch.Tensor
    columns: list[torch.Tensor]
    hidden_columns: list[torch.Tensor]
    tokens_at: torch.Tensor
    lengths: list[int]

    def check(self, B: int, S: int, what: str) -> None:
        """Refuse a later tensor with another shape.

        Raises:
            SayoError: P01.
        """
        if self.key_sets.shape != (B, S):
            raise _misfit(what, B, S, self.lengths, "{} x {}, as before".format(*self.key_sets.shape))


def place(
    rows: Sequence[RowPlan],
    sets: Sequence[str],
    B: int,
    S: int,
    *,
    packed: bool,
    shard: Shard | None,
    device: torch.device,
    what: str,
) -> Placement:
    """Find the rows in tensors of B x S tokens.

    Args:
        rows: plans in micro-batch order.
        sets: names of the sets of keys, bit by bit.
        B, S: shape of the model's batch, with the tokens of all ranks.
        packed: rows are back to back ([1, L]), not right-padded ([B, S]).
        shard: this rank's slice of the tokens.
        device: of the result.
        what: name of the tensor with this shape, for the error.

    Raises:
        SayoError: P01 when the rows do not match B and S.
    """
    lengths = [row.length for row in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    longest = starts[-1] if packed else max(lengths)
    if (B != 1 if packed else len(rows) != B) or longest > S:
        raise _misfit(what, B, S, lengths, "one batch row for all" if packed else "a batch row for each")
    here = S // shard.size if shard else B * S
    low = shard.rank * here if shard else 0
    sets_L = torch.zeros(B * S, dtype=torch.int32)
    spans, span_rows, rows_at, query_at, hidden_columns = [], [], [], [], []
    for n, row in enumerate(rows):
        start = starts[n] if packed else n * S
        columns = row.image_columns + start - low
        hidden_columns.append(columns[(columns >= 0) & (columns < here)])
        for bit, name in enumerate(sets):
            sets_L[start : start + row.length] |= row.keys[name].to(torch.int32) << bit
        # Rows P - 1 .. P + T - 1 serve both conventions, so a statistic's bits do not depend on the other requests.
        first = row.length - row.response_length - 1
        begin, end = max(start + first, low), min(start + row.length, low + here)
        if row.response_length == 0 or begin >= end:
            continue
        batch, at = (0, begin - low) if packed else (n, begin - start)
        key_at = (0, start) if packed else (n, 0)
        marked = stretches(sets_L[start : start + row.length] != 0)
        spans.append(Span(batch, at, end - begin, begin - start, *key_at, row.length, marked))
        span_rows.append(n)
        rows_at.append(torch.arange(end - begin) + starts[n] + begin - start)
        query_at.append(torch.arange(begin - low, end - low))
    tokens = [torch.arange(end - row.response_length, end) for end, row in zip(starts[1:], rows, strict=True)]
    none = torch.zeros(0, dtype=torch.int64)
    key_sets, rows_at_Q, query_at_Q, tokens_at, *all_columns = to_device(
        [
            sets_L.view(B, S),
            torch.cat([none, *rows_at]),
            torch.cat([none, *query_at]),
            torch.cat(tokens),
            *(row.image_columns for row in rows),
            *hidden_columns,
        ],
        device,
    )
    N = len(rows)
    return Placement(
        spans, span_rows, key_sets, rows_at_Q, query_at_Q, all_columns[:N], all_columns[N:], tokens_at, lengths
    )


def _misfit(what: str, B: int, S: int, lengths: list[int], wanted: str) -> SayoError:
    return SayoError(
        "P01",
        "the model's batch does not match the plan",
        where="Measurement",
        got=f"{what} of {B} x {S} tokens, rows of {lengths}",
        wanted=wanted,
        fix="this is a defect of the capture; report it with verl's settings",
    )
