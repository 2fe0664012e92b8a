"""The channel from the trainer with attention to the estimator.

verl passes only rewards, response mask, config and uid to an estimator. The trainer therefore sets this context around
verl's own advantage computation, and the registered estimator reads it. Every process that imports verl registers the
estimators, so this module imports little.
"""

import dataclasses
import time
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods import METHODS, Credit, Method, Mix, Signals, added_by_bonuses, advantages
from sayo_verl.methods.base import finite_metrics
from sayo_verl.methods.group import group_rows


def timed_credit(method: Method, signals: Signals) -> tuple[Credit, float]:
    """Check the signals, compute the method's credit and return it with the seconds that both took."""
    start = time.perf_counter()
    signals.check()
    return method.credit(signals), time.perf_counter() - start


@dataclass
class AdvantageContext:
    """One step's signals for the estimator, and the estimator's results.

    Attributes:
        method: computes the credit.
        signals: of the batch, in its order of rows.
        norm_by_std: verl's ``algorithm.norm_adv_by_std_in_grpo``.
        spread_floor: see ``sayo_verl.methods.group``.
        ahead: ``timed_credit`` of these signals, started before verl's reference and value passes; None: not started.
        metrics: logged by the estimator.
        reward: [B], the task reward plus terms, set by the estimator.
    """

    method: Method
    signals: Signals
    norm_by_std: bool
    spread_floor: float | None
    ahead: Future[tuple[Credit, float]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reward: torch.Tensor | None = None

    def credit(self, response_mask: torch.Tensor) -> tuple[Signals, Credit]:
        """Return the method's credit under the mask that verl trains with.

        Rejection sampling may have masked tokens since the signals were fetched. The credit is then computed again.
        """
        start = time.perf_counter()
        if self.ahead is not None and torch.equal(self.signals.response_mask.bool(), response_mask.bool()):
            signals = self.signals
            credit, seconds = self.ahead.result()
        else:
            signals = dataclasses.replace(self.signals, response_mask=response_mask)
            credit, seconds = timed_credit(self.method, signals)
        self.metrics["credit_seconds"], self.metrics["credit_wait_seconds"] = seconds, time.perf_counter() - start
        return signals, credit


CURRENT: ContextVar[AdvantageContext | None] = ContextVar("sayo_advantage_context", default=None)


def make_estimator(name: str):
    """Return an estimator with verl's signature for the method called ``name``."""

    def estimator(
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        config: Any = None,
        index: Any = None,
        **_ignored: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context = CURRENT.get()
        if context is None or context.method.name != name:
            raise SayoError(
                "A01",
                f"{name} was called without the attention statistics of this step",
                where="algorithm.adv_estimator",
                got="no context" if context is None else f"a context of {context.method.name}",
                fix="launch with `python -m sayo_verl.main_ppo`, which selects the trainer that measures them",
            )
        signals = context.signals
        if index is None or signals.response_mask.shape != response_mask.shape:
            raise SayoError(
                "A02",
                "rewards and statistics do not describe the same batch",
                where=name,
                got=f"mask {tuple(response_mask.shape)}, statistics {tuple(signals.response_mask.shape)}, "
                f"uid {'absent' if index is None else 'present'}",
                fix="verl has changed; run the contract tests (pytest tests/hooks/test_contract.py) and report it",
            )
        group_rows(index)  # every row has a uid
        if signals.uid != tuple(map(str, index)):
            raise SayoError(
                "A02",
                "rewards and statistics are not in the same order of rows",
                where=name,
                got=f"uids {list(map(str, index))[:3]} ...",
                wanted=f"{list(signals.uid[:3])} ...",
                fix="verl has changed; run the contract tests (pytest tests/hooks/test_contract.py) and report it",
            )
        signals, credit = context.credit(response_mask)
        rows = (token_level_rewards.sum(dim=-1), response_mask, signals.uid, credit)
        options: dict[str, Any] = {"norm_by_std": context.norm_by_std, "spread_floor": context.spread_floor}
        advantage, reward = advantages(*rows, **options)
        context.metrics.update(finite_metrics(credit.metrics, name))
        for reason, hit in signals.neutral_reasons(boxes=context.method.needs().boxes).items():
            context.metrics[f"neutral_rows/{reason}"] = float(hit.sum())
        for kind, weight in (("token", credit.token_weight), ("trajectory", credit.trajectory_weight)):
            if weight is not None:  # mean factor on tokens or rows that count; 1 keeps the size of the step
                on = response_mask.bool() if kind == "token" else response_mask.bool().any(-1) & ~signals.is_padding
                context.metrics[f"{kind}_weight/mean"] = float(weight[on].mean()) if on.any() else 1.0
        added, on = added_by_bonuses(advantage, *rows, **options), response_mask.bool()
        if added is not None:
            context.metrics["token_bonus/mean"] = float(added[on].mean()) if on.any() else 0.0
            context.metrics["token_bonus/size"] = float(added[on].abs().mean()) if on.any() else 0.0
        context.reward = reward
        return advantage, advantage.clone()

    estimator.__name__ = estimator.__qualname__ = name
    return estimator


def register_estimators() -> None:
    """Register every method under its name; may be called more than once."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    for name in (*METHODS, Mix.name):
        if name not in ADV_ESTIMATOR_REGISTRY:
            register_adv_est(name)(make_estimator(name))
