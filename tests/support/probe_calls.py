"""Calls of the reference path on invented attention."""

import itertools
from dataclasses import dataclass

import torch
from support.probe_rows import dense_attention

from sayo_verl.probe.reference import Masses, Span, attention_masses, attention_profile


@dataclass
class Case:
    """Sequences at random places of two tensors, with other numbers around them."""

    query: torch.Tensor
    key: torch.Tensor
    spans: list[Span]
    sets: torch.Tensor
    n_sets: int
    scale: float

    def masses(self, **options) -> Masses:
        return attention_masses(self.query, self.key, self.spans, self.sets, self.n_sets, scale=self.scale, **options)

    def rows(self) -> list[slice]:
        """Where each span's rows lie in the results."""
        ends = torch.tensor([0, *(span.n_queries for span in self.spans)]).cumsum(0).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def profile(self, n: int, columns: torch.Tensor, lse: torch.Tensor, **options) -> torch.Tensor:
        return attention_profile(self.query, self.key, self.spans[n], lse, columns, scale=self.scale, **options)

    def dense(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [H, T, N], lse [H, T]) in float64."""
        span = self.spans[n]
        query = self.query[span.query_batch, :, span.query_start : span.query_start + span.n_queries]
        key = self.key[span.key_batch, :, span.key_start : span.key_start + span.n_keys]
        return dense_attention(query, key, span.position, self.scale)

    def dense_masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mass [K, Q, H], lse [Q, H]) in float64."""
        mass, lse = [], []
        for n, span in enumerate(self.spans):
            weights, lse_HT = self.dense(n)
            sets_N = self.sets[span.key_batch, span.key_start : span.key_start + span.n_keys].tolist()
            member = [[bool(bits & 1 << k) for bits in sets_N] for k in range(self.n_sets)]
            mass.append(torch.stack([weights[..., m].sum(-1).T for m in torch.tensor(member)]))
            lse.append(lse_HT.T)
        return torch.cat(mass, 1), torch.cat(lse)

    def outside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [B, S] of the query and key tensors: what no span names."""
        query, key = (torch.ones(x.shape[0], x.shape[2], dtype=torch.bool) for x in (self.query, self.key))
        for span in self.spans:
            query[span.query_batch, span.query_start : span.query_start + span.n_queries] = False
            key[span.key_batch, span.key_start : span.key_start + span.n_keys] = False
        return query, key


def simple_case(T: int = 5, N: int = 12, H: int = 6, G: int = 2, D: int = 8, K: int = 3, seed: int = 0) -> Case:
    """One sequence that fills its tensors; the queries are its last tokens."""
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(1, H, T, D, generator=generator),
        torch.randn(1, G, N, D, generator=generator),
        [Span(0, 0, T, N - T, 0, 0, N)],
        torch.randint(0, 2**K, (1, N), generator=generator, dtype=torch.int32),
        K,
        D**-0.5,
    )
