"""A run whose trainer, engine or processes are silent ends with one line, and nothing of it is left."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from support.processes import gone

from sayo_verl.errors import SayoError
from sayo_verl.hooks import processes, watchdog
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.processes import Actor
from sayo_verl.hooks.watchdog import Watchdog
from sayo_verl.launch.limits import Limits, read_limits
from sayo_verl.launch.reaper import end_processes, processes_with


def config(**sayo):
    return OmegaConf.create({"sayo": {"step_limit": "auto", "start_limit": 3600, "reward_limit": 300, **sayo}})


def actor(kind="WorkerDict", name="", pid=0, **more):
    return Actor(kind, name, pid or os.getpid(), "here", "10.0.0.1", more.get("alive", True), more.get("died", ""))


def test_the_limit_follows_the_median_step_and_long_phases_have_their_own():
    limits = read_limits(config())
    assert limits == Limits(0.0, 3600.0, 300.0)
    assert limits.of_phase("gen", []) == 3600, "the first step compiles and warms up"
    assert limits.of_phase("gen", [2.0, 2.0, 50.0]) == 600
    assert limits.of_phase("update_actor", [70.0, 100.0, 5000.0]) == 1000
    assert limits.of_phase("save_checkpoint", [2.0]) == 3600
    assert limits.of_phase("save_checkpoint", [900.0]) == 9000
    own = read_limits(config(step_limit=20, start_limit=60))
    assert (own.of_phase("gen", [9.0]), own.of_phase("start", [])) == (20, 60)


@pytest.mark.parametrize("off", ["off", False])
def test_limits_can_be_off(off):
    limits = read_limits(config(step_limit=off, start_limit=off, reward_limit=off))
    assert limits == Limits(None, None, None)
    assert limits.of_phase("gen", [1.0]) is limits.of_phase("start", []) is None
    assert read_limits(OmegaConf.create({})) == limits, "a run of verl's own launcher has none"


def test_one_limit_that_is_off_leaves_the_other():
    assert Limits(None, 3600.0, 300.0).of_phase("start", []) == 3600
    assert Limits(None, 3600.0, 300.0).of_phase("gen", [1.0]) is None
    assert Limits(0.0, None, 300.0).of_phase("gen", []) is None
    assert Limits(0.0, None, 300.0).of_phase("gen", [1.0]) == 600


@pytest.mark.parametrize("key", ["step_limit", "start_limit", "reward_limit"])
@pytest.mark.parametrize("value", [0, -1, "soon", True, None, float("inf"), float("nan")])
def test_a_limit_that_is_no_time_is_refused(key, value):
    with pytest.raises(SayoError) as caught:
        read_limits(config(**{key: value}))
    assert (caught.value.code, caught.value.where) == ("X10", f"sayo.{key}")


@pytest.fixture
def dog(monkeypatch):
    """A watchdog that is not entered, in a run that has reached the update of step 3."""
    monkeypatch.setattr(processes.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    dog = Watchdog(config(step_limit=20), "token")
    dog._message, dog._step_seconds = (1.0, "update_actor", 3), [2.0]
    return dog


def test_a_silent_phase_names_the_process_that_is_stopped(dog):
    idle, sleeper = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        assert dog._silent([]) is None
        dog._changed -= 25
        sleeper.send_signal(19)
        error = dog._silent([actor(pid=idle.pid), actor(pid=sleeper.pid), actor("RewardLoopWorker")])
    finally:
        for process in (idle, sleeper):
            process.kill()
            process.wait()
    assert error.code == "X11"
    stopped, waits = (f"WorkerDict (pid {process.pid} on 10.0.0.1)" for process in (sleeper, idle))
    assert error.where == f"{stopped}: stopped; {waits}: waits"
    assert "phase update_actor of step 3 (update of the actor)" in error.what
    assert "got 2 processes work in this phase, wanted a new phase or rollout within 20 s" in str(error)
    assert "sayo.step_limit=SECONDS or off" in error.fix


def test_a_trainer_that_never_starts_names_the_limit_of_the_start(dog):
    dog._message, dog._step_seconds = (0.0, "start", 0), []
    dog._changed -= 3601
    error = dog._silent([])
    assert "Ray: the trainer has not started" in error.where
    assert "sayo.start_limit=SECONDS" in error.fix


def test_a_dead_process_ends_the_run_if_verl_does_not(dog):
    dead = actor("AgentLoopWorkerTQ", died="Worker exit type: SYSTEM_ERROR")
    assert dog._dead_actor([dead]) is None, "verl may say it itself"
    dog._dead[dead.pid] -= watchdog.DEAD_S
    error = dog._dead_actor([dead])
    assert error.code == "X13"
    assert f"AgentLoopWorkerTQ (pid {dead.pid} on 10.0.0.1)" in error.where
    assert error.got == "Worker exit type: SYSTEM_ERROR"


@pytest.mark.parametrize(
    ("reason", "message", "died"),
    [
        ("WORKER_DIED", "its process died\n unexpectedly", "its process died unexpectedly"),
        ("WORKER_DIED", "exit type: INTENDED_USER_EXIT", ""),
        ("RAY_KILL", "ray.kill", ""),
        ("OUT_OF_SCOPE", "no handle", ""),
    ],
)
def test_only_a_death_that_nobody_asked_for_counts(reason, message, died):
    from ray.core.generated import common_pb2

    cause = common_pb2.ActorDeathCause()
    cause.actor_died_error_context.reason = common_pb2.ActorDiedErrorContext.Reason.Value(reason)
    cause.actor_died_error_context.error_message = message
    entry = {"ActorClassName": "make.<locals>.WorkerDict", "Name": "", "Pid": 7, "State": "DEAD", "DeathCause": cause}
    found = processes._actor({**entry, "Address": {"NodeID": "n", "IPAddress": "1.2.3.4"}})
    assert (found.kind, found.died) == ("WorkerDict", died)


@pytest.fixture
def server():
    """vLLM's health route, with the answers of ``codes``, the last for ever."""
    codes = deque([200])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(codes.popleft() if len(codes) > 1 else codes[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield codes, running
        running.shutdown()


def test_a_dead_engine_is_found_by_its_health(dog, server):
    codes, running = server
    vllm = actor("vLLMHttpServer", "vllm_server_0_0")
    dog._addresses[vllm.name] = f"127.0.0.1:{running.server_port}"
    ask = lambda: dog._dead_server([vllm, actor("WorkerDict")])  # noqa: E731
    assert ask() is None
    codes.append(503)
    codes.popleft()
    assert ask() is None, "not asked again at once"
    dog._asked = 0.0
    error = ask()
    assert error.code == "X12"
    assert error.got == "HTTP 503"
    assert "vllm_server_0_0" in error.where
    running.shutdown()
    running.server_close()
    dog._asked = 0.0
    assert ask() is None, "one refused connection is not yet a dead server"
    dog._asked = 0.0
    assert "refused" in ask().got


RUN = """
import os, subprocess, sys, time
from sayo_verl.launch.reaper import start_reaper
os.environ["SAYO_RUN_TOKEN"] = sys.argv[1]
start_reaper("SAYO_RUN_TOKEN", sys.argv[1])
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
stopped = subprocess.Popen(["sleep", "99"], start_new_session=True)
stopped.send_signal(19)
print(child.pid, stopped.pid, flush=True)
time.sleep(99)
"""


def test_nothing_is_left_of_a_run_whose_launcher_is_killed(tmp_path, monkeypatch):
    token = f"reaper-{os.getpid()}"
    with (tmp_path / "said").open("wb") as said:
        launcher = subprocess.Popen([sys.executable, "-c", RUN, token], stdout=subprocess.PIPE, stderr=said)
    left = [int(pid) for pid in launcher.stdout.readline().split()]
    other = subprocess.Popen(["sleep", "99"], env={**os.environ, RUN_TOKEN: token + "0"})
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 20
    while not all(map(gone, left)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, left)), "one ignores SIGTERM, one is stopped"
    assert other.poll() is None, "a process of another run"
    other.kill()
    other.wait()
    while "ended" not in Path(tmp_path / "said").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "sayo-verl: ended 2 processes that the run left" in Path(tmp_path / "said").read_text()


def test_only_the_processes_with_the_mark_are_ended():
    mark = f"SAYO_TEST_MARK={os.getpid()}"
    name, value = mark.split("=")
    ours = subprocess.Popen(["sleep", "99"], env={**os.environ, name: value})
    spared = subprocess.Popen(["sleep", "99"], env={**os.environ, name: value})
    try:
        assert end_processes(mark, spared=(spared.pid,)) == {ours.pid: "sleep"}
        assert ours.wait(5) == -15
        assert processes_with(mark) == {spared.pid: "sleep"}
    finally:
        spared.kill()
        spared.wait()


def test_a_process_whose_title_hides_its_environment_is_found_by_its_parent():
    """As Ray's agents are: children of the raylet, also after it died."""
    name, value = "SAYO_TEST_TITLE", str(os.getpid())
    starts = "import subprocess as s; print(s.Popen(['sleep', '99'], env={}).pid, flush=True); input()"
    raylet = subprocess.Popen(
        [sys.executable, "-c", starts], env={**os.environ, name: value}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    agent = int(raylet.stdout.readline())
    assert processes_with(f"{name}={value}").keys() == {raylet.pid, agent}
    raylet.kill()
    raylet.wait()
    assert processes_with(f"{name}={value}") == {agent: "sleep"}
    assert end_processes(f"{name}={value}") == {agent: "sleep"}
    assert gone(agent)
    assert not processes_with(f"{name}={value}")


def test_the_run_ends_if_the_command_that_shows_it_is_killed(dog, monkeypatch):
    ended = []
    read_end, _ = os.pipe()
    dog._signals, dog._watcher = read_end, os.getppid() + 10**7

    def end(last, cause, code):
        ended.append((last, code))
        dog._done.set()

    monkeypatch.setattr(dog, "_end", end)
    dog._listen()
    assert ended[0][0].startswith("SAYO-X14: `sayo watch`")
    assert ended[0][1] == 129


ENDING = """
import os, signal, subprocess, sys, threading
from omegaconf import OmegaConf
from sayo_verl.hooks import watchdog

def fail(config):
    raise OSError(28, "No space left on device")

watchdog.report_at_end = fail
watchdog.say_how_to_resume = lambda config: print("to resume", flush=True)
config = OmegaConf.create({"sayo": {}, "trainer": {"logger": ["console"]}})
with watchdog.Watchdog(config, "token-of-" + str(os.getpid())):
    child = subprocess.Popen(["sleep", "60"])
    print(child.pid, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(40)
"""


@pytest.mark.parametrize("reader", ["that listens", "that has gone"])
def test_a_signal_ends_the_run_although_its_page_cannot_be_written_and_nobody_reads_its_output(reader):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    launcher = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ENDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    if reader == "that has gone":
        launcher.stdout.close()
    child = int(launcher.stderr.readline())
    said = launcher.stderr.read().decode().splitlines()
    assert launcher.wait(30) == 143
    assert gone(child)
    assert "OSError at the end of the run: [Errno 28]" in said[0]
    assert said[-1] == "sayo-verl: stopped by SIGTERM"
