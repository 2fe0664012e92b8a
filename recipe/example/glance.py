"""A reward for attention on the image: the smallest method that reads a statistic. It is an example, not a paper's."""

from dataclasses import dataclass

from sayo_verl.methods import Credit, Needs, RewardTerm, Signals, register_method
from sayo_verl.methods.base import check_setting, masked_mean
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

IMAGE_MASS = Statistic("image_mass", layers=(-1,))  # [B, T]; -1 is the last layer


@register_method
@dataclass(frozen=True)
class GlanceMethod:
    """``algorithm.adv_estimator=attn_glance``; ``weight`` 0 is GRPO."""

    weight: float = 0.1
    name = "attn_glance"

    def __post_init__(self) -> None:
        check_setting("glance", self, {"weight": (0 <= self.weight < float("inf"), "a finite number >= 0")})

    @property
    def gives(self) -> frozenset:
        return frozenset({"reward"} if self.weight else ())

    def needs(self) -> Needs:
        return Needs(StatisticsRequest((IMAGE_MASS,)))

    def credit(self, signals: Signals) -> Credit:
        eligible = signals.eligible_rows(boxes=False)  # [B], the rows with an image and a response
        value = masked_mean(signals[IMAGE_MASS], signals.response_mask.bool())  # [B]
        metrics = {"glance/mean": float(value[eligible].mean())} if eligible.any() else {}
        return Credit((RewardTerm("glance", value, eligible, self.weight),), metrics=metrics)
