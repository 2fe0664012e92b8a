"""Settings of a run's method, read once from ``algorithm.attn.*`` and checked before anything is loaded.

Every method is a frozen dataclass whose fields are its settings; its node in the configuration must hold exactly those
keys. Nothing below this module looks at the configuration again.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.methods import METHODS, RegionMethod

# The node below ``algorithm.attn`` that holds a method's settings.
NODES = {"attn_region": "region"}


def method_from_config(adv_estimator: str, attn: Mapping[str, Any]) -> RegionMethod | None:
    """The method that ``algorithm.adv_estimator`` names, with its settings; None for an estimator of verl's own.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        attn: ``algorithm.attn`` as plain containers (node name -> settings).

    Raises:
        SayoError: L02 for an unknown node or key, L03 for a value of the wrong type, A05 for one out of range.
    """
    for node in attn:
        if node not in NODES.values():
            raise SayoError(
                "L02",
                f"unknown settings node {node!r}{did_you_mean(node, NODES.values())}",
                where="algorithm.attn",
                wanted=", ".join(NODES.values()),
                fix="remove it or correct its name",
            )
    if adv_estimator not in METHODS:
        return None
    node = NODES[adv_estimator]
    cls, values = METHODS[adv_estimator], attn.get(node, {})
    if not isinstance(values, Mapping):
        raise SayoError("L03", "not a group of settings", where=f"algorithm.attn.{node}", got=repr(values),
                        wanted="settings by name", fix=f"set algorithm.attn.{node}.weight and the like")  # fmt: skip
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise SayoError(
                "L02",
                f"unknown setting {key!r}{did_you_mean(key, known)}",
                where=f"algorithm.attn.{node}",
                wanted=", ".join(known),
                fix="remove it or correct its name",
            )
    return cls(**{key: _coerce(value, known[key], f"algorithm.attn.{node}.{key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """A value of the type the field declares; YAML has no tuples and writes 1 for 1.0, anything else is refused."""
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.GenericAlias) and hint == tuple[int, ...]:
        if isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return tuple(value)
        raise SayoError("L03", "not a list of whole numbers", where=where, got=repr(value), wanted="such as [-1]",
                        fix="write it as [-1] for the last layer")  # fmt: skip
    if hint in (str, bool, int) and type(value) is hint:
        return value
    raise SayoError("L03", "wrong type of value", where=where, got=repr(value), wanted=hint.__name__,
                    fix=f"set {where} to a value of type {hint.__name__}")  # fmt: skip
