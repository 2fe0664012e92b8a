"""What a method can read of a batch, and how it declares what it needs.

Shape suffixes: B rows (one response each), T response tokens (padded on the right).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe.statistics import CATALOGUE, Statistic, StatisticsRequest, log_probs_key, union
from sayo_verl.vision.intervention import Intervention

# Of ``Signals``: earlier name -> name.
RENAMED = {
    "the": "required",
    "carrying": "eligible_rows",
    "counterfactual_log_probs": "counterfactual(intervention)",
}


@dataclass(frozen=True)
class Reported:
    """A field that the reward function returns beside the score of a response, and that a method reads.

    Attributes:
        name: key of the dict that the reward function returns.
        example: number of response tokens, seed -> a value that the field may have for such a response. The trial of a
            method at launch and the tests use it.
    """

    name: str
    example: Callable[[int, int], "str | float"]


@dataclass(frozen=True)
class Needs:
    """What must be measured before a method can assign credit.

    Attributes:
        statistics: what the probe measures in the log-prob pass.
        interventions: how the image is changed in further log-prob passes of the same tokens, one pass each.
        correctness: the reward function must report ``acc``, or ``sayo.correct_from`` says what is correct.
        reported: further fields that the reward function must report, as text or a number.
        boxes: rows need a target region; rows without one are neutral.
        packages: modules that must be importable where advantages are computed, such as ``pymetis``, each with the pip
            requirement that brings it.
    """

    statistics: StatisticsRequest
    interventions: tuple[Intervention, ...] = ()
    correctness: bool = False
    boxes: bool = False
    packages: tuple[tuple[str, str], ...] = ()
    reported: tuple[Reported, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> "Needs":
        """Say the new name of a renamed argument.

        Raises:
            SayoError: A19.
        """
        if "intervention" in kwargs:
            raise _renamed("Needs(intervention=...)", "Needs(interventions=(...,))")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse the one intervention of an earlier version, and keep equal ones once.

        Raises:
            SayoError: A19.
        """
        if self.interventions is None or isinstance(self.interventions, Intervention):
            raise _renamed("the second argument of Needs", "Needs(interventions=(...,))")
        object.__setattr__(self, "interventions", tuple(dict.fromkeys(self.interventions)))

    if not TYPE_CHECKING:  # a type checker still finds a misspelt name

        def __getattr__(self, name: str) -> Any:
            if name == "intervention":
                raise _renamed("needs.intervention", "needs.interventions")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def join_needs(needs: Sequence[Needs]) -> Needs:
    """What several methods need together; every statistic and every intervention once, in the order of the methods.

    Raises:
        SayoError: P15 when they disagree on what holds for a whole pass.
    """
    # Only methods that map boxes to tokens decide how they are mapped.
    coverage = next((n.statistics.coverage for n in needs if n.boxes), needs[0].statistics.coverage)
    requests = [n.statistics if n.boxes else dataclasses.replace(n.statistics, coverage=coverage) for n in needs]
    return Needs(
        statistics=union(requests),
        interventions=tuple(i for n in needs for i in n.interventions),
        correctness=any(n.correctness for n in needs),
        boxes=any(n.boxes for n in needs),
        packages=tuple(dict.fromkeys(p for n in needs for p in n.packages)),
        reported=tuple({r.name: r for n in needs for r in n.reported}.values()),
    )


@dataclass(frozen=True)
class Signals:
    """What the log-prob pass of the rollout policy measured on a batch. Detached float32, in the batch's order of rows.

    Attributes:
        response_mask: [B, T], 1 on the response's own tokens.
        entropy: [B, T] in nats, of the distribution that sampled token t.
        log_probs: [B, T] in nats, of token t under the policy that sampled it, recomputed by the trainer.
        statistics: those that the method needs -> [B, T], or [B, T, W] for statistics of several values per token.
        image_tokens: [B] number of visual tokens of the row (0: no image).
        region_tokens: [B] number of visual tokens in the target region (0: no box).
        is_padding: [B] bool, synthetic rows that verl appends to make the batch divisible.
        uid: B names of prompts; rows of one prompt are a group, wherever they stand.
        counterfactuals: those interventions that the method needs -> [B, T] as ``log_probs``, of the same tokens after
            the changed image.
        correct: [B] in [0, 1], ``acc`` of the reward function; None if no method needs it.
        reports: name of each field of ``Needs.reported`` -> B values; None for padding rows.
    """

    response_mask: torch.Tensor
    entropy: torch.Tensor
    log_probs: torch.Tensor
    statistics: Mapping[Statistic, torch.Tensor]
    image_tokens: torch.Tensor
    region_tokens: torch.Tensor
    is_padding: torch.Tensor
    uid: tuple[str, ...]
    counterfactuals: Mapping[Intervention, torch.Tensor] = field(default_factory=dict)
    correct: torch.Tensor | None = None
    reports: Mapping[str, tuple[str | float | None, ...]] = field(default_factory=dict)

    def __getitem__(self, statistic: Statistic) -> torch.Tensor:
        """A statistic's values.

        Raises:
            SayoError: A10 when it was not measured, or for a name instead of a ``Statistic``.
        """
        if not isinstance(statistic, Statistic):
            raise _no_signal(f"signals[{statistic!r}]")
        if statistic not in self.statistics:
            raise SayoError(
                "A10",
                "a method reads a statistic that was not measured",
                where=f"statistic {statistic.key}",
                got=[s.key for s in self.statistics],
                fix="name it in the method's needs()",
            )
        return self.statistics[statistic]

    def counterfactual(self, intervention: Intervention) -> torch.Tensor:
        """[B, T] in nats: the log-probs of the same tokens after the image that the intervention changed.

        Raises:
            SayoError: A10 when it was not measured.
        """
        if intervention not in self.counterfactuals:
            raise SayoError(
                "A10",
                "a method reads the log-probs of a changed image that was not measured",
                where=f"intervention {getattr(intervention, 'key', intervention)}",
                got=[i.key for i in self.counterfactuals],
                fix="name it in interventions of the method's needs()",
            )
        return self.counterfactuals[intervention]

    def required(self, name: str) -> torch.Tensor:
        """``correct``, which is measured only if ``needs()`` names it.

        Raises:
            SayoError: A10 if it was not measured, or for another name; A19 for a renamed one.
        """
        optional = {"correct": self.correct}
        if name in RENAMED:
            raise _renamed(f"signals.required({name!r})", f"signals.{RENAMED[name]}")
        if name not in optional:
            raise _no_signal(f"signals.required({name!r})")
        value = optional[name]
        if value is None:
            raise SayoError(
                "A10",
                "a method reads a signal that was not measured",
                where=f"signals.{name}",
                fix="name it in the method's needs()",
            )
        return value

    def reported(self, name: str) -> tuple[str | float | None, ...]:
        """B values of a field that the reward function reports; None for padding rows.

        Raises:
            SayoError: A10 if ``needs()`` does not name it.
        """
        if name not in self.reports:
            raise SayoError(
                "A10",
                "a method reads a field of the reward function that was not fetched",
                where=f"signals.reported({name!r})",
                got=sorted(self.reports),
                fix="name it in the method's needs(): Needs(..., reported=(Reported(name, example),))",
            )
        return self.reports[name]

    if not TYPE_CHECKING:  # a type checker still finds a misspelt name

        def __getattr__(self, name: str) -> Any:
            """Say the new name of a renamed method, and how a statistic is read.

            Raises:
                SayoError: A19, A10.
            """
            if name in RENAMED:
                raise _renamed(f"signals.{name}", f"signals.{RENAMED[name]}")
            if name in CATALOGUE:
                raise _no_signal(f"signals.{name}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def neutral_reasons(self, *, boxes: bool = True) -> dict[str, torch.Tensor]:
        """Why a row cannot carry a visual term: reason -> bool [B]. A row has at most one, the first that fits.

        Args:
            boxes: whether the term needs a target region.
        """
        reasons: dict[str, torch.Tensor] = {}
        taken = torch.zeros_like(self.is_padding)
        for name, hit in (
            ("padding", self.is_padding),
            ("masked", ~self.response_mask.bool().any(-1)),
            ("no_image", self.image_tokens == 0),
            *([("no_box", self.region_tokens == 0)] if boxes else []),
        ):
            reasons[name] = hit & ~taken
            taken = taken | hit
        return reasons

    def eligible_rows(self, *, boxes: bool = True) -> torch.Tensor:
        """bool [B]: the rows that can carry a visual term, which have none of the ``neutral_reasons``."""
        return ~torch.stack(list(self.neutral_reasons(boxes=boxes).values())).any(0)

    def check(self) -> None:
        """Assert shapes, presence and finiteness where a method will read.

        Raises:
            SayoError: A02 for a shape that does not fit, A03 for a number that is not finite or out of range.
        """
        B, T = self.response_mask.shape
        per_row = {name: getattr(self, name) for name in ("image_tokens", "region_tokens", "is_padding")}
        per_token = {"entropy": self.entropy, "log_probs": self.log_probs}
        per_token |= {s.key: values for s, values in self.statistics.items()}
        per_token |= {log_probs_key(i): values for i, values in self.counterfactuals.items()}
        if self.correct is not None:
            per_row["correct"] = self.correct
        for name, told in self.reports.items():
            if len(told) != B:
                raise SayoError(
                    "A02",
                    f"the reported field {name} does not have one value per row",
                    where=f"signals of {B} rows",
                    got=len(told),
                    wanted=B,
                    fix="this is a defect of sayo-verl or a changed verl; run `sayo doctor` and report both",
                )
        for tensors, shape in ((per_row, (B,)), (per_token, (B, T))):
            for name, tensor in tensors.items():
                if tuple(tensor.shape[: len(shape)]) != shape:
                    raise SayoError(
                        "A02",
                        f"the statistic {name} does not have the shape of the batch",
                        where=f"signals of {B} rows, {T} response tokens",
                        got=tuple(tensor.shape),
                        wanted=shape,
                        fix="this is a defect of sayo-verl or a changed verl; run `sayo doctor` and report both",
                    )
        valid = self.response_mask.bool() & ~self.is_padding[:, None]
        on_image = valid & (self.image_tokens > 0)[:, None]
        _check_range("entropy", self.entropy, valid, 0.0, float("inf"))
        _check_range("log_probs", self.log_probs, valid, float("-inf"), 0.0)
        for intervention, values in self.counterfactuals.items():
            _check_range(log_probs_key(intervention), values, on_image, float("-inf"), 0.0)
        if self.correct is not None:
            _check_range("correct", self.correct, ~self.is_padding, 0.0, 1.0)
        for statistic, values in self.statistics.items():
            spec, of = statistic.spec, f"{statistic.key} (layer {', '.join(map(str, statistic.layers))})"
            _check_range(of, values, on_image, spec.low, spec.high)


def _renamed(where: str, wanted: str) -> SayoError:
    return SayoError(
        "A19",
        "a method uses a name of an earlier version",
        where=where,
        wanted=wanted,
        fix="rename it in your method's file",
    )


def _no_signal(where: str) -> SayoError:
    return SayoError(
        "A10",
        "there is no such signal",
        where=where,
        wanted="signals[Statistic(...)] for a statistic, signals.counterfactual(Intervention(...)), "
        'signals.required("correct"), or signals.entropy and the other attributes',
        fix='read a statistic with the object that needs() names, such as signals[Statistic("image_mass")]',
    )


def _check_range(name: str, values: torch.Tensor, read: torch.Tensor, low: float, high: float) -> None:
    """Check the numbers that a method reads.

    Args:
        values: [B, ...].
        read: bool [B] or [B, T], which of them.

    Raises:
        SayoError: A03; its ``row`` is the first row with such a number.
    """
    slack = 1e-3  # softmax in float32 over long rows; bf16 models round entropy below zero
    outside = ~torch.isfinite(values) | (values < low - slack) | (values > high + slack)
    bad = outside & read.reshape(*read.shape, *[1] * (values.ndim - read.ndim))
    if not bad.any():
        return
    at = bad.nonzero()
    token = f", response token {int(at[0, 1])}" if bad.ndim > 1 else ""
    rows = len(set(at[:, 0].tolist()))
    error = SayoError(
        "A03",
        f"{len(at)} of {int(read.sum()) * bad[0].numel() // read[0].numel()} values of {name} are not finite or out of "
        "range",
        where=f"row {int(at[0, 0])} of the batch{token}; {rows} such rows",
        got=values[bad][:3].tolist(),
        wanted=f"finite, in [{low}, {high}]",
        fix="a NaN here is a row that the probe never computed or a policy that diverged; look at "
        "actor/grad_norm and lower the learning rate, or report the batch",
    )
    error.row = int(at[0, 0])
    raise error
