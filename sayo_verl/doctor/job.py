"""A job, a model and a run folder: what a launch script would say, the processor, the checkpoints."""

import os
import re
import subprocess
from pathlib import Path

from sayo_verl.doctor.finding import Finding
from sayo_verl.errors import SayoError
from sayo_verl.launch.checkpoints import TRACKER, judge_checkpoints, newest_complete, steps_lost, tracked_step
from sayo_verl.launch.machine import cards
from sayo_verl.report.runs import load_run

# Lines of the plan that compare the job with this machine
OF_MACHINE = {"memory per GPU": "memory", "disk": "disk"}
# How a line of the plan says that it compared nothing
UNCHECKED = re.compile(r"not checked|not estimated|NOT THERE YET|the size of a checkpoint is unknown")


def check_job(script: str, *overrides: str) -> list[Finding]:
    """A launch script's dry run: what it refuses, and whether this machine has the cards that it needs.

    Args:
        script: its path.
        overrides: its arguments.
    """
    done = subprocess.run(
        ["bash", script, *overrides], env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in reversed(lines) if "SAYO-" in line), lines[-1])
        return [Finding("job.plan", "job", said, "a dry run without refusals", False, said.rpartition("fix: ")[2])]
    found = [Finding("job.plan", "job", f"{script}: its dry run passes", "", True)]
    for name, line in re.findall(r"^  (\S.*?)  +(.+)$", done.stdout, re.MULTILINE):
        unchecked = UNCHECKED.search(line)
        if name in OF_MACHINE or unchecked:
            key = OF_MACHINE.get(name, name.replace(" ", "_"))
            found.append(Finding(f"job.{key}", f"job, {name}", line, "", None if unchecked else True))
    if not any(finding.id == "job.memory" for finding in found):
        found.append(Finding("job.memory", "job, memory per GPU", "not estimated", "", None))
    if machines := re.search(r"^ *machines +\d+ x (\d+) cuda", done.stdout, re.MULTILINE):
        n_cards, wanted = _number_of_cards(), int(machines[1])
        found.append(
            Finding(
                "job.cards",
                "job, cards",
                f"needs {wanted} GPU{'s' * (wanted > 1)} on each node, found {n_cards}",
                "",
                n_cards >= wanted,
                f"run it on a node with {wanted}, or set NGPUS_PER_NODE in front of sayo",
            )
        )
    model = re.search(r"^ *model +(\S+) \(", done.stdout, re.MULTILINE)  # only if it is on this machine
    return [*found, *([check_processor(model[1])] if model else [])]


def _number_of_cards() -> int:
    try:
        return len(cards())
    except OSError:  # check_device reports it
        return 0


def check_processor(model: str) -> Finding:
    """Whether a model's processor makes the visual tokens of its weights: class, patches, merge size, image token.

    Args:
        model: folder or hub name.
    """
    from sayo_verl.models import processors

    try:
        family, config, processor = processors.load(model, "--model", "correct the path")
    except SayoError as error:
        return Finding("job.processor", "processor", str(error), "the processor of these weights", False, error.fix)
    vision = getattr(config.vision_config, "spatial_merge_size", None)
    grid = f"patch size {config.vision_config.patch_size}" + (f", merge size {vision}" if vision else "")
    return Finding(
        "job.processor",
        "processor",
        f"{type(processor).__name__} for {family.model_type}: {grid}, image token {config.image_token_id}: as the "
        "weights",
        "",
        True,
    )


def check_run(run: Path) -> list[Finding]:
    """The checkpoints of a run folder, and the steps that a resume would train again.

    Args:
        run: the folder of a run, or the folder of its checkpoints.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    checkpoints = judge_checkpoints(folder)
    if not checkpoints:
        text = "no checkpoint" if run.is_dir() else "no such folder"
        fix = "name the folder of a run that saved some (trainer.save_freq=...); without one it cannot be resumed"
        return [Finding("run.checkpoints", f"run {run}", text, "a checkpoint", False, fix)]
    found = [
        Finding(
            f"run.global_step_{one.step}",
            f"checkpoint {one.step}",
            str(one),
            "" if one.complete or one.removed else "complete",
            one.complete or one.removed,
            "delete this folder: a save was interrupted, or a file was lost",
        )
        for one in checkpoints
    ]
    newest, tracked = newest_complete(checkpoints), tracked_step(folder)
    try:
        last = load_run(run).steps[-1]
        lost = f", {steps_lost(checkpoints, last)} of {last} steps would be trained again"
    except SayoError as error:
        lost = f"; steps since then unknown ({error.code}: {error.what})"
    right = newest is not None and newest.step == tracked
    return [
        *found,
        Finding(
            "run.resume",
            "resume",
            f"tracker names {'no step' if tracked is None else f'step {tracked}'}; newest complete checkpoint: "
            + ("none" if newest is None else f"step {newest.step}{lost}"),
            "" if right else "a tracker that names the newest complete checkpoint",
            right,
            "begin a new run (OUT=...)" if newest is None else f"echo -n {newest.step} > {folder / TRACKER}",
        ),
    ]
