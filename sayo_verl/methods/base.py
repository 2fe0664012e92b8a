"""What a method is: signals in, credit out.

A method names what it needs (``needs``) and turns what was measured into credit (``credit``): terms that are added to
the task reward, a factor per token, a factor per trajectory, a bonus per token. ``sayo_verl.methods.group`` computes
advantages from the credit of any method, so methods compose by listing them (``sayo_verl.methods.mix``).

Shape suffixes: B rows (one response each), T response tokens (padded on the right).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods.signals import Needs, Signals

# A term of the reward, a factor per token, a factor per trajectory, a number that is added per token.
CreditKind = Literal["reward", "token", "trajectory", "bonus"]
# Setting -> (whether its value is right, what it must be).
Rules = dict[str, tuple[bool, str]]


@dataclass(frozen=True)
class RewardTerm:
    """One number per response that joins the task reward before group normalisation.

    Attributes:
        name: as in ``sayo/<name>/mean``.
        value: [B]; read only where ``valid``.
        valid: [B] bool; other rows are neutral: left out of the term and of its group statistics.
        weight: strength; a term of weight 0 is not applied at all.
    """

    name: str
    value: torch.Tensor
    valid: torch.Tensor
    weight: float


@dataclass(frozen=True)
class TokenBonus:
    """A number per token that is added to its advantage, after the group advantage and all factors.

    Attributes:
        value: [B, T], of any sign; read only inside the response mask; 0 adds nothing, bit for bit, and is the value of
            neutral rows.
        relative: ``value`` is in units of abs(A_i), the size of the response's group advantage before factors, so the
            bonus is 0 in a group without contrast. If false, ``value`` is added as it is.
        protect_sign: the bonus changes the size of a token's advantage and never its sign: it stops at 0, and a token
            whose advantage is 0 without it keeps 0.
    """

    value: torch.Tensor
    relative: bool = False
    protect_sign: bool = False


@dataclass(frozen=True)
class Credit:
    """What a method makes of a batch.

    Attributes:
        terms: of the reward.
        token_weight: [B, T] >= 0, factor on the advantage of each token; read only inside the response mask; exactly 1
            on neutral rows. None: no factor, and nothing is multiplied.
        trajectory_weight: [B] >= 0, factor on the advantage of each response; exactly 1 on neutral rows. None as above.
        metrics: scalars to log, without the prefix ``sayo/``; NaN is refused.
        bonuses: per token, see ``TokenBonus``; those of several methods add up.
    """

    terms: tuple[RewardTerm, ...] = ()
    token_weight: torch.Tensor | None = None
    trajectory_weight: torch.Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bonuses: tuple[TokenBonus, ...] = ()


class Method(Protocol):
    """One way to assign credit. Implementations are frozen dataclasses, one file each, torch only.

    The fields of the dataclass are the method's settings, at ``algorithm.attn.<node>``, where the node is the name
    without ``attn_``. Their defaults stand here alone, and docs/settings.md is made from what ``Attributes`` says
    of them.

    Two class attributes say how the method is shown; a method of your own may leave them out:

    - ``metrics``: ``Metric`` and ``Panel`` of ``sayo_verl.metrics``, one for each name in ``Credit.metrics``;
    - ``reference``: the name of the method and of its paper, such as ``("SAYO", "arXiv 2602.08241")``.
    """

    @property
    def name(self) -> str:
        """Value of ``algorithm.adv_estimator``, ``attn_<node>``."""
        ...

    @property
    def gives(self) -> frozenset[CreditKind]:
        """What ``credit`` will hold under these settings; empty at strength zero, where the run is GRPO."""
        ...

    def needs(self) -> Needs:
        """What must be measured."""
        ...

    def credit(self, signals: Signals) -> Credit:
        """Pure: reads ``signals``, mutates nothing. Metrics are given at strength zero too."""
        ...


def check_setting(node: str, settings: Any, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse values that a setting cannot have; for a method's ``__post_init__``.

    Args:
        node: below ``algorithm.attn``.
        settings: the dataclass.
        rules: setting -> (whether its value is right, what it must be).

    Raises:
        SayoError: A05 for the first that is not.
    """
    for key, (right, wanted) in rules.items():
        if not right:
            where, value = f"algorithm.attn.{node}.{key}", getattr(settings, key)
            raise SayoError(
                "A05",
                f"{key} is not one of the choices" if isinstance(value, str) else f"{key} is out of range",
                where=where,
                got=value,
                wanted=wanted,
                fix=f"set {where} to {wanted}",
            )


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a part of a credit that does not fit the batch; A02."""
    if tuple(tensor.shape) != shape:
        raise SayoError(
            "A02",
            f"the {name} does not have the shape of the batch",
            where="advantages",
            got=tuple(tensor.shape),
            wanted=shape,
            fix="correct the method's credit()",
        )


def distinct_layers(layers: tuple[int, ...]) -> tuple[bool, str]:
    """The rule for a setting that names decoder layers."""
    return len(layers) > 0 and len(set(layers)) == len(layers), "distinct layer numbers"


def finite_metrics(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    """Check a method's metrics and return them unchanged.

    Raises:
        SayoError: A03 for a metric that is not finite.
    """
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise SayoError(
                "A03",
                f"the metric {key} is not finite",
                where=name,
                got=value,
                wanted="a finite number",
                fix="leave a metric out when it has no values to average",
            )
    return dict(metrics)


def masked_mean(per_token: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B], mean over the selected tokens; 0 for a row with none. Values elsewhere may be NaN."""
    kept = torch.where(selected, per_token, torch.zeros_like(per_token))
    return kept.sum(-1) / selected.sum(-1).clamp(min=1)


def blend(weight: torch.Tensor, strength: float) -> torch.Tensor:
    """``1 + strength (weight - 1)``: strength 0 is no weight, 1 the method's own."""
    return weight if strength == 1.0 else 1.0 + strength * (weight - 1.0)
