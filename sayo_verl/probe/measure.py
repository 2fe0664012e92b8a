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
from sayo_verl.probe.neighbours import top_neighbours
from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.reference import Span
from sayo_verl.probe.shard import Shard
from sayo_verl.probe.statistics import QUERY_ROWS, Statistic, StatisticsRequest

# Profiles of a micro-batch that must live at once, when a statistic averages them over layers.
MAX_PROFILE_BYTES = 2**30


def kernels(path: str, device: torch.device) -> ModuleType:
    """The module with ``attention_masses`` and ``attention_profile`` that a path names on a device."""
    if path == "reference" or (path == "auto" and device.type != "cuda"):
        return reference
    from sayo_verl.probe import fast

    return fast


class Measurement:
    """One micro-batch.

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
                raise SayoError("P03", "two names of one layer", where=f"statistic {s.key}", got=list(s.layers),
                                wanted="distinct layers", fix="name each layer once")  # fmt: skip
        self._reads: dict[int | str, int] = {}  # layer number or "hidden" -> how often it was handed over
        if shard is not None and any(s.name.startswith("neighbour_") for s in request.statistics):
            raise SayoError("P09", "neighbours need every row of a sequence on one rank", where="the request",
                            got=f"sequence parallel size {shard.size}", wanted="1",
                            fix="set actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=1")  # fmt: skip
        self._sets = list(dict.fromkeys(name for s in request.statistics for name in _sets_of(s)))
        self._values: dict[Statistic, torch.Tensor] = {}  # [L, W], by attention row
        self._held: dict[tuple[Statistic, int], tuple[torch.Tensor, int]] = {}  # profile so far, layers in it
        empty = [0.0 if row.image_columns.numel() else float("nan") for row in rows]
        self._sums = [
            {s: torch.full((max(row.image_columns.numel(), 1),), value, device=device)
             for s in request.statistics if s.name == "patch_sums"}
            for row, value in zip(rows, empty, strict=True)
        ]  # fmt: skip
        self._key_sets: torch.Tensor | None = None
        self._rows_at = torch.zeros(0)  # int64 [Q], where query rows lie among all tokens
        self._spans: list[Span] = []
        self._span_rows: list[int] = []

    # ------------------------------------------------------------------------------------------------ reading
    def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """One layer's queries [B, H, S, D] and keys [B, G, S, D], rotary applied."""
        self._reads[layer] = self._reads.get(layer, 0) + 1
        if self._shard is not None:
            key = self._shard.gather(key.detach())
        if self._key_sets is None:
            self._place(query.shape, key.shape)
        assert self._key_sets is not None
        wanted = [s for s, numbers in self._statistics.items() if layer in numbers and s.fact.source != "hidden"]
        masses = self._kernels.attention_masses(
            query, key, self._spans, self._key_sets, max(len(self._sets), 1), scale=scale
        )
        mass_QK = masses.mass.mean(-1).T
        for statistic in wanted:
            sets = [self._sets.index(name) for name in _sets_of(statistic)]
            if statistic.fact.source == "mass":
                self._add(statistic, masses.mass[sets[0]] if statistic.per_head else mass_QK[:, sets])
            elif statistic.fact.source == "lse":
                self._add(statistic, masses.lse if statistic.per_head else masses.lse.mean(-1, keepdim=True))
        profiled = [s for s in wanted if s.fact.source == "profile"]
        if profiled:
            done = 0
            for statistic in (s for s in profiled if s.size):
                self._expect(statistic, statistic.size)
            for n, span in zip(self._span_rows, self._spans, strict=True):
                columns_V = self.rows[n].image_columns.to(self._device)
                lse_TH = masses.lse[done : done + span.n_queries]
                profile_TV = self._kernels.attention_profile(query, key, span, lse_TH, columns_V, scale=scale)
                for statistic in profiled:
                    self._add_profile(statistic, n, span, profile_TV)
                done += span.n_queries

    def read_hidden(self, hidden: torch.Tensor) -> None:
        """The last hidden states [B, S, D] (a slice of the packed tokens under sequence parallelism)."""
        B, S, D = hidden.shape
        self._check_batch(B, S * (self._shard.size if self._shard else 1), "hidden states", hidden.shape)
        self._reads["hidden"] = self._reads.get("hidden", 0) + 1
        low = self._shard.rank * S if self._shard else 0
        flat_LD = hidden.detach().reshape(B * S, D)
        means_ND = torch.zeros(len(self.rows), D, dtype=torch.float32, device=self._device)
        for n, row in enumerate(self.rows):
            at = row.image_columns.to(self._device) + self._flat_start(n, S) - low
            at = at[(at >= 0) & (at < B * S)]
            means_ND[n] = flat_LD[at].float().sum(0) / max(row.image_columns.numel(), 1)
        if self._shard:
            self._shard.add_up(means_ND)
        for statistic in (s for s in self._statistics if s.fact.source == "hidden"):
            self._expect(statistic, 1)
            for n, row in enumerate(self.rows):
                first = row.length - row.response_length + QUERY_ROWS[statistic.query_row]
                start = self._flat_start(n, S) - low + first
                begin, end = max(start, 0), min(start + row.response_length, B * S)
                if begin < end:
                    cosine_T = torch.cosine_similarity(flat_LD[begin:end].float(), means_ND[n][None], dim=-1)
                    self._put(statistic, self._starts[n] + first + begin - start, cosine_T[:, None], 1.0)

    # ------------------------------------------------------------------------------------------------ results
    def finish(self) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """Every statistic by key: values one behind another and the length of each row's part.

        Per-token ones are float32 [L] or [L, W], in the wire layout; per visual token ones [sum of max(V, 1)].

        Raises:
            SayoError: P22 for a statistic that was not read once in every layer and for every response token.
        """
        out: dict[str, tuple[torch.Tensor, list[int]]] = {}
        unseen: dict[str, torch.Tensor] = {}
        for statistic, numbers in self._statistics.items():
            asked = {"hidden"} if statistic.fact.source == "hidden" else numbers
            reads = {part: self._reads.get(part, 0) for part in asked}
            if any(n != 1 for n in reads.values()):
                raise SayoError("P22", "what a statistic needs was not handed over once", got=reads, wanted="1 of each",
                                where=f"statistic {statistic.key}",
                                fix="this is a defect of the capture; report it with the model family")  # fmt: skip
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
        missed = torch.stack(list(unseen.values())).tolist() if unseen else []
        if any(missed):
            raise SayoError("P22", "a statistic was not measured once for every response token", where="Measurement",
                            got=f"tokens otherwise: {dict(zip(unseen, missed, strict=True))}", wanted="0",
                            fix="this is a defect of the capture; report it with verl's settings")  # fmt: skip
        return out

    # ------------------------------------------------------------------------------------------------ helpers
    def _flat_start(self, n: int, S: int) -> int:
        return self._starts[n] if self._packed else n * S

    def _place(self, query_shape: torch.Size, key_shape: torch.Size) -> None:
        """Where the rows lie in these tensors: known once the first layer shows how long a slice is."""
        B, S = key_shape[0], key_shape[2]
        self._check_batch(B, S, "keys", key_shape)
        sets_LN = torch.zeros(B * S, dtype=torch.int32)
        low = self._shard.rank * query_shape[2] if self._shard else 0
        high = low + query_shape[2] if self._shard else B * S
        for n, row in enumerate(self.rows):
            start = self._flat_start(n, S)
            for bit, name in enumerate(self._sets):
                sets_LN[start : start + row.length] |= row.keys[name].to(torch.int32) << bit
            if row.response_length == 0:
                continue
            # rows P - 1 .. P + T - 1 serve both conventions, and give the same bits whichever is asked beside which
            first = row.length - row.response_length - 1
            begin, end = max(start + first, low), min(start + row.length, high)
            if begin < end:
                batch, at = (0, begin - low) if self._packed else (n, begin - start)
                key_at = (0, start) if self._packed else (n, 0)
                self._spans.append(Span(batch, at, end - begin, begin - start, *key_at, row.length))
                self._span_rows.append(n)
        self._key_sets = sets_LN.view(B, S).to(self._device)
        starts = [self._starts[n] + span.position for n, span in zip(self._span_rows, self._spans, strict=True)]
        rows = [torch.arange(at, at + span.n_queries) for at, span in zip(starts, self._spans, strict=True)]
        self._rows_at = torch.cat([torch.zeros(0, dtype=torch.int64), *rows]).to(self._device)

    def _check_batch(self, B: int, S: int, what: str, shape: torch.Size) -> None:
        longest = self._starts[-1] if self._packed else max(row.length for row in self.rows)
        if (B != 1 if self._packed else len(self.rows) != B) or longest > S:
            raise SayoError("P01", "the model's batch is not that of the plan", where="Measurement",
                            got=f"{what} {tuple(shape)}, rows of {[row.length for row in self.rows]}",
                            wanted="one batch row for all" if self._packed else "a batch row for each",
                            fix="this is a defect of the capture; report it with verl's settings")  # fmt: skip

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
        ones_Q = values_QW.new_ones(values_QW.shape[0], 1)
        self._values[statistic].index_add_(0, self._rows_at, torch.cat([values_QW, ones_Q], 1) / len(statistic.layers))

    def _add_profile(self, statistic: Statistic, n: int, span: Span, profile_TV: torch.Tensor) -> None:
        """Take one layer's profile of a sequence; what is not linear in it waits for the mean over layers."""
        prompt, offset = self.rows[n].length - self.rows[n].response_length, QUERY_ROWS[statistic.query_row]
        # only the rows of the statistic's own convention: the span has one more
        first = max(prompt + offset, span.position)
        last = min(self.rows[n].length + offset, span.position + span.n_queries)
        profile_TV = profile_TV[first - span.position : last - span.position] / len(statistic.layers)
        if statistic.name == "patch_sums":
            self._sums[n][statistic][: profile_TV.shape[1]] += profile_TV.sum(0)
            return
        held, reads = self._held.pop((statistic, n), (None, 0))
        profile_TV, reads = profile_TV if held is None else held + profile_TV, reads + 1
        if reads < len(statistic.layers):
            self._held[statistic, n] = profile_TV, reads
            self._check_held()
            return
        k, V = statistic.size, profile_TV.shape[1]
        if statistic.name.startswith("top_patch_"):
            mass_Tk, index_Tk = profile_TV.topk(min(k, V))
            index, mass = _widen(index_Tk, k, -1.0), _widen(mass_Tk, k, 0.0)
        else:
            index, mass = top_neighbours(profile_TV, k)
        values_Tk = index.float() if statistic.name.endswith("_index") else mass
        self._put(statistic, self._starts[n] + first, values_Tk, 1.0)

    def _check_held(self) -> None:
        size = sum(profile.numel() * 4 for profile, _ in self._held.values())
        if size > MAX_PROFILE_BYTES:
            raise SayoError("P23", "attention profiles of several layers do not fit in memory together",
                            where="Measurement.read", got=f"{size / 2**20:.0f} MiB in one micro-batch",
                            wanted=f"at most {MAX_PROFILE_BYTES / 2**20:.0f} MiB", fix="ask for one layer, or lower "
                            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu")  # fmt: skip

    def _to_wire(self, statistic: Statistic, rows_LW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From attention rows to the layout verl slices: token t's value at position P + t - 1, NaN elsewhere.

        Also the number of response tokens that were not seen once in every layer.
        """
        ends = zip(self._starts[1:], self.rows, strict=True)
        tokens = torch.cat([torch.arange(end - row.response_length, end) for end, row in ends]).to(self._device)
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


def _widen(values_Tn: torch.Tensor, k: int, fill: float) -> torch.Tensor:
    """[T, n] -> [T, k]: there are fewer visual tokens than asked."""
    return torch.nn.functional.pad(values_Tn.float(), (0, k - values_Tn.shape[1]), value=fill)
