"""Measures what a request asks for, one micro-batch at a time: the readers that a ``ForwardTap`` feeds.

Queries, keys and hidden states are reduced the moment they are handed over; what lives on is linear in tokens, except
the attention profiles, which exist for one sequence at a time (for several layers: until the last has been read).

Under sequence parallelism every rank holds a slice of the packed tokens with all heads. Keys of a probed layer are
gathered, query rows stay where they are, and the small results are added up over the ranks, each of which has filled in
its own rows.

Shape suffixes: B rows of the model's batch, S tokens of such a row, L tokens of all sequences one behind another,
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
    """The module with ``attention_masses`` and ``attention_profile`` that a path names on a device."""
    if path == "reference" or (path == "auto" and device.type != "cuda"):
        return reference
    from sayo_verl.probe import fast

    return fast


class Measurement:
    """One micro-batch.

    Nothing here waits for the device but ``finish``, once: the host is to go on to the model's next layers.

    Args:
        request: what to measure.
        rows: plans in micro-batch order.
        layers: asked layer number -> number from 0.
        packed: the model sees the rows one behind another ([1, heads, L, D]), not right-padded ([B, heads, S, D]).
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
                    "two names of one layer",
                    where=f"statistic {s.key}",
                    got=list(s.layers),
                    wanted="distinct layers",
                    fix="name each layer once",
                )
        self._reads: dict[int | str, int] = {}  # layer number or "hidden" -> how often it was handed over
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
        """One layer's queries [B, H, S, D] and keys [B, G, S, D], rotary applied.

        Args:
            layer: number from 0.
            query, key: of this rank's tokens.
            scale: of the logits.
            lse: float32 [H, tokens], the log-sum-exp that the attention kernel computed for these tokens; None: the
                probe computes its own. Packed rows on one rank only.
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
            if layer not in numbers or statistic.fact.source not in ("mass", "lse"):
                continue
            if statistic.fact.source == "lse":
                self._add(statistic, masses.lse if statistic.per_head else masses.lse.mean(-1, keepdim=True))
                continue
            sets = [self._sets.index(name) for name in _sets_of(statistic)]
            # one by one: a list of columns would be copied to the device
            by_set = [mass_KQ[k] for k in sets]
            self._add(statistic, masses.mass[sets[0]] if statistic.per_head else torch.stack(by_set, 1))
        profiles = [group for group in self._profiles if layer in group.layers]
        for statistic in (s for group in profiles for s in group.statistics if s.size):
            self._expect(statistic, statistic.size)  # also where no row has query rows on this rank
        done = 0
        for n, span in zip(placed.span_rows, placed.spans, strict=True) if profiles else ():
            rows_TH = masses.lse[done : done + span.n_queries]
            profile_TV = self._kernels.attention_profile(query, key, span, rows_TH, placed.columns[n], scale=scale)
            for group in profiles:
                self._add_profile(group, n, span, profile_TV)
            done += span.n_queries

    def read_hidden(self, hidden: torch.Tensor) -> None:
        """The last hidden states [B, S, D] (a slice of the packed tokens under sequence parallelism)."""
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
        for statistic in (s for s in self._statistics if s.fact.source == "hidden"):
            self._expect(statistic, 1)
            for n, row in enumerate(self.rows):
                first = row.length - row.response_length + QUERY_ROWS[statistic.query_row]
                start = (self._starts[n] if self._packed else n * S) - low + first
                begin, end = max(start, 0), min(start + row.response_length, B * S)
                if begin < end:
                    cosine_T = torch.cosine_similarity(flat_LD[begin:end].float(), means_ND[n][None], dim=-1)
                    self._put(statistic, self._starts[n] + first + begin - start, cosine_T[:, None], 1.0)

    # ------------------------------------------------------------------------------------------------ results
    def finish(self) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """Every statistic by key: values one behind another and the length of each row's part.

        Per-token ones are float32 [L] or [L, W], in the wire layout; per visual token ones [sum of max(V, 1)].

        Raises:
            SayoError: P22 for a statistic that was not read once in every layer and for every response token, P25 for
                profiles to be compared that are not finite.
        """
        out: dict[str, tuple[torch.Tensor, list[int]]] = {}
        unseen: dict[str, torch.Tensor] = {}
        for statistic, numbers in self._statistics.items():
            asked = {"hidden"} if statistic.fact.source == "hidden" else numbers
            reads = {part: self._reads.get(part, 0) for part in asked}
            if any(n != 1 for n in reads.values()):
                raise SayoError(
                    "P22",
                    "what a statistic needs was not handed over once",
                    got=reads,
                    wanted="1 of each",
                    where=f"statistic {statistic.key}",
                    fix="this is a defect of the capture; report it with the model family",
                )
            if statistic.name == "patch_sums":
                parts = [sums[statistic] for sums in self._sums]
                values, lengths = torch.cat(parts), [part.shape[0] for part in parts]
            else:
                values, lengths = self._values[statistic], [row.length for row in self.rows]
            if self._shard:
                values = values.clone()
                self._shard.add_up(values)
            if statistic.name != "patch_sums":
                values, unseen[statistic.key] = self._to_wire(statistic, values)
            out[statistic.key] = values, lengths
        # all at once and last: it waits for the device
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
                "a statistic was not measured once for every response token",
                where="Measurement",
                got=f"tokens otherwise: {dict(zip(unseen, missed, strict=True))}",
                wanted="0",
                fix="this is a defect of the capture; report it with verl's settings",
            )
        return out

    # ------------------------------------------------------------------------------------------------ helpers
    def _place(self, B: int, S: int, what: str) -> Placement:
        """Where the rows lie: known once the first tensor shows how long a slice is.

        Raises:
            SayoError: P01.
        """
        if self._placement is None:
            self._placement = place(
                self.rows, self._sets, B, S, packed=self._packed, shard=self._shard, device=self._device, what=what
            )
        self._placement.check(B, S, what)
        return self._placement

    def _expect(self, statistic: Statistic, width: int) -> None:
        """Make room for W values per token, by attention row, and for the share of its layers that each row has seen:
        a row that nobody measured must not pass for a zero."""
        if statistic not in self._values:
            self._values[statistic] = torch.zeros(self._starts[-1], width + 1, dtype=torch.float32, device=self._device)

    def _put(self, statistic: Statistic, at: int, values_TW: torch.Tensor, share: float) -> None:
        """Values of the attention rows from ``at`` on, which make up a share of what is to be measured there."""
        rows = self._values[statistic][at : at + values_TW.shape[0]]
        rows[:, :-1] += values_TW * share
        rows[:, -1] += share

    def _add(self, statistic: Statistic, values_QW: torch.Tensor) -> None:
        """Values of one layer for all query rows: few operations however many sequences there are."""
        self._expect(statistic, values_QW.shape[1])
        assert self._placement is not None
        ones_Q = values_QW.new_ones(values_QW.shape[0], 1)
        share_QW = torch.cat([values_QW, ones_Q], 1) / len(statistic.layers)
        self._values[statistic].index_add_(0, self._placement.rows_at, share_QW)

    def _add_profile(self, group: Profiles, n: int, span: Span, profile_TV: torch.Tensor) -> None:
        """Take one layer's profile of a sequence."""
        prompt, offset = self.rows[n].length - self.rows[n].response_length, QUERY_ROWS[group.query_row]
        # only the rows of the statistic's own convention: the span has one more
        first = max(prompt + offset, span.position)
        last = min(self.rows[n].length + offset, span.position + span.n_queries)
        profile_TV = profile_TV[first - span.position : last - span.position] / len(group.layers)
        for statistic, values in group.take(n, profile_TV):
            if statistic.name == "patch_sums":
                self._sums[n][statistic][: values.shape[0]] += values
            else:
                self._put(statistic, self._starts[n] + first, values, 1.0)
        check_held(self._profiles)

    def _to_wire(self, statistic: Statistic, rows_LW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From attention rows to the layout verl slices: token t's value at position P + t - 1, NaN elsewhere.

        Also the number of response tokens that were not seen once in every layer.
        """
        assert self._placement is not None
        tokens = self._placement.tokens_at
        values_W = rows_LW[tokens + QUERY_ROWS[statistic.query_row]]
        wire_LW = torch.full_like(rows_LW[:, :-1], float("nan"))
        wire_LW[tokens - 1] = values_W[:, :-1]
        wide = statistic.per_head or statistic.size
        return wire_LW if wide else wire_LW[:, 0], ((values_W[:, -1] - 1).abs() > 1e-3).sum()


def _sets_of(statistic: Statistic) -> list[str]:
    """Names of the sets of keys that a statistic reads."""
    if statistic.name == "box_mass":
        return [f"box{i}" for i in range(statistic.size)]
    return [statistic.fact.keys] if statistic.fact.source == "mass" else []
