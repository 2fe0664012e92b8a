"""The methods, by the value of ``algorithm.adv_estimator`` that selects them. One file each, torch only.

A method of your own joins with ``register_method``; see docs/add_a_method.md.
"""

import dataclasses

from sayo_verl.errors import SayoError
from sayo_verl.methods.anchor import AnchorMethod
from sayo_verl.methods.base import Credit, Method, RewardTerm, TokenBonus
from sayo_verl.methods.dual import DualConfig, DualMethod, dual_grained_factors
from sayo_verl.methods.evidence import EvidenceMethod
from sayo_verl.methods.faithful import FaithfulMethod
from sayo_verl.methods.group import added_by_bonuses, advantages, group_advantage
from sayo_verl.methods.mix import Mix
from sayo_verl.methods.region import RegionMethod
from sayo_verl.methods.sensitivity import SensitivityMethod
from sayo_verl.methods.signals import Needs, Reported, Signals

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (RegionMethod, DualMethod, AnchorMethod, FaithfulMethod, SensitivityMethod, EvidenceMethod)
}
PREFIX = "attn_"
# Names below ``algorithm.attn`` that are not a method's node.
RESERVED = ("mix", "spread_floor")


def register_method(cls: type[Method]) -> type[Method]:
    """Register a method under its name; a decorator.

    Raises:
        SayoError: A14 for a class that is not a frozen dataclass with a name of its own that begins with ``attn_``.
    """
    name = getattr(cls, "name", None)
    node = str(name).removeprefix(PREFIX)
    frozen = dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    if not frozen or not str(name).startswith(PREFIX) or node in RESERVED or METHODS.get(str(name), cls) is not cls:
        raise SayoError(
            "A14",
            "this class cannot be registered as a method",
            where=f"{cls.__module__}.{cls.__qualname__}",
            got=f"name {name!r}, {'a' if frozen else 'not a'} frozen dataclass",
            wanted=f"a frozen dataclass whose name is {PREFIX}<node>, other than {', '.join([*METHODS, Mix.name])}",
            fix="see docs/add_a_method.md",
        )
    METHODS[str(name)] = cls
    return cls


def own_methods() -> dict[str, type[Method]]:
    """The registered methods that are not part of this package, but the user's own."""
    return {name: cls for name, cls in METHODS.items() if not cls.__module__.startswith("sayo_verl.")}


__all__ = [
    "METHODS",
    "AnchorMethod",
    "Credit",
    "DualConfig",
    "DualMethod",
    "EvidenceMethod",
    "FaithfulMethod",
    "Method",
    "Mix",
    "Needs",
    "RegionMethod",
    "Reported",
    "RewardTerm",
    "SensitivityMethod",
    "Signals",
    "TokenBonus",
    "added_by_bonuses",
    "advantages",
    "dual_grained_factors",
    "group_advantage",
    "own_methods",
    "register_method",
]
