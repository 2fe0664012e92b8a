"""The whole of ``scripts/eval_lmms.sh``: plan, environment, names, merge, harness, table.

Error codes: E05 the harness lacks a task, E09 a step failed, E12 a data set that cannot be fetched. ``plan``,
``model``, ``sets`` and ``table`` have the others.
"""

import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sayo_verl.errors import SayoError, did_you_mean
from sayo_verl.evaluation.plan import HARNESS, ROOT, Plan, constraints, make_plan, show
from sayo_verl.evaluation.table import report

MERGED = ".sayo-merged"  # which checkpoint the merged model was made of
FIXUPS = ROOT / "scripts" / "cpu_stack_fixups.py"
# Tries the names of tasks in the harness; prints as JSON what it lacks, and the data set of each.
NAMES = """
import json, sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
index = TaskManager(include_path=sys.argv[1]).task_index
read = lambda task: load_yaml_config(index[task]["yaml_path"], mode="simple").get("dataset_path")
sets = {task: read(task) for task in sys.argv[2:] if task in index}
print("NAMES" + json.dumps({"known": sorted(index), "sets": sets}))
"""


def key_of(stack: str) -> str:
    """A hash of what decides what is installed."""
    return hashlib.sha256(constraints(stack).read_bytes() + FIXUPS.read_bytes()).hexdigest()


def build(plan: Plan) -> None:
    """The environment of the harness, unless it is there with these versions."""
    pins, stamp, python = constraints(plan.stack), plan.venv / ".sayo-eval", str(plan.venv / "bin" / "python")
    key = key_of(plan.stack)
    if stamp.is_file() and stamp.read_text() == key:
        return
    if plan.venv.exists() and not (plan.venv / ".sayo-eval-begun").exists():
        fix = "move it away, or name another folder in SAYO_EVAL_VENV"
        raise SayoError("E09", "the folder was not made by this script", where=str(plan.venv), fix=fix)
    if sys.version_info[:2] != (3, 11):
        got = f"Python {sys.version.split()[0]}"
        raise SayoError(
            "E09",
            "the harness's versions are pinned for Python 3.11",
            where="PATH",
            got=got,
            fix="put python3.11 on PATH",
        )
    print(f"building {plan.venv} (2 minutes and 2.4 GB on a CPU)", flush=True)
    step(plan, "environment", [sys.executable, "-m", "venv", "--clear", str(plan.venv)])
    (plan.venv / ".sayo-eval-begun").touch()
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    versions = dict(line.split("==") for line in pins.read_text().split() if "==" in line)
    if plan.stack == "cpu":
        index = ["--extra-index-url", os.environ.get("SAYO_TORCH_INDEX_URL") or "https://download.pytorch.org/whl/cpu"]
        wanted = [f"torch=={versions['torch']}+cpu", f"torchvision=={versions['torchvision']}"]
        step(plan, "environment", [*pip, "--no-deps", *index, *wanted])
    wheels = [HARNESS, "decord"] + (["vllm"] if plan.stack == "gpu" else [])
    step(plan, "environment", [*pip, "--constraint", str(pins), *wheels])
    if plan.stack == "cpu":
        step(plan, "environment", [python, str(FIXUPS)])
    stamp.write_text(key)


def step(plan: Plan, name: str, command: Sequence[str], **environment: str) -> str:
    """Run a command with its output in a log, and return the output.

    Raises:
        SayoError: E09.
    """
    log = plan.out / f"{name}.log"
    with log.open("a+", encoding="utf-8") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        start = file.tell()
        status = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, **environment}, cwd=ROOT
        ).returncode
        file.seek(start)
        said = file.read()
    if status:
        print("\n".join(said.splitlines()[-20:]), file=sys.stderr)
        fix = "the lines above are its last; then run the same command again"
        raise SayoError("E09", f"the step '{name}' failed", where=str(log), got=f"exit status {status}", fix=fix)
    return said


def check_names(plan: Plan) -> None:
    """Ask the installed harness for its tasks before a model is loaded: E05, E12."""
    python = str(plan.venv / "bin" / "python")
    said = step(plan, "names", [python, "-c", NAMES, str(plan.out / "tasks"), *plan.benchmarks.tasks])
    found = json.loads(next(line for line in said.splitlines() if line.startswith("NAMES"))[5:])
    for task in plan.benchmarks.tasks:
        if task not in found["known"]:
            what = f"{HARNESS} has no such task{did_you_mean(task, found['known'])}"
            fix = "name a task of `python -m lmms_eval tasks`, or a set"
            raise SayoError("E05", what, where="SET", got=task, fix=fix)
    if any(os.environ.get(name) == "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        for task, source in found["sets"].items():
            places = (
                home / "datasets" / str(source).replace("/", "___"),
                home / "hub" / f"datasets--{source}".replace("/", "--"),
            )
            if source and "/" in source and not any(place.exists() for place in places):
                fix = "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE once, or copy the data set into HF_HOME"
                raise SayoError(
                    "E12",
                    f"the task {task} needs a data set that is not on this machine, and the hub is off",
                    where=str(home),
                    got=source,
                    fix=fix,
                )


def merge(plan: Plan) -> None:
    """Merge the checkpoint, unless the folder of the result holds this one already.

    Raises:
        SayoError: E09.
    """
    if plan.merged is None or plan.model.shards is None:
        return
    files = [(file.name, file.stat()) for file in sorted(plan.model.shards.iterdir())]
    key = json.dumps([str(plan.model.shards.resolve()), *((name, s.st_size, s.st_mtime_ns) for name, s in files)])
    stamp = plan.merged / MERGED
    if stamp.is_file() and stamp.read_text() == key:
        return
    if plan.merged.exists() and not stamp.is_file():
        fix = "move it away, or choose another --out"
        raise SayoError("E09", "the folder was not made by this script", where=str(plan.merged), fix=fix)
    print(f"merging {plan.model.shards}", flush=True)
    for folder in (plan.merging, plan.merged):
        shutil.rmtree(folder, ignore_errors=True)
    prefix = ["bash", "-c", 'source scripts/lib.sh && ready_python sayo_verl verl && exec "$@"', "merge"]
    step(plan, "merge", [*prefix, *plan.merge()], VERL_PLATFORM="cpu" if plan.stack == "cpu" else "")
    (plan.merging / MERGED).write_text(key)
    plan.merging.rename(plan.merged)


def run(plan: Plan) -> None:
    """Build, check, merge, answer, report."""
    plan.out.mkdir(parents=True, exist_ok=True)
    tasks = plan.out / "tasks"
    shutil.copytree(
        ROOT / "configs" / "eval" / "scenes", tasks, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    task = tasks / "sayo_rows.yaml"
    task.write_text(task.read_text().replace("@DATA@", json.dumps(plan.options.files)))
    build(plan)
    print("asking the harness for the tasks", flush=True)
    check_names(plan)
    merge(plan)
    local = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    local |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if plan.options.data else {}
    n_samples = max(plan.options.sampled, 1)
    for sample in range(n_samples):
        shutil.rmtree(
            plan.out / "harness" / str(sample), ignore_errors=True
        )  # an earlier run's result is not this one's
        print(f"answering (progress: {plan.out}/harness.log)", flush=True)
        step(plan, "harness", plan.harness(sample), **local)
    print()
    facts = {
        **plan.facts(),
        "command": shlex.join(plan.harness()),
        "finished": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    report(plan.benchmarks, facts, plan.out, n_samples)


def main() -> int:
    """Entry point; 2 for an error."""
    try:
        plan = make_plan(sys.argv[1:], os.environ)
        show(plan)
        if os.environ.get("DRY_RUN", "0") not in ("1", "true", "yes"):
            run(plan)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
