"""Two observed runs compared in the order of events: the first difference is the cause of the later ones."""

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

import torch

from sayo_verl.hooks.repeat import place_of

# Times, memory and throughput of this machine at this moment; all other metrics are compared.
NOT_COMPARED = re.compile(
    r"seconds|^timing|^perf/|throughput|/perf/|probe_share_of_log_prob|max_memory|cpu_memory|agent_loop/|num_preempted"
)
# What a field of a row is called in a difference; fields come in this order, all others after them.
FIELDS = {
    "index": "prompts",
    "prompts": "prompt tokens",
    "extra_info": "boxes and other extra_info of the rows",
    "responses": "rollout tokens",
    "rm_scores": "rewards",
    "rollout_log_probs": "log-probs of the rollouts",
    "old_log_probs": "old log-probs",
}
NOT_A_RESULT = {"uid", "metrics", "sayo_probe_seconds"}  # a name and times
LATER = ("advantages", "returns", "token_level_rewards")
PARTS = {"model": "weights", "optim": "optimizer moments", "extra_state": "LR schedule"}


def first_difference(one: Path, two: Path, *, after: int, checkpoints=None) -> str | None:
    """The first quantity in which two runs differ, or None.

    Args:
        one, two: folders of ``observed_run``, of one label each.
        after: steps up to this one are not compared.
        checkpoints: two ``global_step_<n>`` folders, compared last, and the one that the second run started from. verl
            does not seed the workers, so their random state differs between any two starts. No step draws from it: a
            resumed run saves the state that it has loaded.
    """
    steps = [_steps(one, after), _steps(two, 0)]
    for step, (a, b) in enumerate(zip(*steps, strict=False), after + 1):
        if found := _of_step(*(torch.load(file, weights_only=False) for file in (a, b))):
            return f"step {step}: {found}"
    if len(steps[0]) != len(steps[1]):
        return "number of steps"
    return _of_checkpoints(*checkpoints) if checkpoints else None


def _steps(folder: Path, after: int) -> list[Path]:
    numbered = sorted((int(file.stem.rpartition("_")[2]), file) for file in folder.glob("step_*.pt"))
    return [file for number, file in numbered if number > after]


def _of_step(a, b):
    if a["step"] != b["step"]:
        return "step number"
    rows_a, rows_b = ({place_of(key): row for key, row in run["rows"].items()} for run in (a, b))
    indices = [sorted(row["index"] for row in rows.values()) for rows in (rows_a, rows_b)]
    if indices[0] != indices[1]:
        return "prompts"
    assert rows_a.keys() == rows_b.keys()
    names = {name for row in [*rows_a.values(), *rows_b.values()] for name in row} - NOT_A_RESULT
    between = sorted(names - FIELDS.keys() - set(LATER))
    for name in [*FIELDS, *between, *LATER]:
        if any(rows_a[place].get(name) != rows_b[place].get(name) for place in rows_a):
            return FIELDS.get(name, name)
    if a["order"] != b["order"]:
        return "order of the batch"
    if not _same(a["loader"], b["loader"]):
        return "loader state"
    metrics = [{key: value for key, value in run["metrics"].items() if not NOT_COMPARED.search(key)} for run in (a, b)]
    if metrics[0].keys() != metrics[1].keys():
        return f"names of metrics: {sorted(metrics[0].keys() ^ metrics[1].keys())}"
    differ = [key for key in metrics[0] if metrics[0][key] != metrics[1][key]]
    return f"metrics: {', '.join(sorted(differ))}" if differ else None


def _of_checkpoints(one: Path, two: Path, start: Path | None = None):
    for name, what in PARTS.items():
        files = [next((folder / "actor").glob(f"{name}_world_size_1_rank_0.pt")) for folder in (one, two)]
        states = [torch.load(file, weights_only=False) for file in files]
        rng = [state.pop("rng", None) for state in states] if name == "extra_state" else []
        if where := _where(*states):
            return f"checkpoint: {what} ({where})"
    if start:
        loaded = torch.load(start / "actor" / files[1].name, weights_only=False)["rng"]
        if where := _where(loaded, rng[1]):
            return f"checkpoint: worker RNG ({where})"
    states = [torch.load(folder / "data.pt", weights_only=False) for folder in (one, two)]
    return None if _same(*states) else "checkpoint: loader state"


def _same(a, b) -> bool:
    return _where(a, b) is None


def _where(a, b, path="") -> str | None:
    """The path of the first leaf that differs; tensors by ``torch.equal``."""
    if type(a) is not type(b):
        return path or "type"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{path} keys"
        return next((found for key in a if (found := _where(a[key], b[key], f"{path}/{key}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path} length"
        return next((found for n in range(len(a)) if (found := _where(a[n], b[n], f"{path}/{n}"))), None)
    if hasattr(a, "to_local"):
        a, b = a.to_local(), b.to_local()
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else path or "tensor"
    if hasattr(a, "tobytes"):
        return None if a.tobytes() == b.tobytes() else path or "array"
    return None if a == b else path or "value"


def tampered(checkpoint: Path, other_data: Path, folder: Path) -> dict[str, Path]:
    """Copies of a checkpoint with one thing wrong in each; "nothing" is a copy as it is."""
    copies = {}
    for name in ("nothing", "data position", "step number", "worker RNG", "optimizer", "LR schedule", "one weight"):
        step = "global_step_1" if name == "step number" else checkpoint.name
        copies[name] = folder / name.replace(" ", "_") / step
        shutil.copytree(checkpoint, copies[name])
    shutil.copy(other_data, copies["data position"] / "data.pt")

    def change(name, part, edit):
        file = copies[name] / "actor" / f"{part}_world_size_1_rank_0.pt"
        state = torch.load(file, weights_only=False)
        edit(state)
        torch.save(state, file)

    def other_rng(state):
        state["rng"]["cpu"] = torch.Generator().manual_seed(7).get_state()

    def no_moments(state):
        for moments in state["state"].values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()

    def one_step_behind(state):
        state["lr_scheduler"]["last_epoch"] -= 1

    def one_weight(state):
        weight = next(iter(state.values()))
        getattr(weight, "to_local", lambda: weight)().view(-1)[0] += 1e-3

    change("worker RNG", "extra_state", other_rng)
    change("optimizer", "optim", no_moments)
    change("LR schedule", "extra_state", one_step_behind)
    change("one weight", "model", one_weight)
    return copies


def processes_of(observed: Path) -> dict[int, str]:
    """pid -> name of all processes that the run left: those with its variable SAYO_OBSERVED."""
    mark, found = f"SAYO_OBSERVED={observed}\0".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes() + b"\0":
                found[int(folder.name)] = (folder / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is another user's
    return found


# Ray's own, which outlive a driver that was killed by more than a minute (Ray 2.60).
AGENTS = {"ray::DashboardA", "ray::RuntimeEnv"}


def wait_for_end(observed: Path, seconds: float) -> tuple[float, set[str]]:
    """Seconds until no process of the run was left but Ray's agents, and the names of others; all are ended now."""
    start = time.monotonic()
    while set((left := processes_of(observed)).values()) - AGENTS and time.monotonic() - start < seconds:
        time.sleep(0.5)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return time.monotonic() - start, set(left.values()) - AGENTS
