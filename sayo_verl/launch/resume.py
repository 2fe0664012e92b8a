"""What a run would overwrite, what it would resume, and how to resume it later. Checked before anything is loaded.

verl 0.9.1 says "Resuming" and trains the first weights in several cases: the tracker is missing or names a folder that
does not exist, ``load_contents`` lacks the model, ``resume_from_path`` is given without its mode. Each is refused here.
"""

import os
import re
import shlex
import warnings
from pathlib import Path

from omegaconf import DictConfig

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.launch.checkpoints import (
    STATE,
    TRACKER,
    Expected,
    judge,
    judge_checkpoints,
    newest_complete,
    step_folders,
    step_of,
    summary,
)

MODES = ("disable", "auto", "resume_path")


def metrics_file(config: DictConfig) -> Path | None:
    """The file that verl's file logger opens and empties; None if ``trainer.logger`` has no "file"."""
    loggers = config.trainer.logger
    if "file" not in ([loggers] if isinstance(loggers, str) else loggers):
        return None
    if path := os.environ.get("VERL_FILE_LOGGER_PATH"):
        return Path(path)
    root = Path(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")).expanduser()
    return root / config.trainer.project_name / f"{config.trainer.experiment_name}.jsonl"


def check_metrics(config: DictConfig) -> None:
    """Refuse a metrics file with content; verl's file logger would empty it.

    Raises:
        SayoError: L15.
    """
    file = metrics_file(config)
    if file is not None and file.exists() and file.stat().st_size > 0:
        raise SayoError(
            "L15",
            "the metrics file belongs to a run that was started before, and would be overwritten",
            where="VERL_FILE_LOGGER_PATH",
            got=file,
            fix="choose a new output folder (OUT=...); to resume that run, RESUME=<its folder> for our scripts, or "
            f"VERL_FILE_LOGGER_PATH={file.absolute().parent}/metrics-2.jsonl (sayo report reads metrics*.jsonl of a "
            "folder as one run)",
        )


def check_resume(config: DictConfig) -> str:
    """Refuse a resume that verl would do wrongly or not at all, and an output folder of another run.

    Returns:
        What is resumed, for the plan: ``"no: a new run"`` or ``"global_step_2 of 4, from <folder>"``.

    Raises:
        SayoError: L16 for a checkpoint folder of another run, L43 for an invalid ``resume_mode`` or
            ``resume_from_path``, L44 for a tracker that names no checkpoint, L45 for another number of devices, L46 for
            a checkpoint with missing or empty files, L47 for ``load_contents`` that lack a state, L48 if no step is
            left to train.
    """
    folder = Path(str(config.trainer.default_local_dir))
    start = start_of(config)
    steps = step_folders(folder)
    # The checkpoints are another run's: this one starts anew or from another folder.
    if steps and (start is None or start.parent.resolve() != folder.resolve()):
        raise SayoError(
            "L16",
            "the checkpoint folder belongs to another run",
            where="trainer.default_local_dir",
            got=f"{folder} with {steps[-1].name}",
            fix="choose a new output folder (OUT=...); to resume that run, RESUME=<its folder> for our scripts, or "
            "trainer.resume_mode=auto",
        )
    if start is None:
        return "no: a new run"
    _check_files(config, start)
    for key in parts_of(config).values():
        _check_contents(config, key)
    step, total = step_of(start), config.trainer.total_training_steps
    if total is not None and step >= int(total) and not config.trainer.val_only:
        raise SayoError(
            "L48",
            "no step is left to train",
            where="trainer.total_training_steps",
            got=f"{total}, resuming {start.name}",
            wanted=f"more than {step}",
            fix="raise it",
        )
    newest = newest_complete(judge_checkpoints(start.parent, _expected(config)))
    newer = f"; global_step_{newest.step} is newer and complete (resume_path)" if newest and newest.step > step else ""
    return f"{start.name} of {total or '?'}, from {start.parent}{newer}"


def describe_checkpoints(config: DictConfig) -> str:
    """Where and how often checkpoints are saved and whether a run can be resumed from them, for the plan."""
    if int(config.trainer.save_freq) <= 0:
        return "none (trainer.save_freq): a run that stops cannot be resumed"
    lacking = [name for key in parts_of(config).values() for name in _lacking(config, f"{key}.save_contents")]
    no_resume = f"; these cannot be resumed: save_contents lack {', '.join(lacking)}" if lacking else ""
    return f"{config.trainer.default_local_dir}, every {config.trainer.save_freq} steps{no_resume}"


def how_to_resume(config: DictConfig) -> str | None:
    """A line with the command that resumes this run's last checkpoint; None if no checkpoint can be resumed."""
    folder = Path(str(config.trainer.default_local_dir))
    try:
        start = _tracked(folder, config)
        if start is None:
            return None
        _check_files(config, start)
    except SayoError:
        return None  # reported on resuming; here it would hide why the run ended
    metrics = metrics_file(config)
    command = os.environ.get("SAYO_RESUME_COMMAND") or " ".join(
        [
            "the same command with",
            f"trainer.default_local_dir={folder.absolute()}",
            "trainer.resume_mode=auto",
            *([f"and VERL_FILE_LOGGER_PATH={metrics.absolute().parent}/<a new metrics*.jsonl>"] if metrics else []),
        ]
    )
    total = config.trainer.total_training_steps
    done = (
        f" (all {total} steps are done: raise trainer.total_training_steps)"
        if total is not None and step_of(start) >= int(total)
        else ""
    )
    return f"to resume after step {step_of(start)}{done}: {command}"


def start_of(config: DictConfig) -> Path | None:
    """The checkpoint that verl would load, or None for a new run; raises L43 and L44 as ``check_resume`` does."""
    folder = Path(str(config.trainer.default_local_dir))
    mode, path = str(config.trainer.resume_mode), config.trainer.resume_from_path
    if mode not in MODES:
        raise SayoError(
            "L43",
            f"unknown resume mode{did_you_mean(mode, MODES)}",
            where="trainer.resume_mode",
            got=mode,
            wanted=", ".join(MODES),
            fix="correct it",
        )
    if mode != "resume_path":
        if path is not None:
            raise SayoError(
                "L43",
                f"verl ignores the path under resume_mode={mode}",
                where="trainer.resume_from_path",
                got=path,
                fix="set trainer.resume_mode=resume_path, or leave the path out",
            )
        return _tracked(folder, config) if mode == "auto" else None
    # verl reads the step from the end of this path.
    if not isinstance(path, str) or not re.search(r"global_step_\d+$", path) or not Path(path).is_dir():
        raise SayoError(
            "L43",
            "not a checkpoint to resume",
            where="trainer.resume_from_path",
            got=path,
            wanted="an existing folder .../global_step_<n>, no slash at its end",
            fix="name one, or set trainer.resume_mode=auto for the last one of trainer.default_local_dir",
        )
    return Path(path)


def _tracked(folder: Path, config: DictConfig) -> Path | None:
    """The checkpoint that the tracker of ``folder`` names; None if there is neither a tracker nor a checkpoint."""
    tracker, steps = folder / TRACKER, step_folders(folder)
    if not tracker.exists():
        if not steps:
            return None
        raise _no_start(config, tracker, "checkpoints without a tracker: verl would begin a new run", "no such file")
    try:
        start = folder / f"global_step_{int(tracker.read_bytes().decode())}"
    except ValueError as error:  # bad UTF-8 as well
        raise _no_start(config, tracker, "the tracker holds no step", repr(tracker.read_bytes()[:40])) from error
    except OSError as error:
        raise _no_start(config, tracker, "the tracker cannot be read", error.strerror) from error
    if not start.is_dir():
        raise _no_start(
            config,
            tracker,
            "the tracker names a checkpoint that does not exist: verl would begin a new run",
            start.name,
        )
    return start


def _no_start(config: DictConfig, tracker: Path, what: str, got: str | None) -> SayoError:
    """L44: the tracker of checkpoints does not name one to resume."""
    fix = f"write such a number into it (echo -n <n> > {shlex.quote(str(tracker))})"
    if tracker.is_dir():
        fix = f"move that folder away, then {fix}"
    return SayoError(
        "L44",
        what,
        where=str(tracker),
        got=got,
        wanted=f"the step of a complete checkpoint ({_whole(config, tracker)})",
        fix=f"{fix}; if there is none, begin a new run in a new output folder (OUT=...)",
    )


def _whole(config: DictConfig, beside: Path) -> str:
    found = judge_checkpoints(beside.parent, _expected(config))
    return ", ".join(str(checkpoint.step) for checkpoint in found if checkpoint.complete) or "none exists"


def parts_of(config: DictConfig) -> dict[str, str]:
    """Subfolder of a checkpoint -> key of its settings."""
    from verl.trainer.ppo.utils import need_critic

    parts = {"actor": "actor_rollout_ref.actor.checkpoint"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl repeats, when it starts, that there is no critic
        return parts | ({"critic": "critic.checkpoint"} if need_critic(config) else {})


def devices_of(config: DictConfig) -> int:
    return int(config.trainer.nnodes) * int(config.trainer.n_gpus_per_node)


def _expected(config: DictConfig) -> Expected:
    """What this run would load."""
    fsdp = config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2")
    return Expected(devices_of(config), tuple(parts_of(config)), fsdp)


def _check_files(config: DictConfig, start: Path) -> None:
    found = judge(start, _expected(config))
    if found.complete:
        return
    if found.devices and devices_of(config) not in found.devices:
        raise SayoError(
            "L45",
            "the checkpoint was saved on another number of devices, and verl does not redistribute it",
            where=str(start),
            got=f"files of {', '.join(map(str, sorted(found.devices)))} devices",
            wanted=f"{devices_of(config)} (trainer.nnodes x trainer.n_gpus_per_node)",
            fix="resume on as many devices as before",
        )
    removed = "verl removed its weights (trainer.max_actor_ckpt_to_keep); " if found.removed else ""
    raise SayoError(
        "L46",
        "the checkpoint is incomplete: the missing parts would start anew, or verl fails minutes later",
        where=str(start),
        got=f"{removed}{summary(found.damage)}",
        fix=f"resume a complete one with trainer.resume_mode=resume_path trainer.resume_from_path={start.parent}"
        f"/global_step_<n> (complete: {_whole(config, start)}), or begin a new run in a new output folder; one from "
        "saved Hugging Face weights has actor_rollout_ref.model.path=<checkpoint>/actor/huggingface",
    )


def _check_contents(config: DictConfig, key: str) -> None:
    if lacking := _lacking(config, f"{key}.load_contents"):
        raise SayoError(
            "L47",
            f"resuming would not load {', '.join(lacking)}: verl would start that anew silently",
            where=f"{key}.load_contents",
            got=_contents(config, f"{key}.load_contents"),
            wanted=f"at least {list(STATE)}",
            fix=f"set {key}.load_contents=[{','.join(STATE)}]",
        )


def _contents(config: DictConfig, key: str) -> list[str]:
    from omegaconf import OmegaConf

    value = OmegaConf.select(config, key)
    return list(STATE) if value is None else list(value)  # verl's own default


def _lacking(config: DictConfig, key: str) -> list[str]:
    return [name for name in STATE if name not in _contents(config, key)]
