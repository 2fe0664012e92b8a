"""What ``sayo diagnose`` stores of a response, and the views of it that the analyses read.

Shape suffixes: T response tokens, V visual tokens, L decoder layers, H query heads.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sayo_verl.estimates import lift, token_scores
from sayo_verl.methods import METHODS, FaithfulMethod, Method, Needs, Signals
from sayo_verl.methods.signals import join_needs
from sayo_verl.probe.statistics import Statistic, StatisticsRequest, log_probs_key, union

IMAGE, REGION, SINK = Statistic("image_mass"), Statistic("region_mass"), Statistic("sink_mass")
COSINE = Statistic("image_cosine")  # VGPO's score
PREDICTING = Statistic("image_mass", query_row="predicting")  # of the row that sampled the token, as its effect
OWN = (IMAGE, REGION, SINK, COSINE, PREDICTING)


@dataclass(frozen=True)
class Answer:
    """One response and what was measured of it.

    Attributes:
        row: number of its row in the set; responses of a row belong together.
        sample: number of the response among those of its row.
        where, question, truth: of the row.
        text: of the response, without special tokens.
        ids: of its tokens.
        accuracy: of the reward function, in [0, 1]; NaN: there is no ground truth.
        image_tokens, region_tokens: visual tokens of the images and in the boxes; 0 without boxes.
        finished: it ends with an end token.
        values: float32 arrays: ``entropy``, ``log_probs`` and, under ``log_probs_key``, those after each intervention
            [T], a statistic of the probe under its key [T] or [T, k], and for the first response of a row
            ``border_mass`` [T], ``steady_share`` [], and ``heads/<name>`` [L, H] of a ``HeadTable``.
    """

    row: int
    sample: int
    where: str
    question: str
    truth: str
    text: str
    ids: list[int]
    accuracy: float
    image_tokens: int
    region_tokens: int
    finished: bool
    values: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.values["entropy"])

    @property
    def chance(self) -> float:
        """Share of the visual tokens in the boxes."""
        return self.region_tokens / max(self.image_tokens, 1)

    @property
    def right(self) -> bool | None:
        """None without a ground truth."""
        return None if np.isnan(self.accuracy) else self.accuracy >= 0.5

    @property
    def densities(self) -> tuple[np.ndarray, np.ndarray]:
        """a(t) and v(t): attention per target and per visual token, [T] each."""
        return self[REGION] / max(self.region_tokens, 1), self[IMAGE] / max(self.image_tokens, 1)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """R_a of each token, [T]; NaN without boxes."""
        return token_scores(*self.densities) if self.region_tokens else np.full(self.tokens, np.nan)

    @property
    def score(self) -> float:
        """Mean of ``scores``."""
        return float(self.scores.mean())

    @property
    def lift(self) -> float:
        """Attention on the boxes over chance, of the whole response; NaN without boxes."""
        region, image = self[REGION].sum(), self[IMAGE].sum()
        return float(lift(region, image, self.chance)) if self.region_tokens else float("nan")

    def __getitem__(self, statistic: Statistic) -> np.ndarray:
        return self.values[statistic.key].astype(float)


def usable_methods() -> tuple[dict[str, Method], dict[str, str]]:
    """Every registered method with its default settings; and why others are left out, by name."""
    usable: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name, cls in METHODS.items():
        method = cls()
        missing = [pip for module, pip in method.needs().packages if importlib.util.find_spec(module) is None]
        if method.needs().reported:
            left_out[name] = "it reads a field of a reward function, which is not called here"
        elif missing:
            left_out[name] = f"a package is missing: {missing[0]}"
        else:
            usable[name] = method
    return usable, left_out


def needs_of(methods: Iterable[Method]) -> Needs:
    """What one pass measures for the methods and the analyses."""
    joined = join_needs([FaithfulMethod(gate=False).needs(), *(method.needs() for method in methods)])
    own = StatisticsRequest(OWN, joined.statistics.coverage, joined.statistics.path)
    return dataclasses.replace(joined, statistics=union([joined.statistics, own]))


def signals_of(answers: Sequence[Answer], needs: Needs) -> Signals:
    """Responses as one batch of the trainer: what a method's ``credit`` reads. Groups are rows."""
    T = max(answer.tokens for answer in answers)

    def padded(key: str) -> torch.Tensor:
        parts = [torch.from_numpy(np.ascontiguousarray(answer.values[key])).float() for answer in answers]
        return torch.stack([torch.cat([p, p.new_zeros(T - len(p), *p.shape[1:])]) for p in parts])

    lengths = torch.tensor([answer.tokens for answer in answers])
    accuracy = torch.tensor([answer.accuracy for answer in answers])
    return Signals(
        response_mask=(torch.arange(T) < lengths[:, None]).long(),
        entropy=padded("entropy"),
        log_probs=padded("log_probs"),
        statistics={s: padded(s.key) for s in needs.statistics.statistics},
        image_tokens=torch.tensor([answer.image_tokens for answer in answers]),
        region_tokens=torch.tensor([answer.region_tokens for answer in answers]),
        is_padding=torch.zeros(len(answers), dtype=torch.bool),
        uid=tuple(str(answer.row) for answer in answers),
        counterfactuals={i: padded(log_probs_key(i)) for i in needs.interventions},
        correct=None if accuracy.isnan().any() else accuracy.float(),
    )


def per_response(answers: Sequence[Answer], value: Callable[[Answer], Any]) -> np.ndarray:
    """A value of each response, as float64 [R] or [R, ...]."""
    return np.array([value(answer) for answer in answers], float)


def write_row(file: Path, answers: Sequence[Answer]) -> None:
    """Store the responses of one row, as a whole or not at all."""
    facts: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for answer in answers:
        facts.append({f.name: getattr(answer, f.name) for f in dataclasses.fields(answer) if f.name != "values"})
        arrays |= {f"{answer.sample}/{key}": value.astype(np.float32) for key, value in answer.values.items()}
    with whole(file) as out:
        np.savez_compressed(out, facts=np.array(json.dumps(facts)), **arrays)


@contextmanager
def whole(file: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which gets its name when it is complete and is removed otherwise."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as out:
            yield out
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def read_row(file: Path) -> list[Answer] | None:
    """The reverse of ``write_row``; None for a missing or damaged file, whose row is measured again."""
    try:
        with np.load(file) as stored:
            facts = json.loads(str(stored["facts"]))
            values: list[dict[str, np.ndarray]] = [{} for _ in facts]
            for name in stored.files:
                sample, _, key = name.partition("/")
                if key:
                    values[[fact["sample"] for fact in facts].index(int(sample))][key] = stored[name]
        return [Answer(**fact, values=of) for fact, of in zip(facts, values, strict=True)]
    except (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
