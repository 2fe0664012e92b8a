"""What the launcher recorded of a run: run.json, and the composed configuration in run.yaml beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from sayo_verl.errors import SayoError
from sayo_verl.redact import redact_override, redact_values

RUN_FILE = "run.json"
UNKNOWN = "unknown"
# Fields of run.json that are not texts: name, type, value if it is absent.
FIELDS: tuple[tuple[str, type, Any], ...] = (
    ("total_steps", int, None),
    ("versions", dict, {}),
    ("overrides", list, []),
    ("methods", dict, {}),
    ("data", dict, {}),
    ("ended", dict, {}),
)


def run_card(metrics: Path) -> Path:
    """The launcher's record of the attempt that writes ``metrics``, such as run-2.json for metrics-2.jsonl."""
    stem = metrics.stem.removeprefix("metrics") if metrics.stem.startswith("metrics") else f"-{metrics.stem}"
    return metrics.with_name(f"run{stem}.json")


def load_launch(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Read run.json.

    Returns:
        Its fields of ``Run``, and notes.

    Raises:
        SayoError: R04 if it is damaged.
    """
    record: Any = {}
    notes = []
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"no {file.name}: run id, estimator and versions are unknown")
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(record, dict):
        raise _damaged(file, type(record).__name__)
    launch: dict[str, Any] = {name: str(record.get(name, UNKNOWN)) for name in ("run_id", "estimator", "started")}
    for name, kind, absent in FIELDS:
        value = launch[name] = record.get(name, absent)
        if value is not absent and not isinstance(value, kind):
            raise _damaged(file, f"{name}: {value!r}")
    # once more: older versions wrote secrets
    launch["overrides"] = [redact_override(str(override)) for override in launch["overrides"]]
    return launch, notes


def load_config(metrics: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of an attempt: dotted key -> value. Interpolations are not resolved.

    Without run.yaml, which old runs lack, it is what the overrides of the command line set.

    Raises:
        SayoError: R04 if run.yaml is damaged.
    """
    file = run_card(metrics).with_suffix(".yaml")
    if not file.exists():
        pairs = (override.lstrip("+").partition("=") for override in overrides if "=" in override)
        return {key: redact_values(value, key) for key, _, value in pairs}
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error
    if not isinstance(config, dict):
        raise _damaged(file, type(config).__name__)
    return dict(_flat(redact_values(config)))


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _damaged(file: Path, got: object) -> SayoError:
    return SayoError(
        "R04", "the launcher's record is damaged", where=str(file), got=got, fix="delete it; the run is then 'unknown'"
    )
