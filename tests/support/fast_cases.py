"""Attention of invented sequences, and its dense float64 softmax."""

import torch

from sayo_verl.probe import fast
from sayo_verl.probe.reference import Masses, Span, stretches

NAN = float("nan")


QUICK = fast._Tiling(lanes=64, keys=32, warps=4, stages=1)  # the interpreter pays per tile


def packed(*sequences: tuple[int, int]) -> list[Span]:
    """(prompt, response) lengths one behind another in one row, as verl's remove-padding does."""
    spans, start = [], 0
    for prompt, response in sequences:
        spans.append(Span(0, start + prompt, response, prompt, 0, start, prompt + response))
        start += prompt + response
    return spans


def padded(*sequences: tuple[int, int]) -> list[Span]:
    return [
        Span(b, prompt, response, prompt, b, 0, prompt + response) for b, (prompt, response) in enumerate(sequences)
    ]


def random_case(spans, group, D, G=2, n_sets=3, dtype=torch.float32, seed=0, spread=1.5):
    """Queries, keys and sets for spans. A stretch of keys belongs to no set, as most text does."""
    generator = torch.Generator().manual_seed(seed)
    B = 1 + max(span.key_batch for span in spans)
    S = max(span.key_start + span.n_keys for span in spans)
    query = (torch.randn(B, S, G * group, D, generator=generator) * spread).to(dtype).transpose(1, 2)
    key = torch.randn(B, S, G, D, generator=generator).to(dtype).transpose(1, 2)
    sets = torch.randint(0, 2**n_sets, (B, S), generator=generator, dtype=torch.int32)
    sets[:, S // 3 :] *= torch.rand(B, S - S // 3, generator=generator) < 0.05
    return query, key, sets


def seen_rows(query, key, span, scale):
    """float64 logits [H, T, N] of one sequence, later keys at minus infinity; no code is shared with the kernels."""
    query_HTD = query[span.query_batch, :, span.query_start : span.query_start + span.n_queries].double()
    key_GND = key[span.key_batch, :, span.key_start : span.key_start + span.n_keys].double()
    key_HND = key_GND.repeat_interleave(query.shape[1] // key.shape[1], 0)
    logits = torch.einsum("htd,hnd->htn", query_HTD, key_HND) * scale
    later = torch.ones(span.n_queries, span.n_keys, device=query.device).triu(span.position + 1).bool()
    return logits.masked_fill(later, float("-inf"))


def dense_masses(query, key, spans, sets, n_sets, scale) -> Masses:
    masses, lses = [], []
    for span in spans:
        logits_HTN = seen_rows(query, key, span, scale)
        sets_N = sets[span.key_batch, span.key_start : span.key_start + span.n_keys]
        p_HTN = logits_HTN.softmax(-1)
        masses.append(torch.stack([p_HTN[..., (sets_N >> k) & 1 == 1].sum(-1).T for k in range(n_sets)]))
        lses.append(logits_HTN.logsumexp(-1).T)
    return Masses(torch.cat(masses, 1), torch.cat(lses))


def with_marks(spans, sets) -> list[Span]:
    """Spans that say where the keys of their sets lie, as the probe's own do."""
    rows = [sets[span.key_batch, span.key_start : span.key_start + span.n_keys].cpu() for span in spans]
    return [span._replace(marked=stretches(row != 0)) for span, row in zip(spans, rows, strict=True)]


class Errors:
    """Absolute errors of many comparisons, to be printed and bounded."""

    def __init__(self, what: str) -> None:
        self.what, self.found = what, {}

    def add(self, name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        self.found.setdefault(name, []).append((found.double() - wanted.double()).abs().flatten())

    def check(self, limit: float) -> None:
        for name, parts in self.found.items():
            errors = torch.cat(parts)
            print(f"{self.what}, {name}: largest {errors.max():.1e}, mean {errors.mean():.1e} of {errors.numel()}")
            assert errors.max() <= limit, name


def compare(errors: Errors, query, key, spans, sets, n_sets, scale) -> None:
    found = fast.attention_masses(query, key, spans, sets, n_sets, scale=scale)
    wanted = dense_masses(query, key, spans, sets, n_sets, scale)
    errors.add("mass", found.mass, wanted.mass)
    errors.add("log-sum-exp", found.lse, wanted.lse)
    given = fast.attention_masses(
        query, key, with_marks(spans, sets), sets, n_sets, scale=scale, lse=wanted.lse.float()
    )
    errors.add("mass, log-sum-exp given", given.mass, wanted.mass)
    done = 0
    for span in spans:
        lse_TH = found.lse[done : done + span.n_queries]
        columns = torch.randperm(span.n_keys, generator=torch.Generator().manual_seed(done)).to(query.device)
        columns = columns[: 2 + span.n_keys // 2]
        profile = fast.attention_profile(query, key, span, lse_TH, columns, scale=scale)
        p_HTN = seen_rows(query, key, span, scale).softmax(-1)
        errors.add("profile", profile, p_HTN.mean(0)[:, columns])
        done += span.n_queries
