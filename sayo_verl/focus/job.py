"""The values of a job of the anchoring stage: a yaml file, then ``KEY=VALUE`` of the command line.

The keys below ``respond``, ``train`` and ``report`` are the names of the flags of these steps of ``sayo focus``, with
underscores. ``FocusJob`` lists the other keys. ``sayo_verl.focus.run`` runs a job.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sayo_verl.data.folder import split_files
from sayo_verl.errors import SayoError
from sayo_verl.focus.config import FocusConfig, RespondConfig

# A yaml file may compute a value from others.
OmegaConf.register_new_resolver("sayo.product", lambda *factors: math.prod(factors), replace=True)
OmegaConf.register_new_resolver("sayo.quotient", lambda whole, parts: whole // parts, replace=True)
OmegaConf.register_new_resolver(
    "sayo.accumulation", lambda rows, gpus, batch_size: accumulation(rows, gpus or 1, batch_size), replace=True
)


@dataclass
class ReportStep:
    """Flags of ``sayo focus report``; those that ``train`` has too default to its values."""

    alpha: float = II("train.alpha")
    layers: tuple[int, ...] = II("train.layers")
    dtype: str = II("train.dtype")
    attention: str = II("train.attention")
    max_rows: int | None = None
    answers: bool = False


@dataclass
class FocusJob:
    """All values of a job.

    Attributes:
        base: model folder or hub name.
        data: folder of ``sayo prepare``; its training files and its first validation file are used.
        train_files, val_file: parquet files, in place of ``data``.
        out: new folder of the job.
        resume: folder of an interrupted job.
        gpus: processes of ``torchrun``, one per GPU of this machine; None: one process without ``torchrun``.
        sample: whether ``respond`` makes the texts to imitate; else the rows have a column ``response``.
        next_command: the command of the reinforcement stage, without the model and the data.
    """

    base: str = MISSING
    data: str | None = None
    train_files: list[str] = field(default_factory=list)
    val_file: str | None = None
    out: str | None = None
    resume: str | None = None
    gpus: int | None = None
    sample: bool = True
    respond: RespondConfig = field(default_factory=RespondConfig)
    train: FocusConfig = field(default_factory=FocusConfig)
    report: ReportStep = field(default_factory=ReportStep)
    next_command: str = "METHOD=faithful bash scripts/run.sh"


def _types() -> dict[str, Any]:
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(FocusJob).items():
        parts = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {"": hint}
        types |= {f"{name}.{part}".rstrip("."): of for part, of in parts.items()}
    return types


KEYS = _types()  # key -> type
SHORT_NAMES = {"lr": "learning_rate"}  # of other programs -> the last part of a key
ALL_WEIGHTS = "all_weights"  # a file's values of ``train`` that hold with lora_rank=0


def read_job(file: Path, settings: Sequence[str]) -> tuple[FocusJob, set[str]]:
    """The values of a job: its file, then ``KEY=VALUE`` of the command line.

    Returns:
        The job, and the keys that the command line sets.

    Raises:
        SayoError: F26 for an unknown key, F27 for a value of a wrong type, F32 for a file that cannot be read, F05 and
            F23 for a value out of range.
    """
    config = OmegaConf.structured(FocusJob)
    for part in (config.respond, config.train):
        OmegaConf.set_readonly(part, False)
    values = dict(leaves(read_yaml(file)))
    given = [_parsed(setting) for setting in settings]
    full = {key.removeprefix(f"{ALL_WEIGHTS}."): v for key, v in values.items() if key.startswith(f"{ALL_WEIGHTS}.")}
    own = {key: value for key, value in values.items() if not key.startswith(f"{ALL_WEIGHTS}.")}
    for name in full:
        _check_key(f"train.{name}")
    for key, value in [*own.items(), *given]:
        _set(config, key, value)
    if config.train.lora_rank == 0:
        for key, value in [*((f"train.{name}", value) for name, value in full.items()), *given]:
            _set(config, key, value)
    gpus = config.gpus
    if gpus is not None and gpus < 1:
        raise SayoError(
            "F23",
            "a setting has to be a whole number, at least 1",
            where="gpus",
            got=gpus,
            fix="correct NGPUS_PER_NODE or gpus=",
        )
    try:
        job: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _unreadable(file, error) from error
    return job, {key for key, _ in given}


def read_yaml(file: Path) -> dict[str, Any]:
    """The values of a yaml file.

    Raises:
        SayoError: F32.
    """
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(file, error) from error
    return found if isinstance(found, dict) else {str(found): None}


def _unreadable(file: Path, error: Exception) -> SayoError:
    return SayoError(
        "F32",
        "the file of the job cannot be used",
        where=str(file),
        got=" ".join(str(error).split())[:200],
        wanted="a yaml file as in configs/focus",
        fix="correct the name or the file",
    )


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested values; ``trainer_args`` is one value."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in KEYS and key.rpartition(".")[2] != "trainer_args":
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _parsed(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not equals:
        raise SayoError("F26", "not a setting", where="the command line", got=setting, fix="write it as KEY=VALUE")
    kind = KEYS.get(key)
    if kind in (str, str | None) or (get_origin(kind) is list and not text.startswith("[")):
        return key, None if text == "null" else text  # a path may have characters that mean something to yaml
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        raise _wrong_type(key, text) from error


def _check_key(key: str) -> str:
    """The key of ``KEYS`` that ``key`` belongs to.

    Raises:
        SayoError: F26.
    """
    known = key if not key.startswith("train.trainer_args.") else "train.trainer_args"
    if known not in KEYS:
        raise SayoError(
            "F26",
            f"unknown key{_suggestion(key)}",
            where=key,
            wanted=f"a key of sayo_verl/focus/job.py: {', '.join(name for name in KEYS if '.' not in name)}, or a flag "
            "of respond, train or report",
            fix="correct the name",
        )
    return known


def _suggestion(key: str) -> str:
    """Known keys whose last part is that of ``key``, or close to it."""
    last = key.rpartition(".")[2]
    last_parts = {name: name.rpartition(".")[2] for name in KEYS}
    near = difflib.get_close_matches(SHORT_NAMES.get(last, last), last_parts.values(), n=1)
    names = [name for name, part in last_parts.items() if part in near]
    names = difflib.get_close_matches(key, names, n=len(KEYS), cutoff=0)  # the most similar one first
    return f" (did you mean {' or '.join(map(repr, names))}?)" if names else ""


def _set(config: DictConfig, key: str, value: Any) -> None:
    """Set one value.

    Raises:
        SayoError: F26, F27.
    """
    known = _check_key(key)
    if get_origin(KEYS[known]) in (list, tuple) and not isinstance(value, list):
        value = [value]
    try:
        OmegaConf.update(config, key, value, force_add=known != key)
    except OmegaConfBaseException as error:
        raise _wrong_type(key, value) from error


def _wrong_type(key: str, value: Any) -> SayoError:
    kind = KEYS.get(key)
    wanted = str(kind).replace("typing.", "") if get_args(kind) else getattr(kind, "__name__", "a value")
    return SayoError("F27", "a value of the wrong type", where=key, got=repr(value), wanted=wanted, fix="correct it")


def place_rows(job: FocusJob, given: set[str], *, dry_run: bool) -> None:
    """Set ``train_files`` and ``val_file`` from ``data``.

    The command line wins over the file: its files replace ``data`` of the file, which is then None. A folder that is
    missing in a dry run gives the patterns of its files.

    Raises:
        SayoError: F30 for rows that are named twice, or not at all; D56, D52 for a folder that cannot be used.
    """
    both = job.data is not None and bool(job.train_files)
    own = both and "train_files" in given and "data" not in given  # files of the command line, a folder of the file
    if both and not own and ("data" not in given or "train_files" in given):
        raise SayoError(
            "F30",
            "the training rows are named twice",
            where="train_files",
            got=f"{job.train_files} and data={job.data}",
            wanted="one of them",
            fix="leave out DATA (data) or train_files; val_file may be named beside both",
        )
    if own and "val_file" not in given:
        raise SayoError(
            "F30",
            "training rows and held-out rows would come from two places",
            where="val_file",
            got=f"train_files={job.train_files}, and held-out rows of data={job.data}",
            wanted="val_file beside train_files",
            fix="set val_file too",
        )
    if own:
        job.data = None
    if job.data is not None:
        folder = Path(job.data).expanduser()
        if dry_run and not folder.exists():
            files = {split: [folder / f"{split}-*.parquet"] for split in ("train", "val")}
        else:
            files = split_files(folder)
        job.train_files = [str(file) for file in files["train"]]
        if job.val_file is None or ("data" in given and "val_file" not in given):
            job.val_file = str(files["val"][0]) if files["val"] else None
    for key in ("train_files", "val_file"):
        if not getattr(job, key):
            raise SayoError(
                "F30",
                "no rows to train on" if key == "train_files" else "no held-out rows for the report",
                where=key,
                got=f"data={job.data}",
                wanted="rows with boxes" if key == "train_files" else None,
                fix=f"name a folder of `sayo prepare` (DATA=FOLDER, data=) or parquet files ({key}=)",
            )
    job.train_files = [os.path.expanduser(file) for file in job.train_files]
    job.val_file = os.path.expanduser(str(job.val_file))


def accumulation(rows: int, gpus: int, batch_size: int) -> int:
    """Forwards per step with which a step has ``rows`` rows, or as near to it as they come; at least 1."""
    per_forward = max(gpus * batch_size, 1)
    return max((rows + per_forward // 2) // per_forward, 1)
