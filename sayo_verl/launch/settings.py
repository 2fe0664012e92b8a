"""Settings of the methods: from their classes into ``algorithm.attn``, and from the configuration into a method.

Every method is a frozen dataclass whose fields are its settings and whose defaults are vetted. Hydra composes
``algorithm.attn`` from these classes, so each default is in its class alone. No lower module reads ``algorithm.attn``.
"""

import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.method_check import own_code
from sayo_verl.methods import METHODS, PREFIX, RESERVED, Method, Mix
from sayo_verl.methods.group import SPREAD_FLOOR
from sayo_verl.report.causes import describe_exception


@dataclass(frozen=True)
class AttnSettings:
    """The settings in ``algorithm.attn``.

    Attributes:
        method: the run's method; None for an estimator of verl's own.
        spread_floor: see ``sayo_verl.methods.group``; None keeps verl's arithmetic.
    """

    method: Method | None
    spread_floor: float | None


def register_defaults() -> None:
    """Give Hydra the config ``attn_defaults``, which ``sayo_trainer.yaml`` starts from: every default, by method.

    New keys are allowed below ``algorithm.attn``, so that a user's own method needs no ``+``. Hydra therefore does not
    refuse a misspelt key here; ``settings_from_config`` does, and suggests the right one.
    """
    methods = {name.removeprefix(PREFIX): dataclasses.asdict(cls()) for name, cls in METHODS.items()}  # type: ignore[call-overload]
    attn = OmegaConf.create({"mix": [], "spread_floor": SPREAD_FLOOR, **methods}, flags={"struct": False})
    ConfigStore.instance().store("attn_defaults", OmegaConf.create({"algorithm": {"attn": attn}}))


def load_methods(modules: Sequence[str]) -> list[str]:
    """Import the modules or .py files that register a user's own methods.

    Args:
        modules: ``sayo.modules``.

    Returns:
        The same list with absolute paths of files, for other processes on this file system.

    Raises:
        SayoError: L29 for one that is missing or cannot be imported.
    """
    if isinstance(modules, str):
        raise SayoError(
            "L29",
            "sayo.modules is not a list",
            where="sayo.modules",
            got=modules,
            wanted="such as [recipe/example/reliance.py]",
            fix="write it as a list",
        )
    found = []
    for name in modules or ():
        try:
            if name.endswith(".py"):
                found.append(str(Path(name).expanduser().resolve()))
                _load_file(found[-1])
            else:
                found.append(name)
                importlib.import_module(name)
        except SayoError:  # of register_method
            raise
        except Exception as error:  # the user's code
            said, place = describe_exception(error)
            known = isinstance(error, ImportError | OSError | SyntaxError)
            raise SayoError(
                "L29",
                "a module with a user's method cannot be loaded",
                where="sayo.modules",
                got=f"{name}: {error if known else f'{said} at {place}'}",
                wanted="an importable module or the path of a .py file",
                fix="correct it; see docs/add_a_method.md",
            ) from error
    return found


def _load_file(path: str) -> None:
    """Execute a file as a module, once in a process."""
    name = "sayo_user_method_" + hashlib.sha256(path.encode()).hexdigest()[:12]
    if name in sys.modules:
        return
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # there is a loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def method_from_config(adv_estimator: str, attn: Mapping[str, Any]) -> Method | None:
    """The method that ``algorithm.adv_estimator`` names, with its settings; None for an estimator of verl's own."""
    return settings_from_config(adv_estimator, attn).method


def settings_from_config(adv_estimator: str, attn: Mapping[str, Any]) -> AttnSettings:
    """Read ``algorithm.attn``.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        attn: ``algorithm.attn`` as plain containers: node name -> settings, ``mix``, ``spread_floor``. A missing key
            has its default.

    Raises:
        SayoError: L02 for an unknown node or key, L03 for a value of the wrong type, A05 for a value that a setting
            cannot have, A12 for an invalid mix or one without effect, L72 for an exception in a user's own method. The
            settings of every method are checked, whichever runs.
    """
    nodes = [name.removeprefix(PREFIX) for name in METHODS]
    for node in attn:
        if node not in (*nodes, *RESERVED):
            raise SayoError(
                "L02",
                f"unknown settings node {node!r}{did_you_mean(node, (*nodes, *RESERVED))}",
                where="algorithm.attn",
                wanted=", ".join((*nodes, *RESERVED)),
                fix="remove it or correct its name",
            )
    methods = {
        name: _build(cls, attn.get(node, {}), f"algorithm.attn.{node}")
        for node, (name, cls) in zip(nodes, METHODS.items(), strict=True)
    }
    floor = attn.get("spread_floor", SPREAD_FLOOR)
    if floor is not None and (isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < 1):
        raise SayoError(
            "L03",
            "invalid spread floor",
            where="algorithm.attn.spread_floor",
            got=repr(floor),
            wanted="null or a number in [0, 1)",
            fix="leave it at its default",
        )
    mix = [] if attn.get("mix") is None else attn["mix"]
    if not isinstance(mix, list | tuple):
        raise SayoError(
            "L03",
            "not a list of methods",
            where="algorithm.attn.mix",
            got=repr(mix),
            wanted="such as [region,dual]",
            fix="write it as a list",
        )
    if mix and adv_estimator != Mix.name:
        raise SayoError(
            "A12",
            "a mix has no effect under this estimator",
            where="algorithm.attn.mix",
            got=list(mix),
            fix=f"set algorithm.adv_estimator={Mix.name}, or algorithm.attn.mix=[]",
        )
    if adv_estimator == Mix.name:
        for node in mix:
            if node not in nodes:
                raise SayoError(
                    "L02",
                    f"unknown method {node!r} in the mix{did_you_mean(str(node), nodes)}",
                    where="algorithm.attn.mix",
                    wanted=", ".join(nodes),
                    fix="name the methods without attn_",
                )
        parts = tuple(methods[PREFIX + node] for node in mix)
        with own_code([type(part) for part in parts], "in needs() or gives"):
            return AttnSettings(Mix(parts), floor)
    return AttnSettings(methods.get(adv_estimator), floor)


def unused_settings(adv_estimator: str, attn: Mapping[str, Any], given: Collection[str] = ()) -> list[str]:
    """Settings of methods that do not run. Files may set them: one file of a job serves several methods.

    Args:
        adv_estimator: value of ``algorithm.adv_estimator``.
        attn: ``algorithm.attn``, as ``settings_from_config`` accepts it. It holds the defaults of every method, so a
            setting counts if its value differs from its default.
        given: keys of the command line.

    Returns:
        ``node.key=value`` of those that a file sets.

    Raises:
        SayoError: L71 for one that the command line sets.
    """
    prefix = "algorithm.attn."
    used = {PREFIX + node for node in attn.get("mix") or ()} if adv_estimator == Mix.name else {adv_estimator}
    of_files = []
    for name, cls in METHODS.items():
        if name in used:
            continue
        node = name.removeprefix(PREFIX)
        for key in sorted(given):
            if key.startswith(f"{prefix}{node}."):
                raise _unused(key, adv_estimator, f"{name}, or {Mix.name} with {node} in algorithm.attn.mix")
        values, default = vars(_build(cls, attn.get(node, {}), prefix + node)), vars(_build(cls, {}, ""))
        of_files += [f"{node}.{key}={value}" for key, value in values.items() if repr(value) != repr(default[key])]
    if adv_estimator not in (*METHODS, Mix.name) and f"{prefix}spread_floor" in given:
        raise _unused(f"{prefix}spread_floor", adv_estimator, f"one of {', '.join((*METHODS, Mix.name))}")
    return of_files


def _unused(where: str, adv_estimator: str, users: str) -> SayoError:
    return SayoError(
        "L71",
        "this setting has no effect under the estimator that runs",
        where=where,
        got=f"algorithm.adv_estimator={adv_estimator}",
        wanted=users,
        fix="leave the setting out, or choose the estimator that uses it (METHOD=NAME in front of a script)",
    )


def _build(cls: Any, values: Any, where: str) -> Any:
    """A settings dataclass from a mapping of its fields, also of nested ones."""
    if not isinstance(values, Mapping):
        raise SayoError(
            "L03",
            "not a group of settings",
            where=where,
            got=repr(values),
            wanted="settings by name",
            fix=f"set {where}.<key> to a value",
        )
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise SayoError(
                "L02",
                f"unknown setting {key!r}{did_you_mean(key, known)}",
                where=where,
                wanted=", ".join(known),
                fix="remove it or correct its name",
            )
    with own_code([cls], "when it gets its settings"):
        return cls(**{key: _coerce(value, known[key], f"{where}.{key}") for key, value in values.items()})


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """A value of the declared type. YAML has no tuples and writes 1 for 1.0; other types are refused."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.GenericAlias) and hint == tuple[int, ...]:
        if isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return tuple(value)
        raise SayoError(
            "L03",
            "not a list of whole numbers",
            where=where,
            got=repr(value),
            wanted="such as [-1]",
            fix="write it as [-1] for the last layer",
        )
    if hint in (str, bool, int) and type(value) is hint:
        return value
    raise SayoError(
        "L03",
        "wrong type of value",
        where=where,
        got=repr(value),
        wanted=getattr(hint, "__name__", str(hint)),
        fix=f"set {where} to a value of that type; a field of a method is a float, int, bool, str or tuple[int, ...]",
    )


register_defaults()  # at import: Hydra composes before any function of this module is called
