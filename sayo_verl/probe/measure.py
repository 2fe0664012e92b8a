"""Measurement of the requested statistics, one micro-batch at a time, by the readers of a ``ForwardTap``.

Queries, keys and hidden states are reduced as soon as they are read, so memory is linear in tokens. The attention
profiles are the exception: they exist for one sequence at a time (for several layers, until the last has been read).

Under sequence parallelism every rank holds a slice of the packed tokens with all heads. Keys of a probed layer are
gathered and query rows stay on their rank. Each rank fills in its own rows. The small results are summed over ranks.

Shape suffixes: B rows of the model's batch, S tokens of such a row, L tokens of all sequences back to back,
N sequences, T response tokens, Q query rows, V visual tokens, H query heads, K sets of keys, W values per token, D
hidden size.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe import reference
from sayo_verl.probe.place import Placement, place
from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.profiles import Profiles, check_held, grouped
from sayo_verl.probe.reference import Span
from sayo_verl.probe.shard import Shard
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest


def kernels(path: str, device: torch.device) -> ModuleType:
    """The module with ``attention_masses`` and ``attention_profile`` for a path on a device."""
    if path == "reference" or (path == "auto" and device.type != "cuda"):
        return reference
    from sayo_verl.probe import fast

    return fast


class Measurement:
    """The measurement of one micro-batch.

    Only ``finish`` waits for the device, once, so that the host can launch the model's next layers.

    Args:
        request: what to measure.
        rows: plans in micro-batch order.
        layers: requested layer number -> number from 0.
        packed: the model gets rows back to back ([1, heads, L, D]), not right-padded ([B, heads, S, D]).
        device: where queries and keys will be.
        shard: this rank's slice under sequence parallelism (packed rows only).
    """

    def __init__(
        self,
        request: StatisticsRequest,
        rows: Sequence[RowPlan],
        layers: Mapping[int, int],
        *,
        packed: bool,
        device: torch.device,
        shard: Shard | None = None,
    ) -> None:
        self.rows, self._packed, self._device, self._shard = rows, packed, device, shard
        self._kernels = kernels(request.path, device)
        self._starts = torch.tensor([0, *(row.length for row in rows)]).cumsum(0).tolist()
        self._statistics = {s: {layers[layer] for layer in s.layers} for s in request.statistics}
        for s, numbers in self._statistics.items():
            if len(numbers) != len(s.layers):
                raise SayoError(
                    "P03",
                    "a layer is named twice",
                    where=f"statistic {s.key}",
                    got=list(s.layers),
                    wanted="distinct layers",
                    fix="name each layer once",
                )
        self._reads: dict[int | str, int] = {}  # layer number or "hidden" -> how often it was read
        if shard is not None and any(s.name.startswith("neighbour_") for s in request.statistics):
            raise SayoError(
                "P09",
                "neighbours need every row of a sequence on one rank",
                where="the request",
                got=f"sequence parallel size {shard.size}",
                wanted="1",
                fix="set actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1",
            )
        self._sets = list(dict.fromkeys(name for s in request.statistics for name in _sets_of(s)))
        self._values: dict[Statistic, torch.Tensor] = {}  # [L, W], by attention row
        self._profiles = grouped(self._statistics, device)
        empty = [0.0 if row.image_columns.numel() else float("nan") for row in rows]
        self._sums = [
            {
                s: torch.full((max(row.image_columns.numel(), 1),), value, device=device)
                for s in request.statistics
                if s.name == "patch_sums"
            }
            for row, value in zip(rows, empty, strict=True)
        ]
        self._placement: Placement | None = None

    # ------------------------------------------------------------------------------------------------ reading
    def read(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float, lse: torch.Tensor | None = None
    ) -> None:
        """Read one layer's queries [B, H, S, D] and keys [B, G, S, D] after rotary embedding.

        Args:
            layer: number from 0.
            query, key: of this rank's tokens.
            scale: of the logits.
            lse: float32 [H, tokens], the attention kernel's log-sum-exp of these tokens, for packed rows on one rank
                only; None: the probe computes its own.
        """
        self._reads[layer] = self._reads.get(layer, 0) + 1
        if self._shard is not None:
            key = self._shard.gather(key.detach())
        placed = self._place(key.shape[0], key.shape[2], "keys")
        lse_QH = None if lse is None else lse.T.index_select(0, placed.query_at)
        masses = self._kernels.attention_masses(
            query, key, placed.spans, placed.key_sets, max(len(self._sets), 1), scale=scale, lse=lse_QH
        )
        mass_KQ = masses.mass.mean(-1)
        for statistic, numbers in self._statistics.items():
            if layer not in numbers or statistic.spec.source not in ("mass", "lse"):
                continue
            if statistic.spec.source == "lse":
                self._add(statistic, masses.lse if statistic.per_head else masses.lse.mean(-1, keepdim=True))
                continue
            sets = [self._sets.index(name) for name in _sets_of(statistic)]
            # one by one, because a list of columns would be copied to the device
            by_set = [mass_KQ[k] for k in sets]
            self._add(statistic, masses.mass[sets[0]] if statistic.per_head else torch.stack(by_set, 1))
        profiles = [group for group in self._profiles if layer in group.layers]
        for statistic in (s for group in profiles for s in group.statistics if s.size):
            self._allocate(statistic, statistic.size)  # also if no row has query rows on this rank
        done = 0
        for n, span in zip(placed.span_rows, placed.spans, strict=True) if profiles else ():
            rows_TH = masses.lse[done : done + span.n_queries]
            profile_TV = self._kernels.attention_profile(query, key, span, rows_TH, placed.columns[n], scale=scale)
            for group in profiles:
                self._add_profile(group, n, span, profile_TV)
            done += span.n_queries

    def read_hidden(self, hidden: torch.Tensor) -> None:
        """Read the last hidden states [B, S, D] (a slice of the packed tokens under sequence parallelism)."""
        B, S, D = hidden.shape
        placed = self._place(B, S * (self._shard.size if self._shard else 1), "hidden states")
        self._reads["hidden"] = self._reads.get("hidden", 0) + 1
        low = self._shard.rank * S if self._shard else 0
        flat_LD = hidden.detach().reshape(B * S, D)
        means_ND = torch.zeros(len(self.rows), D, dtype=torch.float32, device=self._device)
        for n, row in enumerate(self.rows):
            image_VD = flat_LD.index_select(0, placed.hidden_columns[n])
            means_ND[n] = image_VD.float().sum(0) / max(row.image_columns.numel(), 1)
        if self._shard:
            self._shard.add_up(means_ND)
        for statistic in (s for s in self._statistics if s.spec.source == "hidden"):
            self._allocate(statistic, 1)
            for n, row in enumerate(self.rows):
                first = row.length - row.response_length + QUERY_ROWS[statistic.query_row]
                start = (self._starts[n] if self._packed else n * S) - low + first
                begin, end = max(start, 0), min(start + row.response_length, B * S)
                if begin < end:
                    cosine_T = torch.cosine_similarity(flat_LD[begin:end].float(), means_ND[n][None], dim=-1)
                    self._put(statistic, self._starts[n] + first + begin - start, cosine_T[:, None], 1.0)

    # ------------------------------------------------------------------------------------------------ results
    def finish(self) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """Return every statistic by key: values of all rows back to back, and the length of each row's part.

        Per-token statistics are float32, [sum of T] or [sum of T, W]: prompts and visual tokens add nothing to what
        leaves a worker. Those per visual token are [sum of max(V, 1)].

        Raises:
            SayoError: P22 for a statistic that was not read exactly once in every layer and for every response token,
                P25 for profiles to compare that are not finite.
        """
        out: dict[str, tuple[torch.Tensor, list[int]]] = {}
        unseen: dict[str, torch.Tensor] = {}
        for statistic, numbers in self._statistics.items():
            parts = {"hidden"} if statistic.spec.source == "hidden" else numbers
            reads = {part: self._reads.get(part, 0) for part in parts}
            if any(n != 1 for n in reads.values()):
                raise SayoError(
                    "P22",
                    "a statistic's inputs were not read exactly once",
                    got=reads,
                    wanted="1 of each",
                    where=f"statistic {statistic.key}",
                    fix="this is a defect of the capture; report it with the model family",
                )
            if statistic.name == "patch_sums":
                sums = [row_sums[statistic] for row_sums in self._sums]
                values, lengths = torch.cat(sums), [part.shape[0] for part in sums]
            else:
                values, lengths = self._values[statistic], [row.response_length for row in self.rows]
            if self._shard:
                values = values.clone()
                self._shard.add_up(values)
            if statistic.name != "patch_sums":
                values, unseen[statistic.key] = self._of_tokens(statistic, values)
            out[statistic.key] = values, lengths
        # in one copy and last, because it waits for the device
        counts = [*unseen.values(), *(group.not_finite for group in self._profiles)]
        counted = torch.stack(counts).tolist() if counts else []
        missed, not_finite = counted[: len(unseen)], sum(counted[len(unseen) :])
        if not_finite:
            raise SayoError(
                "P25",
                "an attention profile is not finite",
                where="Measurement",
                got=f"{not_finite} values",
                wanted="finite numbers",
                fix="look for NaN in the model's queries and keys; if they are finite, this is a defect of the probe",
            )
        if any(missed):
            raise SayoError(
                "P22",
                "a statistic was not measured exactly once for every response token",
                where="Measurement",
                got=f"other tokens: {dict(zip(unseen, missed, strict=True))}",
                wanted="0",
                fix="this is a defect of the capture; report it with verl's settings",
            )
        return out

    # ------------------------------------------------------------------------------------------------ helpers
    def _place(self, B: int, S: int, what: str) -> Placement:
        """Positions of the rows, computed once the first tensor shows the length of a slice.

        Raises:
            SayoError: P01.
        """
        if self._placement is None:
            self._placement = place(
                self.rows, self._sets, B, S, packed=self._packed, shard=self._shard, device=self._device, what=what
            )
        self._placement.check(B, S, what)
        return self._placement

    def _allocate(self, statistic: Statistic, width: int) -> None:
        """Allocate W values per token, by attention row, and the share of layers measured in each row.

        The share distinguishes a row that was not measured from a zero.
        """
        if statistic not in self._values:
            self._values[statistic] = torch.zeros(self._starts[-1], width + 1, dtype=torch.float32, device=self._device)

    def _put(self, statistic: Statistic, at: int, values_TW: torch.Tensor, share: float) -> None:
        """Add values of the attention rows from ``at`` on, and the share of the layers that they cover."""
        rows = self._values[statistic][at : at + values_TW.shape[0]]
        rows[:, :-1] += values_TW * share
        rows[:, -1] += share

    def _add(self, statistic: Statistic, values_QW: torch.Tensor) -> None:
        """Add one layer's values for all query rows at once; the number of operations does not grow with sequences."""
        self._allocate(statistic, values_QW.shape[1])
        assert self._placement is not None
        ones_Q = values_QW.new_ones(values_QW.shape[0], 1)
        share_QW = torch.cat([values_QW, ones_Q], 1) / len(statistic.layers)
        self._values[statistic].index_add_(0, self._placement.rows_at, share_QW)

    def _add_profile(self, group: Profiles, n: int, span: Span, profile_TV: torch.Tensor) -> None:
        """Add one layer's profile of a sequence."""
        prompt, offset = self.rows[n].length - self.rows[n].response_length, QUERY_ROWS[group.query_row]
        # only the rows of the statistic's own convention; the span has one more
        first = max(prompt + offset, span.position)
        last = min(self.rows[n].length + offset, span.position + span.n_queries)
        profile_TV = profile_TV[first - span.position : last - span.position] / len(group.layers)
        for statistic, values in group.take(n, profile_TV):
            if statistic.name == "patch_sums":
                self._sums[n][statistic][: values.shape[0]] += values
            else:
                self._put(statistic, self._starts[n] + first, values, 1.0)
        check_held(self._profiles)

    def _of_tokens(self, statistic: Statistic, rows_LW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of the response tokens of all rows back to back, [sum of T] or [sum of T, W], from attention rows.

        Also return the number of response tokens that were not measured exactly once in every layer.
        """
        assert self._placement is not None
        read = rows_LW[self._placement.tokens_at + QUERY_ROWS[statistic.query_row]]
        values, share = read[:, :-1], read[:, -1]
        wide = statistic.per_head or statistic.size
        return values.contiguous() if wide else values[:, 0].contiguous(), ((share - 1).abs() > 1e-3).sum()


def _sets_of(statistic: Statistic) -> list[str]:
    """Names of the sets of keys that a statistic needs."""
    if statistic.name == "box_mass":
        return [f"box{i}" for i in range(statistic.size)]
    return [statistic.spec.keys] if statistic.spec.source == "mass" else []
