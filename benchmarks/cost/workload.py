"""The workload of ``probe_cost.py``: a text model with random weights, a packed micro-batch, and passes over it.

A pass is verl's log-prob pass, plain, with the probe, or with eager attention. It does what verl does for old log-probs
with ``use_remove_padding``: one packed row of tokens through the text model, ``lm_head`` on every token, log-softmax of
the sampled tokens and entropy, without gradient. It has no vision tower, which would add to the pass but not to the
probe.

Shape suffixes: N sequences, S tokens of one, L of all back to back, V entries of the vocabulary, H query heads, G key
heads, D head dimension, E hidden size, K sets of keys.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, Qwen3VLTextConfig, Qwen3VLTextModel

from cost.attention import ATTENTION, PackedAttention
from cost.shapes import Lengths, Shape
from sayo_verl.probe import measure, reference
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.plan import RowPlan, plan_row
from sayo_verl.probe.reference import Span
from sayo_verl.probe.statistics import Statistic, StatisticsRequest
from sayo_verl.probe.taps import ForwardTap, asked_layers
from sayo_verl.vision.grids import Tile

LOGIT_ROWS = 2048  # tokens per step of log-softmax and entropy, verl's entropy_from_logits_chunk_size


class TextStack:
    """A text model and its ``lm_head`` with random weights.

    Args:
        shape: sizes.
        device: of its weights.
        dtype: of its weights.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        rope = rope_parameters(shape)
        sizes: dict[str, Any] = {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "use_cache": False,
            "pad_token_id": None,
        }
        with torch.random.fork_rng(), torch.device(device), _default_dtype(dtype):
            torch.manual_seed(0)
            config: Any
            if shape.family == "qwen3_vl":
                config = Qwen3VLTextConfig(**sizes, head_dim=shape.head_dim, rope_parameters=rope)
                make: Any = Qwen3VLTextModel
            else:
                config = Qwen2_5_VLTextConfig(**sizes, bos_token_id=None, eos_token_id=None, rope_parameters=rope)
                make = Qwen2_5_VLTextModel
            config._attn_implementation = PackedAttention.name
            self.model = make(config).eval()
            self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        used = {parameter.dtype for parameter in self.model.parameters()} | {self.head.weight.dtype}
        if used != {dtype}:
            raise RuntimeError(f"wanted weights of {dtype}, got {used}")


def rope_parameters(shape: Shape) -> dict[str, Any]:
    """The family's rotary embedding, with its division of frequencies among time, height and width."""
    half = shape.head_dim // 2
    of_qwen3 = shape.family == "qwen3_vl"
    spatial = half * 5 // 16 if of_qwen3 else half * 3 // 8
    rope: dict[str, Any] = {"rope_type": "default", "mrope_section": [half - 2 * spatial, spatial, spatial]}
    return rope | ({"rope_theta": 5e6, "mrope_interleaved": True} if of_qwen3 else {"rope_theta": 1e6})


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Workload:
    """A packed micro-batch of equally long sequences with one image each, and passes over it.

    Args:
        stack: the model.
        lengths: of each sequence.
        sequences: their number.
    """

    def __init__(self, stack: TextStack, lengths: Lengths, sequences: int) -> None:
        self.stack, self.lengths, self.sequences = stack, lengths, sequences
        S, device = lengths.total, stack.device
        self.image_token = stack.shape.vocabulary - 1
        ids_NS = torch.randint(0, self.image_token, (sequences, S), generator=torch.Generator().manual_seed(0))
        ids_NS[:, lengths.before : lengths.before + lengths.image_tokens] = self.image_token
        self.ids_L = ids_NS.flatten().to(device)
        self.labels_L = self.ids_L.roll(-1)
        self.positions = mrope_positions(lengths).repeat(1, sequences)[:, None].to(device)  # [3, 1, L]
        self.bounds = [(n * S, (n + 1) * S) for n in range(sequences)]
        self.spans = [Span(0, a + lengths.prompt, lengths.response, lengths.prompt, 0, a, S) for a, _ in self.bounds]

    @property
    def tokens(self) -> int:
        return self.sequences * self.lengths.total

    def hidden(self, ids_L: torch.Tensor) -> torch.Tensor:
        """Last hidden states [L, E]."""
        ATTENTION.bounds = self.bounds
        return self.stack.model(input_ids=ids_L[None], position_ids=self.positions).last_hidden_state[0]

    @torch.no_grad()
    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs [L] and entropy [L] by verl's formulas, ``LOGIT_ROWS`` tokens at a time."""
        logits_LV = self.stack.head(self.hidden(self.ids_L))
        log_probs, entropies = [], []
        for some_V, label in zip(logits_LV.split(LOGIT_ROWS), self.labels_L.split(LOGIT_ROWS), strict=True):
            log_probs.append(some_V.log_softmax(-1).gather(-1, label[:, None])[:, 0])
            entropies.append(some_V.logsumexp(-1) - (some_V.softmax(-1) * some_V).sum(-1))
        return torch.cat(log_probs), torch.cat(entropies)

    @torch.no_grad()
    def eager(self, layers: Sequence[int], keep: bool) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
        """The pass with eager attention in some layers, and the weights [1, H, S, S] if kept."""
        ATTENTION.eager, ATTENTION.kept = frozenset(layers), [] if keep else None
        try:
            result = self.plain()
            return result, ATTENTION.kept or []
        finally:
            ATTENTION.eager, ATTENTION.kept = frozenset(), None

    def plan(self, request: StatisticsRequest) -> list[RowPlan]:
        """The plan as the engine builds it, once per micro-batch."""
        box = [[0.2, 0.3, 0.7, 0.8]]
        return [
            plan_row(
                self.ids_L[a:b],
                self.lengths.response,
                image_token_id=self.image_token,
                images=[(Tile(*self.lengths.image),)],
                boxes=[box],
                coverage=request.coverage,
                where="benchmark",
            )
            for a, b in self.bounds
        ]

    def measurement(self, request: StatisticsRequest, chunk: int | None = None) -> Measurement:
        """The probe's work before the pass.

        Args:
            request: what to measure.
            chunk: query rows at once on the reference path; None: its default.
        """
        numbers = asked_layers(self.stack.model, request.layers, where="benchmark")
        changed: Any = contextlib.nullcontext()
        if chunk is not None:
            changed = mock.patch.object(measure, "kernels", return_value=in_chunks(chunk))
        with changed:
            return Measurement(request, self.plan(request), numbers, packed=True, device=self.stack.device)

    def probed(self, request: StatisticsRequest, chunk: int | None = None) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """The pass with the probe, as the engine runs it; ``chunk`` as for ``measurement``."""
        measurement = functools.cache(lambda: self.measurement(request, chunk))  # at the first layer, as in the engine
        n_layers = self.stack.shape.layers
        attention = {n % n_layers for s in request.statistics if s.spec.source != "hidden" for n in s.layers}
        hidden = any(s.spec.source == "hidden" for s in request.statistics)
        read_hidden = (lambda states: measurement().read_hidden(states)) if hidden else None
        with ForwardTap(self.stack.model, sorted(attention), lambda *args: measurement().read(*args), read_hidden):
            self.plain()
        return measurement().finish()

    def alone(
        self, request: StatisticsRequest, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> dict[str, tuple[torch.Tensor, list[int]]]:
        """The whole probe for one layer, on queries and keys of an earlier pass."""
        measurement = self.measurement(request)
        ForwardTap(self.stack.model, [layer], measurement.read)
        measurement.read(layer, query, key, scale)
        return measurement.finish()

    def queries_and_keys(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Inputs of a layer's attention: [1, H, L, D], [1, G, L, D] and the scale."""
        found: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        read = lambda _, query, key, scale: found.append((query.clone(), key.clone(), scale))  # noqa: E731
        with torch.no_grad(), ForwardTap(self.stack.model, [layer], read):
            self.hidden(self.ids_L)
        return found[0]

    def key_sets(self) -> torch.Tensor:
        """int32 [1, L]: bit 0 the image, bit 1 its boxes."""
        plans = self.plan(StatisticsRequest(()))
        bits = [plan.keys["image"].int() | plan.keys["region"].int() << 1 for plan in plans]
        return torch.cat(bits)[None].to(self.stack.device)

    @torch.no_grad()
    def check_sequences_are_apart(self) -> None:
        """Check that other tokens in the first sequence do not change the second's hidden states."""
        if self.sequences == 1:
            return
        other_L = self.ids_L.clone()
        other_L[: self.lengths.before] = (other_L[: self.lengths.before] + 1) % self.image_token
        (_, first), (a, b) = self.bounds[:2]
        before, after = self.hidden(self.ids_L), self.hidden(other_L)
        if torch.equal(before[:first], after[:first]) or not torch.equal(before[a:b], after[a:b]):
            raise RuntimeError("packed sequences attend to each other, or the first ignores its own tokens")


def in_chunks(chunk: int) -> SimpleNamespace:
    """The reference path with another chunk size."""
    return SimpleNamespace(
        attention_masses=functools.partial(reference.attention_masses, chunk=chunk),
        attention_profile=functools.partial(reference.attention_profile, chunk=chunk),
    )


def masses_request(layers: Sequence[int], path: str) -> StatisticsRequest:
    """The request of ``attn_region``."""
    names = ("image_mass", "region_mass")
    return StatisticsRequest(tuple(Statistic(name, layers=tuple(layers)) for name in names), path=path)


def profile_request(path: str) -> StatisticsRequest:
    """Attention on single visual tokens in the last layer: the eight highest per response token, and a heat map."""
    sized = tuple(Statistic(name, size=8) for name in ("top_patch_index", "top_patch_mass"))
    return StatisticsRequest((*sized, Statistic("patch_sums")), path=path)


def cosine_request(path: str) -> StatisticsRequest:
    """The last hidden state against the mean over the image."""
    return StatisticsRequest((Statistic("image_cosine"),), path=path)


def some_layers(n_layers: int, count: int) -> tuple[int, ...]:
    """``count`` evenly spaced layers, with the last."""
    return tuple(n_layers * (i + 1) // count - 1 for i in range(count))


def mrope_positions(lengths: Lengths) -> torch.Tensor:
    """int64 [3, S]: time, height and width of every token, as in Qwen-VL."""
    rows, cols = lengths.image
    text = torch.arange(lengths.before).expand(3, -1)
    cell = torch.arange(rows * cols)
    image = torch.stack([torch.zeros_like(cell), cell // cols, cell % cols]) + lengths.before
    rest = torch.arange(lengths.after + lengths.response).expand(3, -1) + lengths.before + max(rows, cols)
    return torch.cat([text, image, rest], 1)
