"""The statistics of the probe, with names, shapes, units and ranges, and the request of a method.

Row convention. A statistic of response token y_t is read from one row of the attention matrix (or one hidden state).
With prompt length P and t = 0, 1, ... the row is

    input        P + t      the position where y_t is the *input* (SAYO: "attention of the generated token")
    predicting   P + t - 1  the position whose logits *sampled* y_t (verl's log_probs and entropy belong to this row)

A worker returns the values of response tokens only, value t of token t, for both conventions. verl's own per-token
outputs cover the whole sequence, and verl slices them afterwards. With a prompt of 4,000 visual tokens and a response
of 500 tokens that is nine times as much. The values are float32: bfloat16 would round a mass of 0.1 by 2e-4.

Attention is the model's softmax over all causal keys of the row's own sequence, averaged over heads (unless
``per_head``) and over the requested layers, in float32, detached. Shape suffixes: T response tokens, V visual tokens of
the row, H query heads, k the requested ``size``.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.vision.intervention import Intervention

# Prefix of the keys under which workers return statistics, next to log_probs and entropy.
WIRE_PREFIX = "sayo_"
# Keys of the per-call requests in the batch's extra_info; without one of them the engine mixin does nothing.
REQUEST_KEY = "sayo_probe"
INTERVENTION_KEY = "sayo_intervention"
# Prefix of the only output of a pass with a changed image, the log-probs of the same response; see ``log_probs_key``.
COUNTERFACTUAL_LOG_PROBS = WIRE_PREFIX + "counterfactual_log_probs"


def log_probs_key(intervention: Intervention) -> str:
    """The wire key of the log-probs of an intervention's pass, equal only for equal interventions."""
    return f"{COUNTERFACTUAL_LOG_PROBS}.{intervention.key}"


QUERY_ROWS = {"input": 0, "predicting": -1}  # offset of the query row from the position of y_t
FAST_LSE = "fast_lse"
PATHS = ("auto", "reference", "fast", FAST_LSE)


@dataclass(frozen=True)
class StatisticSpec:
    """One entry of the catalogue.

    Attributes:
        shape: of one row's values.
        unit, low, high: unit and range of a value.
        source: ``mass`` (attention on a set of keys), ``lse``, ``profile`` (attention on single visual tokens) or
            ``hidden`` (last hidden state).
        what: a description of one line.
        keys: the set of keys of a mass, see ``sayo_verl.probe.plan``.
    """

    shape: str
    unit: str
    low: float
    high: float
    source: str
    what: str
    keys: str = ""


def _mass(keys: str, what: str, shape: str = "[T] or [T, H]") -> StatisticSpec:
    return StatisticSpec(shape, "attention probability", 0.0, 1.0, "mass", what, keys)


CATALOGUE: Mapping[str, StatisticSpec] = {
    "image_mass": _mass("image", "attention on all visual tokens of the row"),
    "region_mass": _mass("region", "attention on the visual tokens of the row's boxes taken together"),
    "box_mass": _mass(
        "box", "attention on the visual tokens of each of the first k boxes, 0 for a missing box", "[T, k]"
    ),
    "sink_mass": _mass("sink", "attention on the first token of the sequence, where models park unused attention"),
    "system_mass": _mass("system", "attention on the text of system turns"),
    "question_mass": _mass("question", "attention on the text of user turns, without visual tokens and their borders"),
    "response_mass": _mass("response", "attention on the response's own tokens so far"),
    "lse": StatisticSpec("[T] or [T, H]", "nats", -math.inf, math.inf, "lse", "log-sum-exp of the attention logits"),
    "top_patch_index": StatisticSpec(
        "[T, k]",
        "visual token, -1: none",
        -1.0,
        math.inf,
        "profile",
        "the k visual tokens with most attention, highest first",
    ),
    "top_patch_mass": StatisticSpec("[T, k]", "attention probability", 0.0, 1.0, "profile", "their attention"),
    "patch_sums": StatisticSpec(
        "[V]",
        "attention probability x tokens",
        0.0,
        math.inf,
        "profile",
        "attention each visual token gets, summed over the response: a heat map",
    ),
    "neighbour_index": StatisticSpec(
        "[T, k]",
        "response token, -1: none",
        -1.0,
        math.inf,
        "profile",
        "the k response tokens with the most similar attention to the image",
    ),
    "neighbour_similarity": StatisticSpec(
        "[T, k]", "cosine", 0.0, 1.0, "profile", "cosine of their attention profiles"
    ),
    "image_cosine": StatisticSpec(
        "[T]",
        "cosine",
        -1.0,
        1.0,
        "hidden",
        "last hidden state against the mean last hidden state of the visual tokens (VGPO)",
    ),
}
SIZED = ("box_mass", "top_patch_index", "top_patch_mass", "neighbour_index", "neighbour_similarity")

# Measured for every row, without a request: one float32 number per row.
PER_ROW: Mapping[str, str] = {
    "image_tokens": "number of visual tokens of the row (0: the row has no image)",
    "region_tokens": "number of visual tokens of the row's boxes (0: the row has no box)",
    "probe_seconds": "wall time the probe took for this row's micro-batch, divided by the rows of the micro-batch",
}


@dataclass(frozen=True)
class Statistic:
    """One statistic that a method needs.

    Attributes:
        name: key of ``CATALOGUE``.
        layers: decoder layers to average over; negative numbers count from the last. ``image_cosine`` uses the last
            hidden state only.
        query_row: ``"input"`` or ``"predicting"``, see above.
        per_head: do not average over query heads (masses over sets of keys and the log-sum-exp only).
        size: k, for statistics in ``SIZED``; 0 for others.

    Raises:
        SayoError: P08 for an unknown row convention, P12 for an unknown name, P13 for an option that does not apply.
    """

    name: str
    layers: tuple[int, ...] = (-1,)
    query_row: str = "input"
    per_head: bool = False
    size: int = 0

    def __post_init__(self) -> None:
        if self.name not in CATALOGUE:
            raise SayoError(
                "P12",
                f"unknown statistic{did_you_mean(self.name, CATALOGUE)}",
                where="Statistic",
                got=self.name,
                wanted=", ".join(CATALOGUE),
                fix="correct the name",
            )
        if self.query_row not in QUERY_ROWS:
            raise SayoError(
                "P08",
                "unknown query row",
                where=f"Statistic {self.name}",
                got=self.query_row,
                wanted=" or ".join(QUERY_ROWS),
                fix="name one of them",
            )
        fact, sized = CATALOGUE[self.name], self.name in SIZED
        twice = not self.layers or len(set(self.layers)) < len(self.layers)
        not_last = fact.source == "hidden" and self.layers != (-1,)
        no_heads = self.per_head and (fact.source not in ("mass", "lse") or sized)
        wrong_size = self.size < 1 if sized else self.size != 0
        raise_first(
            [
                self._rule(twice, "layers", "distinct numbers"),
                self._rule(not_last, "layers", "(-1,), the last hidden state"),
                self._rule(no_heads, "per_head", "False"),
                self._rule(wrong_size, "size", "1 or more" if sized else "0, it has none"),
                self._rule(self.name == "box_mass" and self.size > 16, "size", "at most 16 boxes"),
            ]
        )

    def _rule(self, broken: bool, key: str, wanted: str) -> Rule:
        return Rule(
            "P13",
            broken,
            f"{key} does not fit the statistic",
            where=f"Statistic {self.name}",
            got=getattr(self, key),
            wanted=wanted,
            fix=f"change {key} in the method's needs()",
        )

    @property
    def key(self) -> str:
        """Name of the measurement, equal only for equal statistics. With ``WIRE_PREFIX`` it is the key on the wire."""
        tail = ".heads" if self.per_head else f".{self.size}" if self.size else ""
        return f"{self.name}.{self.query_row}.L{','.join(map(str, self.layers))}{tail}"

    @property
    def spec(self) -> StatisticSpec:
        return CATALOGUE[self.name]


@dataclass(frozen=True)
class StatisticsRequest:
    """A run's request for one log-prob pass; sent to the workers as a plain dict.

    Attributes:
        statistics: without duplicates.
        coverage: share of a visual token's cell that a box must cover, see ``sayo_verl.vision.masks``.
        path: ``"fast"`` (Triton), ``"reference"`` (plain torch) or ``"auto"`` (fast on a GPU, reference elsewhere).
            ``"fast_lse"`` is the fast path with FlashAttention's log-sum-exp instead of its own.

    Raises:
        SayoError: P12 for an entry that is not a ``Statistic``, P14 for an unknown path.
    """

    statistics: tuple[Statistic, ...]
    coverage: float = 0.5
    path: str = "auto"

    def __post_init__(self) -> None:
        listed = isinstance(self.statistics, tuple | list)
        if not listed or not all(isinstance(statistic, Statistic) for statistic in self.statistics):
            raise SayoError(
                "P12",
                "a request is a tuple of Statistic",
                where="StatisticsRequest",
                got=repr(self.statistics),
                wanted='such as StatisticsRequest((Statistic("image_mass", layers=(-1,)),))',
                fix="write Statistic(...) around each name, with its layers, and a comma after the last",
            )
        if self.path not in PATHS:
            raise SayoError(
                "P14",
                "unknown path of the probe",
                where="sayo.probe_path",
                got=self.path,
                wanted=" or ".join(PATHS),
                fix="use auto",
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer of any statistic, as named, without duplicates."""
        return tuple(dict.fromkeys(layer for statistic in self.statistics for layer in statistic.layers))

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "StatisticsRequest":
        statistics = tuple(Statistic(**{**s, "layers": tuple(s["layers"])}) for s in wire["statistics"])
        return cls(**{**wire, "statistics": statistics})


def union(requests: Sequence[StatisticsRequest]) -> StatisticsRequest:
    """Combine requests into one without duplicate statistics.

    Raises:
        SayoError: P15 when requests differ in coverage or path.
    """
    settings = {(request.coverage, request.path) for request in requests}
    if len(settings) != 1:
        raise SayoError(
            "P15",
            "requests differ in coverage or path, which apply to a whole pass",
            where="union",
            got=sorted(settings),
            wanted="one pair",
            fix="give the parts of a run the same settings",
        )
    ((coverage, path),) = settings
    statistics = dict.fromkeys(statistic for request in requests for statistic in request.statistics)
    return StatisticsRequest(tuple(statistics), coverage, path)


def check_lse_path(path: str, *, packed: bool, ranks: int, flash: bool = True) -> None:
    """Refuse ``fast_lse`` where FlashAttention computes no log-sum-exp of the tokens that the probe reads.

    Args:
        path: of the probe.
        packed: whether rows are packed back to back.
        ranks: how many share a sequence.
        flash: whether the model runs FlashAttention.

    Raises:
        SayoError: P31.
    """
    if path == FAST_LSE and not (packed and ranks == 1 and flash):
        raise SayoError(
            "P31",
            "FlashAttention's log-sum-exp is available for whole packed rows only",
            where="sayo.probe_path",
            got=f"{'packed' if packed else 'padded'} rows, sequence parallel size "
            f"{ranks}, {'FlashAttention' if flash else 'another attention kernel'}",
            wanted="use_remove_padding=True, ulysses_sequence_parallel_size=1, flash_attention_2",
            fix="set sayo.probe_path=fast, which computes its own",
        )
