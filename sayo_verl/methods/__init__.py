"""The methods, by the value of ``algorithm.adv_estimator`` that selects them. One file each, torch only."""

from sayo_verl.methods.base import Method, RewardTerm, Signals, group_advantage
from sayo_verl.methods.region import RegionMethod

METHODS: dict[str, type[RegionMethod]] = {RegionMethod.name: RegionMethod}

__all__ = ["METHODS", "Method", "RegionMethod", "RewardTerm", "Signals", "group_advantage"]
