"""What a checkpoint belongs to: method, reward, data, model, seeds and batch, in ``sayo.json`` beside it.

verl resumes a checkpoint of any other run without a word. So the launcher compares this record with the run that it is
about to start. ``hooks/fingerprint.py`` writes it in the task runner, before verl saves.

Values of environment variables and of secrets are stored as digests.
"""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf, open_dict

from sayo_verl import __version__
from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.checkpoints import FINGERPRINT, SCHEMA
from sayo_verl.launch.model_check import HDFS, model_folder
from sayo_verl.launch.resume import devices_of, parts_of, start_of
from sayo_verl.launch.reward_function import file_of
from sayo_verl.methods import METHODS, PREFIX, Mix
from sayo_verl.models.location import is_hub_name

PACKAGES = ("verl", "torch", "transformers", "vllm", "sglang", "ray", "tensordict", "TransferQueue")
ACTOR, MODEL, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.model", "actor_rollout_ref.rollout"
ESTIMATOR = "algorithm.adv_estimator"
OPTIMIZER = ("lr", "weight_decay", "betas", "optimizer", "optimizer_impl", "override_optimizer_config")
# What must be the same, by the name that sayo.resume_anyway accepts -> patterns of its settings.
COMPARED: dict[str, tuple[str, ...]] = {
    "method": (
        "algorithm.*",
        "sayo.correct_from",
        *(
            f"{ACTOR}.{key}"
            for key in (
                "policy_loss.*",
                "clip_ratio*",
                "tau_*",
                "loss_agg_mode",
                "loss_scale_factor",
                "entropy_coeff",
                "use_kl_loss",
                "kl_loss_*",
                "ppo_epochs",
            )
        ),
    ),
    "reward": (
        "reward.custom_reward_function.*",
        "reward.reward_manager.*",
        "reward.reward_model.enable",
        "reward.reward_model.model_path",
    ),
    "data": (
        "data.shuffle",
        "data.sampler.*",
        "data.train_max_samples",
        "data.filter_overlong_prompts",
        "data.max_prompt_length",
        "data.truncation",
        "data.*_key",
        "data.custom_cls.*",
        "data.apply_chat_template_kwargs*",
        "data.mm_processor_kwargs*",
    ),
    "model": (
        *(
            f"{MODEL}.{key}"
            for key in (
                "lora_rank",
                "lora_alpha",
                "target_modules",
                "exclude_modules",
                "lora_adapter_path",
                "custom_chat_template",
            )
        ),
        f"{ACTOR}.strategy",
        f"{ACTOR}.freeze_vision_tower",
    ),
    "seed": ("*.seed", "*_seed", "sayo.repeatable_rollouts"),
    "batch": (
        "data.train_batch_size",
        "data.gen_batch_size",
        "data.dataloader_num_workers",
        f"{ROLLOUT}.n",
        f"{ACTOR}.ppo_mini_batch_size",
    ),
    "mode": ("trainer.v1.trainer_mode",),
    # verl restores these with the optimizer, so another value has no effect.
    "optimizer": tuple(f"{part}.optim.{key}" for part in (ACTOR, "critic") for key in OPTIMIZER),
}
NAMES = (*COMPARED, "fingerprint")
# Limits of time and effort, and what is compared as a file.
IGNORED = (
    "*._target_",
    "algorithm.filter_groups.max_*",
    "algorithm.attn.*.time_limit",
    "algorithm.attn.*.processes",
    "reward.reward_manager._target_",
    "reward.custom_reward_function.path",
)
# Differences that a resume may have; the plan names them.
SAID = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "data.train_files",
    "data.val_files",
    "data.max_response_length",
    f"{MODEL}.path",
    f"{ROLLOUT}.temperature",
    f"{ROLLOUT}.top_p",
    f"{ROLLOUT}.top_k",
    *(f"{ACTOR}.optim.{key}" for key in ("lr_scheduler_type", "lr_warmup_steps*", "min_lr_ratio", "num_cycles")),
)
SECRET = re.compile(r"^reward\..*(key$|token$|secret|password|credential)", re.IGNORECASE)
# Files of a model's folder that decide what the model sees.
SMALL = ("config.json", "*token*.json", "vocab*", "merges.txt", "*processor_config.json", "chat_template*", "*.py")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
BLOCK, BLOCKS = 1 << 20, 16  # bytes; of a file of weights these many are read
MOST = 8  # differences named of each kind
LONGEST = 70  # characters of a value in a message
NOT_FOUND = "not on this machine"

Flat = dict[str, Any]


def place_fingerprint(config: DictConfig, *, dry_run: bool = False) -> str:
    """Compare a run with the checkpoint that it resumes, and put its own record into ``sayo.fingerprint``.

    Args:
        config: the checked configuration, before the launcher changes it for verl.
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
    remark = "" if start is None else _compare(start, now, accepted)
    if not dry_run:
        with open_dict(config):
            config.sayo.fingerprint = json.dumps(now)
    return remark


def fingerprint_of(config: DictConfig) -> dict[str, Any]:
    """The record of a run: ``schema``, ``compared`` (name -> settings and files), ``said``, ``saved``."""
    leaves = dict(_leaves(config))
    left_out = (*IGNORED, *_unused_methods(config))

    def chosen(patterns: tuple[str, ...]) -> Flat:
        return {key: value for key, value in leaves.items() if _matches(key, patterns) and not _matches(key, left_out)}

    compared = {name: chosen(patterns) for name, patterns in COMPARED.items()}
    critic = "critic" in parts_of(config)
    elsewhere = ("algorithm.", *(() if critic else ("critic.",)))  # seeds of methods are in "method"
    for name in ("seed", "optimizer"):
        compared[name] = {key: value for key, value in compared[name].items() if not key.startswith(elsewhere)}
    compared["method"] |= _own_code(config)
    compared["reward"] |= _reward(config)
    compared["data"] |= _data(config)
    compared["model"] |= _model(f"{MODEL}.path", str(config.actor_rollout_ref.model.path))
    if critic:
        compared["model"] |= _model("critic.model.path", str(OmegaConf.select(config, "critic.model.path")))
    return {
        "schema": SCHEMA,
        "compared": compared,
        "said": chosen(SAID) | {f"version of {name}": found for name, found in versions().items()},
        "saved": {
            "devices": devices_of(config),
            "parts": list(parts_of(config)),
            "fsdp": config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2"),
            "queue": config.trainer.v1.trainer_mode != "sync",
        },
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that a run uses, as far as they are installed."""
    found = {"sayo-verl": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # vllm or sglang: one engine is enough
            continue
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key old -> new`` of values that differ; what was not found on one of the machines is not compared."""
    keys = sorted(new.keys() | old.keys(), key=lambda key: (key != ESTIMATOR, key))
    pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in keys]
    return [
        f"{k} {_short(was)} -> {_short(now)}" for k, was, now in pairs if was != now and NOT_FOUND not in (was, now)
    ]


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


def _compare(start: Path, now: Mapping[str, Any], accepted: tuple[str, ...]) -> str:
    """What differs from the record beside ``start`` and may."""
    if "fingerprint" in accepted:
        return "; not compared with its fingerprint (sayo.resume_anyway)"
    before = _read(start)
    found = {}
    for name, new in now["compared"].items():
        old = before["compared"].get(name, {})
        if old.get(ESTIMATOR) != new.get(ESTIMATOR):  # settings of one method alone say nothing more
            old, new = ({key: value for key, value in side.items() if key in old and key in new} for side in (old, new))
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


# ------------------------------------------------------------------------------------------------------------- settings


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """(dotted key, resolved value) of the settings that are compared or named."""
    patterns = (*(pattern for patterns in COMPARED.values() for pattern in patterns), *SAID)
    raw: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in _flat(raw):
        if _matches(key, patterns):
            resolved = OmegaConf.select(config, key, throw_on_missing=False)
            resolved = OmegaConf.to_container(resolved, resolve=True) if OmegaConf.is_config(resolved) else resolved
            hidden = SECRET.search(key) or "oc.env" in str(value)
            yield key, f"sha256 {_digest(str(resolved).encode())}" if hidden and resolved is not None else resolved


def _flat(part: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unused_methods(config: DictConfig) -> tuple[str, ...]:
    """Patterns of settings of methods that do not run."""
    name, attn = str(config.algorithm.adv_estimator), config.algorithm.get("attn") or {}
    if name not in (*METHODS, Mix.name):
        return ("algorithm.attn.*",)
    used = list(attn.get("mix") or []) if name == Mix.name else [name.removeprefix(PREFIX)]
    nodes = [each.removeprefix(PREFIX) for each in METHODS]
    return tuple(f"algorithm.attn.{node}.*" for node in nodes if node not in used)


def _own_code(config: DictConfig) -> Flat:
    """Digests of the files of a user's own methods that run."""
    name = str(config.algorithm.adv_estimator)
    mix = (config.algorithm.get("attn") or {}).get("mix") or []
    used = [PREFIX + node for node in mix] if name == Mix.name else [name]
    own = [METHODS[each] for each in used if each in METHODS and not METHODS[each].__module__.startswith("sayo_verl.")]
    return {f"code of {cls.__name__}": _digest(Path(inspect.getfile(cls)).read_bytes()) for cls in own}


def _reward(config: DictConfig) -> Flat:
    """The reward function: the digest of its file, or the name of its package."""
    path = OmegaConf.select(config, "reward.custom_reward_function.path")
    if path is None:
        return {"reward function": "verl's own"}
    file = file_of(str(path))
    if file is None:
        return {"reward function": str(path)}
    return {"reward function: file": f"sha256 {_digest(file.read_bytes())}" if file.is_file() else NOT_FOUND}


# ---------------------------------------------------------------------------------------------------------------- files


def _data(config: DictConfig) -> Flat:
    """The training files in their order: rows, bytes and the digest of all bytes."""
    named = config.data.train_files
    files = [named] if isinstance(named, str) else list(named or [])
    with ThreadPoolExecutor(4) as pool:  # hashlib releases the interpreter
        found = list(pool.map(_data_file, map(str, files)))
    return {f"data.train_files[{n}]": value for n, value in enumerate(found)}


def _data_file(name: str) -> str:
    file = Path(name).expanduser()
    if not file.is_file():
        return NOT_FOUND
    state = file.stat()
    rows = ""
    try:
        rows = f"{pq.read_metadata(file).num_rows} rows, "
    except (pa.ArrowException, OSError):  # JSON, or a file that check_data has refused
        rows = ""
    return f"{rows}{state.st_size} bytes, sha256 {_whole(str(file), state.st_size, state.st_mtime_ns)}"


@functools.lru_cache
def _whole(file: str, size: int, changed: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _model(key: str, path: str) -> Flat:
    """The small files of a model by digest, and its weights by size and sampled blocks; of the hub, the revision."""
    if path.startswith(HDFS):
        return {key: path}
    folder = model_folder(path, dry_run=True)
    if folder is None:
        return {f"{key}: {'revision' if is_hub_name(path) else 'weights'}": NOT_FOUND}
    small = sorted({file for pattern in SMALL for file in folder.glob(pattern) if file.is_file()})
    found: Flat = {f"{key}: {file.name}": f"sha256 {_digest(file.read_bytes())}" for file in small}
    if is_hub_name(path):  # verl downloads the weights later
        return found | {f"{key}: revision": folder.name}
    weights = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    total = sum(file.stat().st_size for file in weights)
    digest = _digest(b"".join(_sampled(file) for file in weights))
    return found | {f"{key}: weights": f"{total} bytes in {len(weights)} files, sha256 of samples {digest}"}


def _sampled(file: Path) -> bytes:
    """The digest of evenly spread blocks of a file, the first and the last included; of all bytes if it is small."""
    size, hashed = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        if size <= BLOCK * BLOCKS:
            hashed.update(opened.read())
        else:
            for n in range(BLOCKS):
                opened.seek(n * (size - BLOCK) // (BLOCKS - 1))
                hashed.update(opened.read(BLOCK))
    return hashed.digest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
