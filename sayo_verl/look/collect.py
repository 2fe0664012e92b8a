"""One layer's queries and keys, reduced to masses, maps and numbers per head as soon as they are read.

The whole attention [H, T, V] never exists: a chunk of one head's rows is [t, V]. What stays is linear in the words of
the response, the layers and the visual tokens. The arithmetic is that of the probe's kernels, float32.

Shape suffixes: B = 1, S tokens, H query heads, G key heads, T response tokens, t of a chunk, W words, V visual tokens.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from sayo_verl.probe.measure import kernels
from sayo_verl.probe.place import Placement, place
from sayo_verl.probe.plan import RowPlan
from sayo_verl.probe.statistics import QUERY_ROWS

SETS = ("image", "region", "sink", "border")
CHUNK = 256  # rows whose attention on single visual tokens exists at once, for one head
MEAN = "mean"

Selection = tuple[int, int | None]  # a layer from 0, and a head or None for all of them


class Collector:
    """Reads the layers of one forward pass of one sequence; ``read`` is the reader of a ``ForwardTap``.

    Args:
        plan: of the sequence, with a set ``border``.
        layers: numbers from 0, averaged for ``mean`` and for the masses per token.
        word_T: int64 [T], the word of each token; None: no word maps.
        n_words: W.
        words: selections whose word maps are wanted; each is passed on when its layer has been read.
        take: gets a selection and its word map, the sum over each word's tokens, float32 [W, V].
        mean_words: keep the word map of the mean.
        query_row: see ``probe.statistics``.
        device: of queries and keys.

    Attributes:
        mass: float32 [4, T], by ``SETS``, mean over layers and heads.
        totals: layer -> float32 [H, V], attention summed over the response's tokens.
        tables: layer -> name -> float32 [H], means over tokens, see ``view.seen.HeadTable``.
        words: float32 [W, V], the word map of the mean, summed over each word's tokens.
        broken: layer -> bool [], whether its log-sum-exp is not finite.
    """

    def __init__(
        self,
        plan: RowPlan,
        layers: Sequence[int],
        *,
        word_T: torch.Tensor | None = None,
        n_words: int = 0,
        words: Sequence[Selection] = (),
        take: Callable[[Selection, torch.Tensor], None] = lambda selection, words_WV: None,
        mean_words: bool = False,
        query_row: str = "input",
        device: torch.device,
    ) -> None:
        self._plan, self._layers, self._device, self._take = plan, frozenset(layers), device, take
        self._kernels, self._offset = kernels("auto", device), 1 + QUERY_ROWS[query_row]
        self._word_T = None if word_T is None else word_T.to(device)
        self._selections = list(words)
        T, V = plan.response_length, plan.image_columns.numel()
        self._placement: Placement | None = None
        self._W = n_words
        self._inside_V = plan.keys["region"][plan.image_columns].to(device)
        self.mass = torch.zeros(len(SETS), T, device=device)
        self.totals: dict[int, torch.Tensor] = {}
        self.tables: dict[int, Mapping[str, torch.Tensor]] = {}
        self.broken: dict[int, torch.Tensor] = {}
        self.words = torch.zeros(n_words, V, device=device) if mean_words else None

    def read(self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Read queries [1, H, S, D] and keys [1, G, S, D] of one layer."""
        if self._placement is None:
            S = key.shape[2]
            self._placement = place([self._plan], SETS, 1, S, packed=True, shard=None, device=self._device, what="keys")
        placed, T = self._placement, self._plan.response_length
        (span,) = placed.spans  # its first row is that of the token before the response
        span = span._replace(
            query_start=span.query_start + self._offset, n_queries=T, position=span.position + self._offset
        )
        masses = self._kernels.attention_masses(query, key, [span], placed.key_sets, len(SETS), scale=scale)
        self.broken[layer] = ~masses.lse.isfinite().all()
        counted = layer in self._layers
        if counted:
            self.mass += masses.mass.mean(-1) / len(self._layers)
        H, group = query.shape[1], query.shape[1] // key.shape[1]
        columns_V = placed.columns[0]
        total_HV = torch.zeros(H, columns_V.numel(), device=self._device)
        hits_H, entropy_H = torch.zeros(H, device=self._device), torch.zeros(H, device=self._device)
        wanted = {head for n, head in self._selections if n == layer}
        maps = {head: torch.zeros(self._W, columns_V.numel(), device=self._device) for head in wanted}
        for first in range(0, T, CHUNK):
            rows = min(CHUNK, T - first)
            part = span._replace(query_start=span.query_start + first, n_queries=rows, position=span.position + first)
            mean_tV = torch.zeros(rows, columns_V.numel(), device=self._device)
            for h in range(H):
                g = h // group
                p_tV = self._kernels.attention_profile(
                    query[:, h : h + 1],
                    key[:, g : g + 1],
                    part,
                    masses.lse[first : first + rows, h : h + 1],
                    columns_V,
                    scale=scale,
                )
                total_HV[h] += p_tV.sum(0)
                hits_H[h] += self._inside_V[p_tV.argmax(-1)].sum()
                entropy_H[h] += _entropy(p_tV).sum()
                mean_tV += p_tV / H
                if h in maps:
                    self._add(maps[h], first, p_tV)
            if None in maps:
                self._add(maps[None], first, mean_tV)
            if counted and self.words is not None:
                self._add(self.words, first, mean_tV / len(self._layers))
        self.totals[layer] = total_HV
        self.tables[layer] = {
            "image_mass": masses.mass[0].mean(0),
            "region_mass": masses.mass[1].mean(0),
            "box_hit": hits_H / T,
            "spatial_entropy": entropy_H / T,
        }
        for head, words_WV in maps.items():
            self._take((layer, head), words_WV)

    def _add(self, words_WV: torch.Tensor, first: int, p_tV: torch.Tensor) -> None:
        assert self._word_T is not None
        words_WV.index_add_(0, self._word_T[first : first + p_tV.shape[0]], p_tV)

    def total(self, layers: Sequence[int], head: int | None = None) -> torch.Tensor:
        """float32 [V]: attention per token of the response, mean over its tokens, these layers, and heads or one."""
        of_layers = [self.totals[n].mean(0) if head is None else self.totals[n][head] for n in layers]
        return torch.stack(of_layers).mean(0) / self._plan.response_length


def _entropy(p_tV: torch.Tensor) -> torch.Tensor:
    """[t] in nats, of each row's attention within the image; 0 where nothing of it goes there."""
    sum_t = p_tV.sum(-1)
    spread_t = torch.special.entr(p_tV).sum(-1)
    return torch.where(sum_t > 0, sum_t.log() + spread_t / sum_t, torch.zeros_like(sum_t))
