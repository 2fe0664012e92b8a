"""Loaded into a real run by ``sayo.modules``: writes what each step did, and ends the run by SIGKILL where a test says.

It reads variables that Ray's workers inherit from the launcher:

    SAYO_OBSERVED   folder of this start: ``<label>/step_<n>.pt`` per step; ``driver.pid``
    SAYO_KILLED     rollout, update or save: the step-3 rollout, the step-3 update, or the save of step 4
    SAYO_CONTROLS   JSON, a list of [label, checkpoint, changed row or null]: when the run has ended, the same processes
                    load each checkpoint and train to the end again, which takes seconds where a start takes a minute
"""

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from omegaconf import open_dict
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

FOLDER = Path(os.environ["SAYO_OBSERVED"])
KILLED = os.environ.get("SAYO_KILLED", "")
LABEL = {"now": "run"}


def kill():
    """The driver as by kill -9, and this process, so that nothing of the step is done after it."""
    driver = int((FOLDER / "driver.pid").read_text())
    (FOLDER / "killed").write_text(f"{KILLED} {time.time()}")
    os.kill(driver, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def digest(value):
    """A short name of a row's value: equal values have equal names."""
    if isinstance(value, torch.Tensor):
        content = torch.atleast_1d(value.detach()).contiguous().view(torch.uint8)
        return f"{tuple(value.shape)} {hashlib.sha256(content.numpy().tobytes()).hexdigest()[:16]}"
    if isinstance(value, dict):
        return {key: digest(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [digest(item) for item in value]
    if hasattr(value, "tobytes"):  # an image or an array
        return hashlib.sha256(value.tobytes()).hexdigest()[:16]
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def rows_of(batch):
    """Place of each row -> field -> digest; ``index`` and ``responses`` as they are."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    rows = {}
    for n, key in enumerate(batch.keys):
        fields = {}
        for name in data.keys():
            value = data[name][n]
            value = getattr(value, "data", value) if not isinstance(value, torch.Tensor) else value
            if name in ("index", "responses"):
                fields[name] = value.tolist() if isinstance(value, torch.Tensor) else value
            else:
                fields[name] = digest(value)
        rows[key] = fields
    return rows


def observe():
    compute_metrics = PPOTrainer._compute_metrics

    def _compute_metrics(self, batch, metrics, *args, **kwargs):
        out = compute_metrics(self, batch, metrics, *args, **kwargs)
        folder = FOLDER / LABEL["now"]
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.global_steps,
            "rows": rows_of(batch),
            "order": list(batch.keys),
            "loader": self.train_dataloader.state_dict(),
            "metrics": {
                key: float(value)
                for key, value in metrics.items()
                if isinstance(value, int | float) or hasattr(value, "item")
            },
        }
        torch.save(state, folder / f"step_{self.global_steps}.pt")
        return out

    PPOTrainer._compute_metrics = _compute_metrics


def kill_in_rollout():
    step_once = PPOTrainer._step_once

    def _step_once(self, *args, **kwargs):
        if self.global_steps == 3:
            time.sleep(0.1)  # the prompts were submitted before
            kill()
        return step_once(self, *args, **kwargs)

    PPOTrainer._step_once = _step_once


def kill_in_update():
    update_actor = PPOTrainer._update_actor

    def _update_actor(self, *args, **kwargs):
        if self.global_steps == 3:
            threading.Timer(0.1, kill).start()
            update_actor(self, *args, **kwargs)
            raise AssertionError("the update ended before the kill")
        return update_actor(self, *args, **kwargs)

    PPOTrainer._update_actor = _update_actor


def kill_in_save():
    save = torch.save

    def half_a_file(state, path, *args, **kwargs):
        save(state, path, *args, **kwargs)
        if str(path).endswith("global_step_4/data.pt"):  # the actor's files are complete, the tracker still names 2
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            kill()

    torch.save = half_a_file


def repeat_with_controls():
    fit = PPOTrainer.fit

    def fit_again(self, agent_loop_manager):
        fit(self, agent_loop_manager)
        rows = self.train_dataset.dataframe
        for label, checkpoint, changed in json.loads(os.environ["SAYO_CONTROLS"]):
            LABEL["now"] = label
            (FOLDER / label).mkdir(parents=True)
            os.environ["VERL_FILE_LOGGER_PATH"] = str(FOLDER / label / "metrics.jsonl")
            with open_dict(self.config):
                self.config.trainer.resume_mode = "resume_path"
                self.config.trainer.resume_from_path = checkpoint
                self.config.trainer.default_local_dir = str(FOLDER / label / "checkpoints")
            self.train_dataset.dataframe = rows if changed is None else with_another_box(rows, changed)
            self.train_dataloader_it = None
            self._load_checkpoint()
            self.checkpoint_manager.update_weights(self.global_steps)
            fit(self, agent_loop_manager)

    PPOTrainer.fit = fit_again


def with_another_box(rows, index):
    """The rows, with the first box of one row one tenth narrower."""

    def change(row):
        if row["extra_info"]["index"] == index:
            box = row["extra_info"]["boxes"][0][0]
            box[2] = box[0] + 0.9 * (box[2] - box[0])
        return row

    return rows.map(change)


if not ray.is_initialized():  # the launcher; the task runner is a process of its Ray
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "driver.pid").write_text(str(os.getpid()))
else:
    observe()
    if KILLED:
        {"rollout": kill_in_rollout, "update": kill_in_update, "save": kill_in_save}[KILLED]()
    if os.environ.get("SAYO_CONTROLS"):
        repeat_with_controls()
