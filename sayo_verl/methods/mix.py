"""Several methods at once: ``algorithm.adv_estimator=attn_mix`` with ``algorithm.attn.mix=[region, dual]``.

Reward terms add up before group normalisation, and token bonuses after it. At most one method may set factors per
token and one factors per trajectory: the product of two such weightings has no paper, and its mean is no longer one.
"""

from dataclasses import dataclass

from sayo_verl.errors import SayoError
from sayo_verl.methods.base import Credit, CreditKind, Method
from sayo_verl.methods.signals import Needs, Signals, join_needs


@dataclass(frozen=True)
class Mix:
    """Methods that act together.

    Attributes:
        methods: each with its own settings, no two of a kind.

    Raises:
        SayoError: A12 for a mix that makes no sense, P15 for parts that need different passes.
    """

    methods: tuple[Method, ...]
    name = "attn_mix"

    def __post_init__(self) -> None:
        names = [method.name.removeprefix("attn_") for method in self.methods]
        where = "algorithm.attn.mix"
        if not names or len(set(names)) < len(names):
            raise SayoError(
                "A12",
                "a mix is one or more different methods",
                where=where,
                got=names,
                fix="such as algorithm.attn.mix=[region,dual]",
            )
        for kind in ("token", "trajectory"):
            givers = [name for name, method in zip(names, self.methods, strict=True) if kind in method.gives]
            if len(givers) > 1:
                raise SayoError(
                    "A12",
                    f"two methods weight each {kind}; the product of their weights has neither a paper nor mean one",
                    where=where,
                    got=givers,
                    wanted="at most one",
                    fix=f"leave one out, or take its weights away (such as algorithm.attn.{givers[-1]}.strength=0)",
                )
        self.needs()

    @property
    def gives(self) -> frozenset[CreditKind]:
        return frozenset(kind for method in self.methods for kind in method.gives)

    def needs(self) -> Needs:
        return join_needs([method.needs() for method in self.methods])

    def credit(self, signals: Signals) -> Credit:
        parts = [method.credit(signals) for method in self.methods]
        metrics: dict[str, float] = {}
        for part in parts:
            twice = sorted(metrics.keys() & part.metrics.keys())
            if twice:
                raise SayoError(
                    "A12",
                    "two methods log a metric of the same name",
                    where="algorithm.attn.mix",
                    got=twice,
                    fix="rename it in the method that is yours",
                )
            metrics |= part.metrics
        token = [part.token_weight for part in parts if part.token_weight is not None]
        trajectory = [part.trajectory_weight for part in parts if part.trajectory_weight is not None]
        return Credit(
            terms=tuple(term for part in parts for term in part.terms),
            token_weight=token[0] if token else None,
            trajectory_weight=trajectory[0] if trajectory else None,
            bonuses=tuple(bonus for part in parts for bonus in part.bonuses),
            metrics=metrics,
        )
