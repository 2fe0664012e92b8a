"""A run is compared with the checkpoint that it resumes, before anything is loaded.

verl resumes a checkpoint of any other run without a word.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.checkpoints import FINGERPRINT, SCHEMA
from sayo_verl.launch.fingerprint import COMPARED, ESTIMATOR, MODEL, fingerprint_of, settings_of
from sayo_verl.launch.fingerprint_files import comparable
from sayo_verl.launch.resume import start_of

NAMES = (*COMPARED, "fingerprint")  # of sayo.resume_anyway
MOST = 8  # differences named of each kind
LONGEST = 70  # characters of a value in a message


def place_fingerprint(config: DictConfig, *, defaults: DictConfig | None = None, dry_run: bool = False) -> str:
    """Compare a run with the checkpoint that it resumes, and put its own record into ``sayo.fingerprint``.

    Args:
        config: the checked configuration, before the launcher changes it for verl.
        defaults: the configuration without a command line; a setting that the checkpoint does not know may have its
            default.
        dry_run: compare only, and only what is on this machine.

    Returns:
        Differences that are allowed, for the plan; empty if there are none.

    Raises:
        SayoError: L94 for a checkpoint of another run, L95 for a record that is missing, damaged or too new, L96 for an
            invalid ``sayo.resume_anyway``.
    """
    accepted = _accepted(config)
    start = start_of(config)
    if start is None and (dry_run or int(config.trainer.save_freq) <= 0):
        return ""
    now = fingerprint_of(config)
    remark = "" if start is None else _compare(start, now, accepted, dict(settings_of(defaults)) if defaults else {})
    if not dry_run:
        with open_dict(config):
            config.sayo.fingerprint = json.dumps(now)
    return remark


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key old -> new`` of values that differ; what was not found on one of the machines is not compared."""
    keys = sorted(comparable(old, new), key=lambda key: (key != ESTIMATOR, key))
    pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    return [f"{key} {_short(was)} -> {_short(now)}" for key, was, now in pairs if was != now]


def _accepted(config: DictConfig) -> tuple[str, ...]:
    given = config.sayo.get("resume_anyway")
    names = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    names = [] if names is None else names
    wrong = next((str(name) for name in names if name not in NAMES), None) if isinstance(names, list) else str(names)
    if wrong is None:
        return tuple(str(name) for name in names)
    raise SayoError(
        "L96",
        f"not a list of known differences{did_you_mean(wrong, NAMES)}",
        where="sayo.resume_anyway",
        got=wrong,
        wanted=f"of {', '.join(NAMES)}",
        fix="write it as in sayo.resume_anyway=[data]",
    )


def _compare(start: Path, now: Mapping[str, Any], accepted: tuple[str, ...], defaults: Mapping[str, Any]) -> str:
    """What differs from the record beside ``start`` and may."""
    if "fingerprint" in accepted:
        return "; not compared with its fingerprint (sayo.resume_anyway)"
    before = _read(start)
    found, unknown = {}, []
    for name, new in now["compared"].items():
        old = before["compared"].get(name, {})
        if old.get(ESTIMATOR) != new.get(ESTIMATOR):  # settings of one method alone say nothing more
            old, new = ({key: value for key, value in side.items() if key in old and key in new} for side in (old, new))
        added = [key for key in new if key not in old and key in defaults and defaults[key] == new[key]]
        unknown += [f"{key} {_short(new[key])}" for key in added]
        new = {key: value for key, value in new.items() if key not in added}
        if listed := differences(old, new):
            found[name] = listed
    if refused := [name for name in found if name not in accepted]:
        listing = "; ".join(f"{name}: {_list(found[name])}" for name in refused)
        no_effect = " (verl restores the saved optimizer: a new value would have no effect)"
        raise SayoError(
            "L94",
            "the checkpoint belongs to a run with other settings or files",
            where=str(start / FINGERPRINT),
            got=listing + (no_effect if "optimizer" in refused else ""),
            wanted="what the checkpoint was saved with",
            fix=f"correct it; or accept it: sayo.resume_anyway=[{','.join([*accepted, *refused])}]; or begin a new run "
            f"(OUT=...) from saved Hugging Face weights: {MODEL}.path={start}/actor/huggingface",
        )
    remarks = [f"{name} differ as accepted: {_list(listed)}" for name, listed in found.items()]
    if unknown:
        remarks.append(f"defaults that the checkpoint does not know: {_list(unknown)}")
    if changed := differences(before["said"], now["said"]):
        remarks.append(f"changed: {_list(changed)}")
    return "".join(f"; {remark}" for remark in remarks)


def _read(start: Path) -> dict[str, Any]:
    """The record beside a checkpoint."""
    file = start / FINGERPRINT
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise _unusable(
            file, "this checkpoint has no fingerprint, so it may be of another run", "no such file"
        ) from error
    except OSError as error:
        raise _unusable(file, "the fingerprint cannot be read", error.strerror) from error
    except ValueError as error:
        raise _unusable(file, "the fingerprint is damaged", error) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise _unusable(file, "the fingerprint is damaged", f"schema {schema!r}", SCHEMA)
    if schema > SCHEMA:
        raise _unusable(file, "the fingerprint is of a newer sayo-verl", f"schema {schema}", f"{SCHEMA} or older")
    parts = [record.get("compared"), record.get("said")]
    flat = [part for part in parts if isinstance(part, dict)]
    if len(flat) < 2 or not all(isinstance(of_name, dict) for of_name in flat[0].values()):
        raise _unusable(file, "the fingerprint is damaged", "no settings")
    if record.get("step") != int(start.name.rpartition("_")[2]):
        raise _unusable(file, "the fingerprint is of another checkpoint", f"step {record.get('step')!r}", start.name)
    return dict(record)


def _unusable(file: Path, what: str, got: object, wanted: object = None) -> SayoError:
    """L95: a checkpoint has no fingerprint that can be compared."""
    return SayoError(
        "L95",
        what,
        where=str(file),
        got=got,
        wanted=wanted,
        fix="resume another checkpoint (trainer.resume_mode=resume_path), or, if you know that method, data and model "
        "are the same, sayo.resume_anyway=[fingerprint]",
    )


def _list(found: list[str]) -> str:
    return ", ".join(found[:MOST]) + (f" and {len(found) - MOST} more" if found[MOST:] else "")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
