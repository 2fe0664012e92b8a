"""Where a model looked while it wrote a response, word by word, as a page shows it.

Shape suffixes: T response tokens, W words, V visual tokens, L layers, H query heads.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from sayo_verl.errors import SayoError
from sayo_verl.look import sinks
from sayo_verl.look.collect import MEAN, Collector, Selection
from sayo_verl.look.measure import Measurer
from sayo_verl.look.prompt import Prompt, with_question
from sayo_verl.methods.region import target_attention, token_ratio
from sayo_verl.probe.taps import ForwardTap
from sayo_verl.view.maps import LEVELS, Packed
from sayo_verl.view.seen import HeadTable, MapSet, SeenResponse, pieces_of, special_tokens, words_of

BUDGET = 5_000_000  # bytes of all maps of a response on a page, in base64
NAMES = 100  # bytes of a map besides its codes
HEADS_SHARE = 0.25  # of the budget, for the maps of single heads
_MAP = re.compile(r"L(\d+)(?:H(\d+))?")


class Observer(Measurer):
    """A loaded model that answers, measures and observes; arguments and attributes of ``LoadedModel``."""

    @functools.cached_property
    def _neutral(self) -> WeakKeyDictionary[Prompt, Collector]:
        return WeakKeyDictionary()

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
        words = words_of(pieces, special_tokens(self.processor.tokenizer, response_T.tolist()))
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
