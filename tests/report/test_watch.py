"""Watching a process that writes a run folder."""

import importlib.util
import io
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.processes import gone
from support.report_runs import (
    attempt,
    line,
    write_run,
)

from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.log import PHASES
from sayo_verl.report.watch import Pace, duration, run_and_watch, watch

QUICK = Pace(poll=0.02)
START = """
import json, os, signal, subprocess, sys, time
def say(text): print(text, flush=True)
def log(step, **data):
    with open("metrics.jsonl", "ab") as file: file.write(json.dumps({"step": step, "data": data}).encode() + b"\\n")
"""


def follow(folder: Path, script: str, total_steps: int | None = 2, pace: Pace = QUICK, console: Console | None = None):
    """Run ``script`` in ``folder`` as the training process; returns (exit code, what was shown)."""
    folder.mkdir(exist_ok=True)
    console = console or Console(file=io.StringIO(), width=200)
    code = f"import os; os.chdir({str(folder)!r})\n{START}{textwrap.dedent(script)}"
    result = run_and_watch([sys.executable, "-c", code], folder, total_steps, pace=pace, console=console)
    return result, console.file.getvalue() if isinstance(console.file, io.StringIO) else ""


def test_watch_shows_phases_and_steps(tmp_path):
    script = """
    say("ray init kwargs: {}")
    say("\\x1b[36m(TaskRunnerV1 pid=1)\\x1b[0m INFO:2026:create worker group dict_keys(['actor'])")
    say("(TaskRunnerV1 pid=1) Using dataset class: late line of an earlier phase")
    time.sleep(0.1)
    log(0, **{"val-core/sayo/scenes/acc/mean@1": 0.25})
    log(1, **{"critic/rewards/mean": 1.5, "sayo/region_reward/mean": -0.125, "sayo/target_attention/mean": 0.4375,
              "sayo/accuracy/mean": 0.75})
    time.sleep(0.1)
    log(2, **{"critic/rewards/mean": None})
    """
    code, shown = follow(tmp_path, script)
    assert code == 0
    order = [
        "starting Ray",
        "loading the model",
        "validated at step 0  validation accuracy 0.250",
        "step 1/2",
        "step 2/2",
    ]
    places = [shown.index(text) for text in [*order, "done: step 2/2"]]
    assert places == sorted(places)
    assert "reading the data" not in shown
    assert "reward 1.500  accuracy 0.750  r_v -0.125  R_a 0.438" in shown
    assert "reward nan  accuracy not measured  r_v not measured" in shown
    assert "create worker group" in (tmp_path / r.LOG_FILE).read_text()


def test_each_phase_is_known_by_a_line_that_verl_and_ray_can_print():
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("verl", "ray")]
    files = [
        "trainer/main_ppo.py",
        "trainer/ppo/v1/trainer_base.py",
        "utils/dataset/rl_dataset.py",
        "utils/tracking.py",
    ]
    files += ["single_controller/ray/base.py", "workers/rollout/vllm_rollout/vllm_async_server.py"]
    source = "".join((roots[0] / file).read_text() for file in files)
    source += (roots[1] / "_private/worker.py").read_text()
    for pattern, phase in PHASES:
        for text in pattern.pattern.split("|"):
            literal = re.sub(r"\\?\['serve',", '["serve",', text).replace("\\", "").lstrip("^")
            literal = literal[literal.index("Initial") :] if "Initial" in literal else literal
            assert literal.rstrip() in source, phase


def test_watch_says_why_a_run_failed(tmp_path):
    script = "say('(A pid=3) sayo_verl.errors.SayoError: SAYO-P03: no layer 36 | fix: y'); say('noise'); sys.exit(3)"
    code, shown = follow(tmp_path / "named", script)
    assert code == 3
    assert "\nSAYO-P03: no layer 36 | fix: y\n" in shown
    assert "noise" not in shown
    assert str(tmp_path / "named" / r.LOG_FILE) in shown
    code, shown = follow(tmp_path / "unnamed", "raise ValueError('what happened')")
    assert code == 1
    assert "\nValueError: what happened\n" in shown


def test_watch_follows_the_metrics_file_of_a_resumed_run(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0)
    script = "; ".join(
        [
            "import json, os",
            "file = open(os.environ['VERL_FILE_LOGGER_PATH'], 'wb', buffering=0)",
            "row = {'critic/rewards/mean': 1.0}",
            "[file.write(json.dumps({'step': n, 'data': row}).encode() + b'\\n') for n in (3, 4)]",
        ]
    )
    shown = io.StringIO()
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(tmp_path / "metrics-2.jsonl")}
    console = Console(file=shown, width=200)
    assert run_and_watch([sys.executable, "-c", script], tmp_path, 4, environment, pace=QUICK, console=console) == 0
    assert "step 3/4" in shown.getvalue()
    assert "done: step 4/4" in shown.getvalue()
    assert "step 1/4" not in shown.getvalue()


def test_watch_takes_steps_and_metrics_file_from_the_card_of_the_run(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0, total_steps=2)
    script = f"""
    time.sleep(0.5)
    card = {{"total_steps": 4, "metrics": "{tmp_path}/metrics-2.jsonl"}}
    open("run-2.json", "w").write(json.dumps(card))
    with open("metrics-2.jsonl", "w") as file:
        file.writelines(json.dumps({{"step": n, "data": {{"critic/rewards/mean": 1.0}}}}) + "\\n" for n in (3, 4))
    """
    code, shown = follow(tmp_path, script, total_steps=None)
    assert code == 0
    assert "step 3/4" in shown
    assert "done: step 4/4" in shown
    code, shown = follow(tmp_path / "other", "log(1)", total_steps=None)
    assert "done: step 1/?" in shown


def test_watch_warns_of_an_early_end_and_of_a_broken_line(tmp_path):
    code, shown = follow(
        tmp_path, "open('metrics.jsonl', 'w').write('{broken\\n'); log(1, **{'critic/rewards/mean': 1})"
    )
    assert code == 0
    assert "warning: SAYO-R01" in shown
    assert "warning: the run ended early, at step 1/2" in shown
    _, shown = follow(tmp_path / "at once", "")
    assert "warning: the run ended before step 1 (starting), with exit code 0" in shown


def test_watch_prints_a_heartbeat_in_silence_and_warns_once_per_stall(tmp_path):
    _, shown = follow(tmp_path, "say('ray init kwargs: {}'); time.sleep(1.3)", pace=Pace(0.02, 0.15, 0.5))
    # Far fewer than the 65 looks; the margins are for a busy machine.
    assert 2 <= shown.count("still in: starting Ray") <= 12
    assert 2 <= shown.count("warning: no step for") <= 4


def test_watch_shows_nothing_of_an_earlier_attempt(tmp_path):
    write_run(tmp_path, *(line(n, **{c.REWARD.name: 9.0}) for n in (1, 2, 3)))
    (tmp_path / r.LOG_FILE).write_text("SAYO-D01: old\n")
    # verl's file logger empties its file at the start.
    _, shown = follow(
        tmp_path, "open('metrics.jsonl', 'w'); time.sleep(0.2); log(3, **{'critic/rewards/mean': 1.0}); sys.exit(1)"
    )
    assert "9.000" not in shown
    assert "SAYO-D01" not in shown
    assert "step 3/2  reward 1.000" in shown
    assert (tmp_path / r.LOG_FILE).read_text().startswith("SAYO-D01")


SLEEPER = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
{setup}
open("ready", "w").write(str(child.pid))
time.sleep(30)
"""


def signal_when_ready(folder: Path, *signums: int) -> threading.Thread:
    def send() -> None:
        while not (folder / "ready").exists() or not (folder / "ready").read_text():
            time.sleep(0.01)
        for signum in signums:
            os.kill(os.getpid(), signum)
            time.sleep(0.2)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def interruptible():
    """Ctrl-C as on a terminal, also where the tests run in the background and inherit it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_whole_process_group(tmp_path, signum):
    handler = signal.getsignal(signum)
    thread = signal_when_ready(tmp_path, signum)
    # The default action: Python would turn SIGINT into a KeyboardInterrupt.
    code, shown = follow(tmp_path, SLEEPER.format(setup="signal.signal(signal.SIGINT, signal.SIG_DFL)"))
    thread.join()
    assert code == 128 + signum
    assert f"{signum.name}: passed to the run" in shown
    assert "stopped: before step 1 (starting)" in shown
    child = int((tmp_path / "ready").read_text())
    deadline = time.monotonic() + 5
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(child)
    assert signal.getsignal(signum) is handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_kills_a_run_that_ignores_the_first(tmp_path):
    thread = signal_when_ready(tmp_path, signal.SIGINT, signal.SIGINT)
    code, shown = follow(tmp_path, SLEEPER.format(setup="signal.signal(signal.SIGINT, signal.SIG_IGN)"))
    thread.join()
    assert code == 128 + signal.SIGKILL
    assert "SIGINT: killed the run" in shown


def test_a_run_is_ended_when_watching_it_fails(tmp_path):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no terminal any more")

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
    with pytest.raises(OSError, match="no terminal"):
        watch(tmp_path, process, 2, pace=Pace(0.02, 0.05), console=Console(file=Broken()))
    assert process.returncode == -signal.SIGTERM


def test_on_a_terminal_a_live_area_shows_phase_and_steps(tmp_path):
    ours, theirs = pty.openpty()
    script = (
        "say('ray init kwargs: {}'); time.sleep(0.4); log(1, **{'critic/rewards/mean': 1.25}); time.sleep(0.4); log(2)"
    )
    shown = bytearray()

    def read() -> None:
        while b"done" not in shown:
            shown.extend(os.read(ours, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with open(theirs, "w") as terminal:
        console = Console(file=terminal, width=100, force_terminal=True, force_interactive=True)
        code, _ = follow(tmp_path, script, console=console)
        terminal.flush()
        reader.join(timeout=5)
    os.close(ours)
    text = shown.decode()
    assert code == 0
    assert "starting Ray  0 s" in text
    assert "step 1/2" in text
    assert "reward 1.250  accuracy not measured" in text
    assert "done: step 2/2" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
