"""Load a model, answer, and measure where it looked: any supported family, with its own attention kernel, without verl.

An answer is measured in one teacher-forced pass over the prompt's ids and the response's own ids, which are never
tokenised again. Memory is linear in tokens: queries and keys are reduced layer by layer, and logits exist for a few
tokens at a time.

Shape suffixes: S tokens, P prompt tokens, T response tokens, W words, V visual tokens, L layers, H query heads,
N entries of the vocabulary, D hidden size.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, GenerationConfig

from sayo_verl.errors import Rule, SayoError, raise_first
from sayo_verl.look import sinks
from sayo_verl.look.collect import MEAN, Collector, Selection
from sayo_verl.look.prompt import Prompt, check_context, prompt_of, with_question
from sayo_verl.methods.region import target_attention, token_ratio
from sayo_verl.methods.signals import Signals
from sayo_verl.models import processors
from sayo_verl.models.sampling import without_penalties
from sayo_verl.probe.measure import Measurement
from sayo_verl.probe.plan import ChatTokens, RowPlan, plan_row
from sayo_verl.probe.statistics import FAST_LSE, Statistic, StatisticsRequest, check_lse_path
from sayo_verl.probe.taps import (
    FULL_ATTENTION,
    ForwardTap,
    asked_layers,
    check_full_attention,
    configured_kinds,
    resolve_layers,
)
from sayo_verl.view.maps import LEVELS, Packed
from sayo_verl.view.seen import HeadTable, MapSet, SeenResponse, pieces_of, words_of
from sayo_verl.vision.intervention import Intervention, Pixels, intervene, prompt_key
from sayo_verl.vision.masks import region_mask

LONGEST = 1024  # tokens of an answer, if no other number is asked for
BUDGET = 5_000_000  # bytes of all maps of a response on a page, in base64
NAMES = 100  # bytes of a map besides its codes
HEADS_SHARE = 0.25  # of the budget, for the maps of single heads
LOGITS = 2**24  # entries [t, N] of logits at once: 64 MiB of float32
_MAP = re.compile(r"L(\d+)(?:H(\d+))?")


@dataclass(frozen=True)
class Measured:
    """Statistics of one response.

    Attributes:
        statistics: those of the request, float32 [T], [T, W] or [V] for ``patch_sums``.
        entropy: float32 [T] in nats, of the distribution that sampled token t, at temperature 1.
        log_probs: float32 [T] in nats.
        counterfactual_log_probs: [T] of the same tokens after the changed image; None without an intervention.
        image_tokens, region_tokens: of the prompt.
    """

    statistics: Mapping[Statistic, torch.Tensor]
    entropy: torch.Tensor
    log_probs: torch.Tensor
    counterfactual_log_probs: torch.Tensor | None
    image_tokens: int
    region_tokens: int


def signals(measured: Sequence[Measured], uid: Sequence[str], correct: Sequence[float] | None) -> Signals:
    """Several responses as the batch that a method's ``credit`` reads, padded on the right with zeros.

    Args:
        measured: of the same request.
        uid: names the prompt of each.
        correct: ``acc`` of each; None if no method needs it.
    """
    lengths = [len(m.log_probs) for m in measured]

    def padded(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)

    changed = [m.counterfactual_log_probs for m in measured if m.counterfactual_log_probs is not None]
    assert len(changed) in (0, len(measured))
    of_tokens = [s for s in measured[0].statistics if s.name != "patch_sums"]  # which is per visual token
    return Signals(
        response_mask=padded([torch.ones(n) for n in lengths]),
        entropy=padded([m.entropy for m in measured]),
        log_probs=padded([m.log_probs for m in measured]),
        statistics={s: padded([m.statistics[s] for m in measured]) for s in of_tokens},
        image_tokens=torch.tensor([float(m.image_tokens) for m in measured]),
        region_tokens=torch.tensor([float(m.region_tokens) for m in measured]),
        is_padding=torch.zeros(len(measured), dtype=torch.bool),
        uid=tuple(uid),
        counterfactual_log_probs=padded(changed) if changed else None,
        correct=None if correct is None else torch.tensor([float(c) for c in correct]),
    )


class Observer:
    """A loaded model.

    Args:
        model: folder or hub name.
        device: None: the first GPU, else the CPU.
        dtype: None: that of the checkpoint on a GPU, float32 on a CPU.
        coverage: share of a visual token's cell that a box must cover.
        chat_template: None: the model's own.
        layers: averaged for ``mean`` and the numbers per token; negative numbers count from the last; None: every
            full-attention layer.
        query_row: ``input`` (SAYO) or ``predicting``, see ``probe.statistics``.

    Attributes:
        layers: numbers from 0.
        readable: numbers of all full-attention layers.
        kernel: ``attn_implementation`` of the model.

    Raises:
        SayoError: L17, L18, L23 or D68 for a model or processor that cannot be used, P03 or P11 for layers that cannot
            be read.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        coverage: float = 0.5,
        chat_template: str | None = None,
        layers: Sequence[int] | None = None,
        query_row: str = "input",
    ) -> None:
        self.name, self.coverage, self.chat_template, self.query_row = str(model), coverage, chat_template, query_row
        self.family, self.config, self.processor = processors.load(self.name, "--model")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        flash = self.device.type == "cuda" and find_spec("flash_attn") is not None
        self.kernel = "flash_attention_2" if flash else "sdpa"
        self._dtype = dtype
        text = self.config.get_text_config()
        self._kinds, self.n_heads = configured_kinds(text), int(text.num_attention_heads)
        self.readable = tuple(n for n, kind in enumerate(self._kinds) if kind == FULL_ATTENTION)
        self.layers = self.readable if layers is None else self._numbers(layers, "--layers")
        self._neutral: WeakKeyDictionary[Prompt, Collector] = WeakKeyDictionary()

    def _numbers(self, layers: Sequence[int], where: str) -> tuple[int, ...]:
        """Layers as numbers from 0; P03, P11."""
        numbers = resolve_layers(layers, len(self._kinds), where=where)
        check_full_attention(numbers, self._kinds, where=where)
        return numbers

    @property
    def wanted_dtype(self) -> torch.dtype | str:
        """As asked for: float32 on a CPU, ``auto`` (that of the checkpoint) on a GPU, unless it was named."""
        return self._dtype or (torch.float32 if self.device.type == "cpu" else "auto")

    @functools.cached_property
    def model(self) -> Any:
        """The weights, loaded when they are first needed, so that an engine of its own may answer before.

        Raises:
            SayoError: W06.
        """
        dtype = self.wanted_dtype
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                self.name, dtype=dtype, attn_implementation=self.kernel
            )
            return loaded.to(self.device).eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise SayoError(
                "W06",
                f"the model's weights cannot be loaded ({' '.join(str(error).split())[:200]})",
                where=f"--model {self.name}",
                got=f"{dtype} on {self.device}",
                fix="complete the folder, or choose another --device or --dtype",
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    # ------------------------------------------------------------------------------------------------ prompts
    def prompt(self, row: Mapping[str, Any], where: str) -> Prompt:
        """A row of the data contract (docs/data.md) as the model's input; errors of ``prompt_of``."""
        return prompt_of(row, where, coverage=self.coverage, **self._own())

    def _own(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "config": self.config,
            "processor": self.processor,
            "chat_template": self.chat_template,
        }

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0
    ) -> list[list[int]]:
        """Answer with transformers, all prompts in one batch: response ids with the end token, if there is one.

        Args:
            prompts: at least one.
            max_new_tokens: longest response; None: see ``room``.
            temperature: 0 is greedy; else sampled from the whole distribution, without the model's penalties.
            seed: of the sampling.

        Raises:
            SayoError: W05 for prompts that leave no room for the response.
        """
        max_new_tokens = self.room(prompts, max_new_tokens)
        stop = without_penalties(self.generation)
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = stop.pad_token_id if stop.pad_token_id is not None else self.ends[0] if self.ends else 0

        def left(values: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
            rows = [torch.nn.functional.pad(v, (longest - len(v), 0), value=fill) for v in values]
            return torch.stack(rows).to(self.device)

        inputs: dict[str, Any] = {
            "input_ids": left([p.ids for p in prompts], pad),
            "attention_mask": left([torch.ones_like(p.ids) for p in prompts], 0),
        }
        for name in prompts[0].inputs:
            if name == "mm_token_type_ids":
                inputs[name] = left([p.inputs[name][0] for p in prompts], 0)
            else:
                inputs[name] = torch.cat([p.inputs[name] for p in prompts]).to(self.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        # a sampled placeholder would be an image without pixels
        stop.update(
            max_new_tokens=max_new_tokens, pad_token_id=pad, suppress_tokens=list(self.placeholders), **sampling
        )
        own = [self.device] if self.device.type == "cuda" else []
        given, self.model.generation_config = self.model.generation_config, stop  # it fills gaps with the model's own
        try:
            with torch.random.fork_rng(devices=own):
                torch.manual_seed(seed)
                ids = self.model.generate(**inputs, generation_config=stop)
        finally:
            self.model.generation_config = given
        return [self.until_end(row[longest:].tolist()) for row in ids]

    def room(self, prompts: Sequence[Prompt], tokens: int | None = None) -> int:
        """How many tokens a response may have: as many as asked for, else ``LONGEST`` or what the context leaves.

        Raises:
            SayoError: W05 for prompts that do not leave room for it.
        """
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(prompt.ids) for prompt in prompts)
        wanted = tokens or (LONGEST if limit is None else max(min(LONGEST, limit - longest), 1))
        for prompt in prompts:
            check_context(self.config, prompt.seen, len(prompt.ids), wanted)
        return wanted

    @functools.cached_property
    def generation(self) -> GenerationConfig:
        """The model's own."""
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self.config)

    @property
    def ends(self) -> list[int]:
        """Ids of tokens that end a response."""
        eos = self.generation.eos_token_id
        eos = self.processor.tokenizer.eos_token_id if eos is None else eos
        return list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that stand for visual tokens."""
        names = ("image_token_id", "video_token_id")
        return tuple(n for n in (getattr(self.config, name, None) for name in names) if n is not None)

    def until_end(self, ids: Sequence[int]) -> list[int]:
        """The ids up to and with the first end token."""
        for n, token in enumerate(ids):
            if token in self.ends:
                return list(ids[: n + 1])
        return list(ids)

    # ------------------------------------------------------------------------------------------------ measuring
    @torch.no_grad()
    def measure(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        request: StatisticsRequest,
        *,
        intervention: Intervention | None = None,
    ) -> Measured:
        """Measure statistics of the probe's catalogue, and with an intervention also the response's log-probs after it.

        The changed image is that of step 0 in training.

        Raises:
            SayoError: W07 to W10 for a response that cannot be measured, and what ``Measurement`` and ``intervene``
                raise.
        """
        response_T = self._response(prompt, response_ids)
        names = {s.name for s in request.statistics}
        plan = self._plan(
            prompt,
            response_T,
            coverage=request.coverage,
            n_boxes=max((s.size for s in request.statistics if s.name == "box_mass"), default=0),
            chat=ChatTokens.of(self.processor.tokenizer, self.family)
            if names & {"system_mass", "question_mass"}
            else None,
        )
        check_lse_path(request.path, packed=True, ranks=1, flash=self.kernel == "flash_attention_2")
        numbers = asked_layers(self.model, request.layers, where="the layers of a statistic")
        measurement = Measurement(request, [plan], numbers, packed=True, device=self.device)
        attention = {numbers[n] for s in request.statistics if s.spec.source != "hidden" for n in s.layers}
        hidden = any(s.spec.source == "hidden" for s in request.statistics)
        read_hidden = measurement.read_hidden if hidden else None
        lse = request.path == FAST_LSE
        with ForwardTap(self.model, sorted(attention), measurement.read, read_hidden, with_lse=lse):
            log_probs, entropy = self._token_values(prompt, response_T)
        results = measurement.finish() if request.statistics else {}
        changed = None
        if intervention is not None:
            changed, _ = self._token_values(prompt, response_T, self._changed(prompt, intervention, request.coverage))
        return Measured(
            {s: results[s.key][0].cpu() for s in request.statistics},
            entropy.cpu(),
            log_probs.cpu(),
            None if changed is None else changed.cpu(),
            plan.image_columns.numel(),
            plan.region_tokens,
        )

    @torch.no_grad()
    def observe(
        self,
        prompt: Prompt,
        response_ids: Sequence[int],
        *,
        maps: Sequence[str] | None = None,
        heads: bool = False,
        steady: bool = True,
        budget: int = BUDGET,
        facts: Mapping[str, str | float] | None = None,
        notes: Sequence[str] = (),
    ) -> SeenResponse:
        """Measure where the model looked, in one teacher-forced pass, and one short pass for steady tokens.

        Args:
            prompt: of ``prompt``.
            response_ids: T ids.
            maps: maps per word: ``mean``, ``L24``, ``L24H5``; the first is the default of a page. None: the mean, and
                as many layers as the budget allows. Maps of the whole response exist of the mean and every layer.
            heads: also maps of the whole response of single heads, as many as a quarter of the budget allows, those
                with most attention to the region (without boxes: to the image) first.
            steady: find visual tokens that draw attention whatever the question is.
            budget: bytes of all maps in base64.
            facts, notes: of the response, added to those of this method.

        Raises:
            SayoError: W07 to W10 for a response that cannot be measured, W11 for an unknown map, P03 or P11 for the
                layer of a map, W12 for attention that is not finite.
        """
        response_T = self._response(prompt, response_ids)
        T, V = len(response_T), prompt.seen.tokens
        pieces = pieces_of(self.processor.tokenizer, response_T.tolist())
        words = self._words(pieces, response_T.tolist())
        word_T = torch.tensor([w for w, (first, end) in enumerate(words) for _ in range(first, end)])
        length_W = torch.tensor([end - first for first, end in words], dtype=torch.float32)
        wanted = self._wanted(maps, len(words), V, budget)
        packed: dict[str, Packed] = {}

        def pack(selection: Selection, words_WV: torch.Tensor, levels: int = wanted.levels) -> None:
            means_WV = words_WV.cpu() / length_W[:, None]
            packed[_name(selection)] = Packed.of(np.nan_to_num(means_WV.numpy()), levels)

        collector = Collector(
            self._plan(prompt, response_T, border=True),
            self.layers,
            word_T=word_T,
            n_words=len(words),
            words=wanted.selections,
            take=pack,
            mean_words=wanted.mean,
            query_row=self.query_row,
            device=self.device,
        )
        layers = sorted({*self.layers, *(layer for layer, _ in wanted.selections)})
        with ForwardTap(self.model, layers, collector.read):
            log_prob_T, entropy_T = self._token_values(prompt, response_T)
        _refuse_not_finite(collector, self.name)
        neutral = self._neutral_pass(prompt, layers) if steady else None

        def map_set(name: str, label: str, selection: Selection | None, levels: int = LEVELS[0]) -> MapSet:
            over, head = (self.layers, None) if selection is None else ((selection[0],), selection[1])
            total_V = collector.total(over, head).cpu().numpy()
            mask_V = None
            if neutral is not None:
                mask_V = sinks.steady_mask(total_V, neutral.total(over, head).cpu().numpy())
            return MapSet(name, label, Packed.of(total_V[None], levels), packed.get(name), mask_V)

        sets = {MEAN: map_set(MEAN, self._mean_label(), None)}
        for layer in layers:
            sets[f"L{layer}"] = map_set(f"L{layer}", f"layer {layer}", (layer, None))
        for layer, head in wanted.selections:
            if head is not None:
                sets[f"L{layer}H{head}"] = map_set(f"L{layer}H{head}", f"layer {layer}, head {head}", (layer, head))
        left = budget - sum(_size(m.total) + (_size(m.words) if m.words else 0) for m in sets.values())
        notes = [*prompt.notes, *notes, *wanted.notes]
        if heads:
            found, note = self._head_maps(collector, prompt, set(sets), map_set, min(int(budget * HEADS_SHARE), left))
            sets |= found
            left -= sum(_size(m.total) for m in found.values())
            notes += note
        if collector.words is not None:
            means_WV = (collector.words.cpu() / length_W[:, None]).numpy()
            fitting = (p for p in (Packed.of(means_WV, levels) for levels in LEVELS) if _size(p) <= left)
            mean = next(fitting, None)
            sets[MEAN] = dataclasses.replace(sets[MEAN], words=mean)
            if mean is None:
                notes.append(
                    f"The maps of {len(words)} single words over {V} visual tokens are larger than {budget} bytes, so "
                    "only the map of the whole response is stored."
                )
        first = [sets.pop(_canonical(name)) for name in maps or (MEAN,)]
        values = {"log_prob": log_prob_T, "entropy": entropy_T, **self._masses(collector, prompt)}
        measured = {name: value.float().cpu().numpy() for name, value in values.items()}
        if not prompt.seen.region_tokens:
            notes.append("The prompt has no boxes, so nothing is said about boxes.")
        return SeenResponse(
            pieces=pieces,
            words=words,
            values=measured,
            maps=(*first, *sets.values()),
            facts={**self._facts(prompt, measured, T), **(facts or {})},
            notes=tuple(notes),
            heads=self._head_table(collector, prompt, layers),
        )

    # ------------------------------------------------------------------------------------------------ helpers
    def _response(self, prompt: Prompt, ids: Sequence[int]) -> torch.Tensor:
        """int64 [T].

        Raises:
            SayoError: W07 for an empty response, W08 for one of special tokens alone, W09 for one with a placeholder of
                visual tokens, W10 for an id that the model does not have, W05 for one that does not fit the context.
        """
        tokenizer, size = self.processor.tokenizer, self.model.get_input_embeddings().num_embeddings
        special = set(tokenizer.all_special_ids)
        where = f"the response to {prompt.seen.where}"
        fix = "give another response, or raise --max-new-tokens"
        found = sorted(set(ids) & set(self.placeholders))
        outside = [n for n in ids if not 0 <= n < size]
        raise_first(
            [
                Rule("W07", len(ids) == 0, "the response is empty", where, fix),
                Rule("W10", bool(outside), "the response has tokens of another model", where,
                     "give ids of the model's own tokenizer", got=outside[:5], wanted=f"0 to {size - 1}"),
                Rule("W09", bool(found), "the response has placeholders of images, which have no pixels", where,
                     "remove them", got=tokenizer.convert_ids_to_tokens(found)),
                Rule("W08", all(n in special for n in ids), "the response has special tokens only", where, fix,
                     got=tokenizer.decode(list(ids))),
            ]
        )  # fmt: skip
        shorter = "give a shorter response, a shorter question, or smaller or fewer images"
        check_context(self.config, prompt.seen, len(prompt.ids), len(ids), fix=shorter)
        return torch.tensor(list(ids), dtype=torch.int64)

    def _words(self, pieces: Sequence[str], ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """As ``words_of``; a special token, such as the one that ends the response, is a word of its own."""
        special = set(self.processor.tokenizer.all_special_ids)
        starts = {first for first, _ in words_of(pieces)}
        starts |= {t for t in range(len(ids)) if ids[t] in special or (t > 0 and ids[t - 1] in special)}
        bounds = [*sorted(starts), len(ids)]
        return tuple(itertools.pairwise(bounds))

    def _plan(
        self,
        prompt: Prompt,
        response_T: torch.Tensor,
        *,
        border: bool = False,
        coverage: float | None = None,
        n_boxes: int = 0,
        chat: ChatTokens | None = None,
    ) -> RowPlan:
        plan = plan_row(
            torch.cat([prompt.ids, response_T]),
            len(response_T),
            image_token_id=self.config.image_token_id,
            images=prompt.tiles,
            boxes=prompt.boxes,
            coverage=self.coverage if coverage is None else coverage,
            where=prompt.seen.where,
            n_boxes=n_boxes,
            chat=chat,
        )
        if not border:
            return plan
        border_S = torch.zeros(plan.length, dtype=torch.bool)
        border_S[plan.image_columns] = torch.from_numpy(prompt.seen.border)
        return dataclasses.replace(plan, keys={**plan.keys, "border": border_S})

    def _hidden(self, prompt: Prompt, ids_S: torch.Tensor, changed: Mapping[str, torch.Tensor] | None = None) -> Any:
        """Last hidden states [S, D] of the prompt and some tokens after it."""
        inputs: dict[str, Any] = dict(changed or prompt.inputs)
        if "mm_token_type_ids" in inputs:
            more = len(ids_S) - inputs["mm_token_type_ids"].shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        ids = ids_S[None].to(self.device)
        return self.model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs
        ).last_hidden_state[0]

    def _token_values(
        self, prompt: Prompt, response_T: torch.Tensor, changed: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob and entropy [T] of the distributions that sampled the response, at temperature 1."""
        P, T = len(prompt.ids), len(response_T)
        hidden_TD = self._hidden(prompt, torch.cat([prompt.ids, response_T]), changed)[P - 1 : P + T - 1]
        head = self.model.get_output_embeddings()
        response_T = response_T.to(self.device)
        rows, log_probs, entropies = max(LOGITS // head.weight.shape[0], 1), [], []
        for first in range(0, T, rows):
            log_p_tN = head(hidden_TD[first : first + rows]).float().log_softmax(-1)
            log_probs.append(log_p_tN.gather(-1, response_T[first : first + rows, None])[:, 0])
            entropies.append(-(log_p_tN.exp() * log_p_tN).sum(-1))
        return torch.cat(log_probs), torch.cat(entropies)

    def _changed(self, prompt: Prompt, intervention: Intervention, coverage: float) -> dict[str, torch.Tensor]:
        where = prompt.seen.where
        region = [
            torch.from_numpy(region_mask(boxes, tiles, coverage, where=where))
            for boxes, tiles in zip(prompt.boxes, prompt.tiles, strict=False)
        ]
        return intervene(
            prompt.inputs,
            intervention,
            Pixels.of(self.processor, self.family.geometry),
            tiles=prompt.tiles,
            region=region or None,
            key=prompt_key(prompt.ids, 0),
            where=where,
        )

    def _neutral_pass(self, prompt: Prompt, layers: Sequence[int]) -> Collector:
        """The attention of the last prompt token, for a neutral question and the same images; kept per prompt."""
        kept = self._neutral.get(prompt)
        if kept is not None and set(layers) <= kept.totals.keys():
            return kept
        neutral = with_question(prompt, sinks.NEUTRAL, **self._own())
        before = dataclasses.replace(neutral, ids=neutral.ids[:-1])
        plan = self._plan(before, neutral.ids[-1:], border=True)  # the last token as if it were a response of one
        collector = Collector(plan, layers, device=self.device)
        with ForwardTap(self.model, layers, collector.read):
            self._hidden(neutral, neutral.ids)
        _refuse_not_finite(collector, self.name)
        self._neutral[prompt] = collector
        return collector

    def _wanted(self, maps: Sequence[str] | None, W: int, V: int, budget: int) -> "_Wanted":
        """Which word maps are kept, and at how many levels. A level costs its bits, and base64 a third more."""
        if maps is not None:
            selections = [s for s in (self._selection(name) for name in dict.fromkeys(map(_canonical, maps))) if s]
            return _Wanted(MEAN in maps, tuple(selections), LEVELS[0], ())
        left = budget * (1 - HEADS_SHARE) - (len(self.layers) + 1) * (V * 4 / 3 + NAMES)
        for levels in LEVELS[:2]:
            fitting = int(left / (W * V * levels.bit_length() / 8 * 4 / 3 + NAMES)) - 1
            if fitting >= len(self.layers):
                return _Wanted(True, tuple((n, None) for n in self.layers), levels, ())
        fitting = max(fitting, 0)
        at = np.linspace(0, len(self.layers) - 1, fitting).round().astype(int) if fitting > 1 else [-1] * fitting
        chosen = tuple((self.layers[i], None) for i in at)
        stored = f" and of {len(chosen)} of {len(self.layers)} layers" if chosen else ", not of single layers"
        note = f"Maps of single words are stored of the mean{stored}, to keep the page small."
        return _Wanted(True, chosen, levels, (note,))

    def check_maps(self, names: Sequence[str]) -> None:
        """Refuse names of maps that this model does not have; W11, P03, P11."""
        for name in names:
            self._selection(name)

    def _selection(self, name: str) -> Selection | None:
        """The layer and head of a map's name; None for the mean.

        Raises:
            SayoError: W11, P03, P11.
        """
        if name == MEAN:
            return None
        match = _MAP.fullmatch(name)
        head = int(match[2]) if match and match[2] is not None else None
        unknown = match is None or int(match[1]) >= len(self._kinds)
        if match is None or unknown or (head is not None and head >= self.n_heads):
            raise SayoError(
                "W11",
                "unknown map",
                where="--maps",
                got=name,
                wanted=f"mean, a layer (L0 to L{len(self._kinds) - 1}), or one of its heads, such as "
                f"L{self.readable[-1]}H0 to L{self.readable[-1]}H{self.n_heads - 1}",
                fix="correct the name; layers and heads count from 0",
            )
        (number,) = self._numbers([int(match[1])], "--maps")
        return number, head

    def _mean_label(self) -> str:
        layers = "all layers" if self.layers == self.readable else f"layers {', '.join(map(str, self.layers))}"
        if self.layers == (len(self._kinds) - 1,):
            return "last layer, mean over its heads"
        if len(self.layers) == 1:
            return f"layer {self.layers[0]}, mean over its heads"
        if self.layers == self.readable and len(self.readable) < len(self._kinds):
            layers = f"all {len(self.layers)} full-attention layers"
        return f"{layers}, mean over their heads"

    def _masses(self, collector: Collector, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Numbers per token [T], by name in ``TOKEN_VALUES``."""
        image, region, sink, border = collector.mass
        out = {"image_mass": image, "sink_mass": sink, "border_mass": border}
        return out | ({"region_mass": region} if prompt.seen.region_tokens else {})

    def _head_maps(
        self, collector: Collector, prompt: Prompt, taken: set[str], map_set: Callable[..., MapSet], budget: int
    ) -> tuple[dict[str, MapSet], list[str]]:
        """Maps of single heads, in the order of layers and heads, and a note if some were left out."""
        by, key = ("boxes", "region_mass") if prompt.seen.region_tokens else ("image", "image_mass")
        mass = {(n, h): float(m) for n in self.layers for h, m in enumerate(collector.tables[n][key].tolist())}
        found: dict[Selection, MapSet] = {}
        used = 0
        for layer, head in sorted(mass, key=lambda s: -mass[s]):
            name = f"L{layer}H{head}"
            if name in taken:
                continue
            made = map_set(name, f"layer {layer}, head {head}", (layer, head), LEVELS[1])
            used += _size(made.total)
            if used > budget:
                break
            found[layer, head] = made
        note = f"Maps are stored of the {len(found)} heads of {len(mass)} with most attention to the {by}."
        ordered = {found[s].name: found[s] for s in sorted(found, key=lambda s: (s[0], s[1] or 0))}
        return ordered, [note] if used > budget else []

    def _head_table(self, collector: Collector, prompt: Prompt, layers: Sequence[int]) -> HeadTable:
        names = ["image_mass", "spatial_entropy"]
        names += ["region_mass", "box_hit"] if prompt.seen.region_tokens else []
        return HeadTable(
            tuple(layers),
            {name: torch.stack([collector.tables[n][name] for n in layers]).cpu().numpy() for name in names},
        )

    def _facts(self, prompt: Prompt, values: Mapping[str, np.ndarray], T: int) -> dict[str, str | float]:
        image = float(values["image_mass"].mean())
        facts: dict[str, str | float] = {
            "tokens": T,
            "image_mass": image,
            "sink_mass": float(values["sink_mass"].mean()),
            "border_share": float(values["border_mass"].mean()) / image if image else 0.0,
            "border_chance": float(prompt.seen.border.mean()),
        }
        if prompt.seen.region_tokens:
            target_T = torch.from_numpy(values["region_mass"]) / prompt.seen.region_tokens
            visual_T = torch.from_numpy(values["image_mass"]) / prompt.seen.tokens
            everything = torch.ones(1, T, dtype=torch.bool)
            facts |= {
                "R_a": float(target_attention(target_T[None], visual_T[None], everything)),
                "R_a_single": float((0.5 * (1 + token_ratio(target_T, visual_T))).mean()),
                "region_mass": float(values["region_mass"].mean()),
                "region_share": float(values["region_mass"].mean()) / image if image else 0.0,
                "region_chance": prompt.seen.chance,
            }
        return facts | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention_kernel": self.kernel,
            "layers": ", ".join(map(str, self.layers)),
            "query_row": self.query_row,
        }


@dataclass(frozen=True)
class _Wanted:
    """Word maps to keep: of the mean, of selections, the levels of the latter, what a reader should know."""

    mean: bool
    selections: tuple[Selection, ...]
    levels: int
    notes: tuple[str, ...]


def _canonical(name: str) -> str:
    """``L07H3`` as ``L7H3``."""
    match = _MAP.fullmatch(name)
    return name if match is None else _name((int(match[1]), None if match[2] is None else int(match[2])))


def _name(selection: Selection) -> str:
    layer, head = selection
    return f"L{layer}" if head is None else f"L{layer}H{head}"


def _size(packed: Packed) -> int:
    """Bytes on a page: base64, and the names around it."""
    return len(packed.data) * 4 // 3 + NAMES


def _refuse_not_finite(collector: Collector, model: str) -> None:
    broken = [layer for layer, flag in sorted(collector.broken.items()) if bool(flag)]
    if broken:
        raise SayoError(
            "W12",
            "the model's attention is not finite",
            where=f"layer {broken[0]} of {model}, counted from 0",
            got=f"NaN or infinity in {len(broken)} of {len(collector.broken)} layers",
            wanted="finite numbers",
            fix="the weights or the image produce NaN: load with --dtype float32, or look at the checkpoint",
        )
