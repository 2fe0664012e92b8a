"""What the probe's tests share: attention in float64 one row at a time, random rows as a model sees them, refusals.

Nothing here is shared with ``sayo_verl.probe.reference`` or ``measure``.

Shape suffixes: S tokens of one sequence, P prompt tokens, T query rows or response tokens, N keys of one sequence,
H query heads, G key heads, D head dimension, V visual tokens, W values per token, E hidden size.
"""

from collections.abc import Sequence

import torch

from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.shard import Shard
from sayo_verl.probe.statistics import CATALOGUE, Statistic, StatisticsRequest

NAN = float("nan")
CPU = torch.device("cpu")
ROW_OFFSET = {"input": 0, "predicting": -1}  # of the attention row from the position of y_t
SIZES = {"box_mass": 3, "top_patch_index": 4, "top_patch_mass": 4, "neighbour_index": 3, "neighbour_similarity": 3}
PER_HEAD = ("image_mass", "region_mass", "sink_mass", "system_mass", "question_mass", "response_mass", "lse")


def statistic(name: str, **options) -> Statistic:
    """One of the catalogue, with a size where it needs one."""
    return Statistic(name, size=SIZES.get(name, 0), **options)


def dense_attention(
    query_HTD: torch.Tensor, key_GND: torch.Tensor, first: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in float64, one head and one query row at a time.

    Args:
        query_HTD, key_GND: of one sequence; row t attends to the keys 0 .. first + t.
        first: position of the first query row.
        scale: of the logits.

    Returns:
        (weights [H, T, N], log-sum-exp [H, T]), float64.
    """
    H, T, _ = query_HTD.shape
    G, N, _ = key_GND.shape
    weights_HTN, lse_HT = torch.zeros(H, T, N, dtype=torch.float64), torch.zeros(H, T, dtype=torch.float64)
    for h in range(H):
        key_ND = key_GND[h // (H // G)].double()
        for t in range(T):
            logits = (key_ND[: first + t + 1] * query_HTD[h, t].double()).sum(-1) * scale
            largest = logits.max()
            total = (logits - largest).exp().sum()
            weights_HTN[h, t, : first + t + 1] = (logits - largest).exp() / total
            lse_HT[h, t] = largest + total.log()
    return weights_HTN, lse_HT


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN where NaN."""
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(-9), b.nan_to_num(-9))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors that must have NaN at the same places."""
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    kept = ~a.isnan()
    return (a[kept].double() - b[kept].double()).abs().max().item() if kept.any() else 0.0


class Rows:
    """A micro-batch of random rows, packed and right-padded.

    A prompt is: first token, system text, visual tokens, question. Every second visual token lies in a box: the earlier
    half of those in the first box, the rest in the second.
    """

    H, G, D, E = 4, 2, 8, 12

    def __init__(self, shapes: Sequence[tuple[int, int, int]], seed: int = 0, layers: int = 1) -> None:
        """``shapes``: (prompt, visual, response) tokens of each row; the prompt counts its visual tokens."""
        generator = torch.Generator().manual_seed(seed)
        self.shapes, self.layers, self.scale = list(shapes), layers, self.D**-0.5
        self.plans = [self._plan(*shape) for shape in shapes]
        lengths = [plan.length for plan in self.plans]
        self.query = [[torch.randn(self.H, S, self.D, generator=generator) for _ in range(layers)] for S in lengths]
        self.key = [[torch.randn(self.G, S, self.D, generator=generator) for _ in range(layers)] for S in lengths]
        self.hidden = [torch.randn(S, self.E, generator=generator) for S in lengths]
        self._dense: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def _plan(prompt: int, visual: int, response: int) -> RowPlan:
        S, text = prompt + response, prompt - 1 - visual
        assert text >= 0
        columns_V = torch.arange(1 + text // 2, 1 + text // 2 + visual)
        boxed = columns_V[::2]
        places = {
            "sink": torch.tensor([0]),
            "system": torch.arange(1, 1 + text // 2),
            "image": columns_V,
            "question": torch.arange(1 + text // 2 + visual, prompt),
            "response": torch.arange(prompt, S),
            "region": boxed,
            "box0": boxed[: len(boxed) // 2],
            "box1": boxed[len(boxed) // 2 :],
            "box2": boxed[:0],
        }
        keys = {name: torch.zeros(S, dtype=torch.bool) for name in places}
        for name, at in places.items():
            keys[name][at] = True
        return RowPlan(S, response, keys, columns_V, len(boxed))

    # ---------------------------------------------------------------------------------------------- the code under test
    def measurement(
        self,
        statistics: Sequence[Statistic],
        *,
        packed: bool = True,
        order: Sequence[int] | None = None,
        shard: Shard | None = None,
    ) -> Measurement:
        request = StatisticsRequest(tuple(statistics))
        numbers = {layer: layer % self.layers for layer in request.layers}
        plans = [self.plans[n] for n in self._order(order)]
        return Measurement(request, plans, numbers, packed=packed, device=CPU, shard=shard)

    def measure(
        self, statistics: Sequence[Statistic], *, packed: bool = True, poison: float = 0.0, order=None
    ) -> dict[Statistic, dict[int, torch.Tensor]]:
        """Feed the asked layers and the hidden states as one forward pass would: statistic -> row -> its values."""
        measurement = self.measurement(statistics, packed=packed, order=order)
        for layer in sorted(
            {layer % self.layers for s in statistics if s.spec.source != "hidden" for layer in s.layers}
        ):
            measurement.read(layer, *self.tensors(layer, packed, poison, order), self.scale)
        if any(s.spec.source == "hidden" for s in statistics):
            measurement.read_hidden(self.hidden_states(packed, poison, order))
        return self.by_row(measurement, statistics, order)

    def by_row(self, measurement: Measurement, statistics, order=None) -> dict[Statistic, dict[int, torch.Tensor]]:
        out = {}
        results = measurement.finish()
        assert list(results) == [s.key for s in statistics]
        for s in statistics:
            values, lengths = results[s.key]
            assert values.dtype == torch.float32
            assert not values.requires_grad
            out[s] = dict(zip(self._order(order), values.split(lengths), strict=True))
        return out

    def tensors(self, layer: int, packed: bool, poison: float = 0.0, order=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(query, key) of a layer: [1, heads, tokens + 2, D] or [rows, heads, longest + 3, D], padding at the end."""
        return tuple(  # type: ignore[return-value]
            self._join([x[n][layer].transpose(0, 1) for n in self._order(order)], packed, poison).transpose(1, 2)
            for x in (self.query, self.key)
        )

    def hidden_states(self, packed: bool, poison: float = 0.0, order=None) -> torch.Tensor:
        return self._join([self.hidden[n] for n in self._order(order)], packed, poison)

    def _order(self, order) -> list[int]:
        return list(range(len(self.plans))) if order is None else list(order)

    @staticmethod
    def _join(rows: list[torch.Tensor], packed: bool, poison: float) -> torch.Tensor:
        """[S, ...] of each row -> [1, L, ...] or [B, S, ...]."""
        lengths = [row.shape[0] for row in rows]
        B, S = (1, sum(lengths) + 2) if packed else (len(rows), max(lengths) + 3)
        joined = torch.full((B, S, *rows[0].shape[1:]), poison)
        for n, row in enumerate(rows):
            at = (0, sum(lengths[:n])) if packed else (n, 0)
            joined[at[0], at[1] : at[1] + row.shape[0]] = row
        return joined

    # ------------------------------------------------------------------------------------------------ what it must give
    def dense(self, n: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [H, S, S], log-sum-exp [H, S]) of a row, every position as a query."""
        if (n, layer) not in self._dense:
            self._dense[n, layer] = dense_attention(self.query[n][layer], self.key[n][layer], 0, self.scale)
        return self._dense[n, layer]

    def profile(self, s: Statistic, n: int) -> torch.Tensor:
        """float64 [T, V]."""
        plan = self.plans[n]
        first = plan.length - plan.response_length + ROW_OFFSET[s.query_row]
        mean_SS = torch.stack([self.dense(n, layer % self.layers)[0].mean(0) for layer in s.layers]).mean(0)
        return mean_SS[first : first + plan.response_length][:, plan.image_columns]

    def expected(self, s: Statistic, n: int) -> torch.Tensor:
        """float64 [T], [T, W] or [V] of one row."""
        plan = self.plans[n]
        first = plan.length - plan.response_length + ROW_OFFSET[s.query_row]
        rows = slice(first, first + plan.response_length)
        if s.spec.source in ("mass", "lse"):
            weights_HTS, lse_HT = (
                torch.stack([self.dense(n, layer % self.layers)[i][:, rows] for layer in s.layers]).mean(0)
                for i in (0, 1)
            )
            if s.name == "box_mass":
                boxes = [weights_HTS[..., plan.keys[f"box{i}"]].sum(-1).mean(0) for i in range(s.size)]
                return torch.stack(boxes, -1)
            values_HT = lse_HT if s.name == "lse" else weights_HTS[..., plan.keys[s.spec.keys]].sum(-1)
            return values_HT.T if s.per_head else values_HT.mean(0)
        if s.spec.source == "hidden":
            image_E = self.hidden[n][plan.image_columns].double().sum(0) / max(len(plan.image_columns), 1)
            own_TE = self.hidden[n][rows].double()
            norms_T = own_TE.norm(dim=-1) * image_E.norm()
            return (own_TE @ image_E) / norms_T.clamp(min=1e-8)
        profile_TV = self.profile(s, n)
        T, V = profile_TV.shape
        if s.name == "patch_sums":
            return profile_TV.sum(0) if V else torch.full((1,), NAN, dtype=torch.float64)
        if s.name.startswith("top_patch_"):
            index, mass = torch.full((T, s.size), -1.0), torch.zeros(T, s.size, dtype=torch.float64)
            for t in range(T):
                ranked = sorted(range(V), key=lambda v, t=t: -profile_TV[t, v].item())[: s.size]
                index[t, : len(ranked)] = torch.tensor(ranked, dtype=torch.float32)
                mass[t, : len(ranked)] = profile_TV[t, ranked]
            return index.double() if s.name == "top_patch_index" else mass
        from sayo_verl.probe.neighbours import top_neighbours

        neighbour_index, similarity = top_neighbours(profile_TV.float(), s.size)
        return (neighbour_index if s.name == "neighbour_index" else similarity).double()


# (prompt, visual, response): usual, no image, all but one of the prompt visual, one response token, fewer visual tokens
# than asked of top_patch, a prompt of one token
SHAPES = [(9, 4, 5), (6, 0, 4), (8, 7, 3), (10, 5, 1), (6, 3, 9), (1, 0, 3)]
ALL = list(CATALOGUE)
