"""Ends a run that no longer advances, whose processes died, or that was asked to end. It runs in the launcher.

verl waits without a limit in many places: for rollouts, for the weights of a dead vLLM engine, for a placement group.
So a thread beside ``run_ppo`` reads the trainer's phase from the board and looks at the run's processes. Another one
waits for signals. Each end is the same: the run card, the page, how to resume, the end of the run's processes on this
machine, and one last line. On a cluster that the run joined, Ray ends the job's other processes with the launcher.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any, Self

import ray
from omegaconf import DictConfig
from ray.exceptions import RayError

from sayo_verl.errors import SayoError
from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.phase_names import OF_TIMER, SERVERS, START
from sayo_verl.hooks.phases import TOPIC
from sayo_verl.hooks.processes import ANSWER_S, SERVER, Actor, activity_of, actors_of_this_job
from sayo_verl.launch.ending import record_end, report_at_end, say_how_to_resume
from sayo_verl.launch.limits import OFF, read_limits
from sayo_verl.launch.reaper import announce_end, end_processes, start_reaper

LOOK_S, HEALTH_S = 5.0, 10.0  # between two looks at the processes, and between two questions to vLLM's servers
CLOSE_S = 60.0  # for the page and the last lines
DEAD_S = 30.0  # in which verl can end a run whose process died by itself, with its own message
WATCHER = "SAYO_WATCHED_BY"  # process id of `sayo watch`, which starts the launcher
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILED, GONE = 1, 129


class Watchdog:
    """Context around ``run_ppo``; enter it in the main thread.

    Args:
        config: of the run.
        token: of the run; the variable ``RUN_TOKEN`` of its processes.

    Raises:
        SayoError: X10 for an invalid limit.
    """

    def __init__(self, config: DictConfig, token: str) -> None:
        self.config, self.token, self.limits = config, token, read_limits(config)
        self._ending = threading.Lock()
        self._done = threading.Event()
        self._reaper = 0
        self._watcher = int(os.environ.get(WATCHER, 0))
        self._watcher *= self._watcher == os.getppid()
        self._message: tuple[float, str, int] = (0.0, START, 0)
        self._step_seconds: list[float] = []
        self._changed = time.monotonic()
        self._dead: dict[int, float] = {}
        self._addresses: dict[str, str] = {}
        self._refused: dict[str, int] = {}
        self._asked = 0.0

    def __enter__(self) -> Self:
        os.environ[RUN_TOKEN] = self.token  # for Ray's own processes, which this one starts
        self._reaper = start_reaper(RUN_TOKEN, self.token)
        self._signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self.take_signals()
        for target in (self._listen, self._watch):
            threading.Thread(target=target, daemon=True, name=f"sayo {target.__name__}").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends this process; what verl raises now is a consequence
        self._done.set()
        announce_end()
        signal.set_wakeup_fd(-1)
        for signum in SIGNALS:  # so that a signal ends this process while it writes its page
            if signal.getsignal(signum) is _taken:
                signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def take_signals(self) -> None:
        """Leave signals to the thread. Ray installs a handler at its start, so this is called again after it."""
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup and background jobs rely on that
                signal.signal(signum, _taken)

    def runner(self, cls: Any) -> "_Runner":
        """The class of a task runner, for ``run_ppo``."""
        return _Runner(cls, self)

    # ------------------------------------------------------------------------------------------------------- signals

    def _listen(self) -> None:
        """Wait for a signal, or for the end of `sayo watch`, which shows and stops the run."""
        while not self._done.is_set():
            if select.select([self._signals], [], [], 1.0)[0]:
                # The first byte that is one of ours: Python writes one for each signal with a handler
                for signum in os.read(self._signals, 64):
                    if signum in SIGNALS:
                        name = signal.Signals(signum).name
                        self._end(f"sayo-verl: stopped by {name}", f"stopped by {name}", 128 + signum)
            elif self._watcher and os.getppid() != self._watcher:
                error = SayoError(
                    "X14",
                    "`sayo watch`, which started this run, has ended",
                    where=f"process {self._watcher}",
                    got="it was killed",
                    fix="start the script again with RESUME=FOLDER; to run without `sayo watch`, call scripts/run.sh",
                )
                self._end(str(error), str(error), GONE)

    # -------------------------------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        while not self._done.wait(LOOK_S):
            if not ray.is_initialized():
                continue
            try:
                self._read_board()
                actors = actors_of_this_job()
                error = self._dead_actor(actors) or self._dead_server(actors) or self._silent(actors)
            except RayError as lost:  # no answer of Ray is no answer about the run; the limit goes on
                print(f"sayo-verl: the watchdog got no answer of Ray: {lost}", file=sys.stderr, flush=True)
                error = self._silent([])
            if error:
                self._end(str(error), str(error), FAILED)

    def _read_board(self) -> None:
        for message in board.read(TOPIC, token=self.token):
            if message["time"] != self._message[0]:
                self._message = (message["time"], message["phase"], message["step"])
                self._step_seconds, self._changed = message["seconds"], time.monotonic()

    def _dead_actor(self, actors: list[Actor]) -> SayoError | None:
        now = time.monotonic()
        for actor in actors:
            if actor.died and now - self._dead.setdefault(actor.pid, now) >= DEAD_S:
                return SayoError(
                    "X13",
                    f"a process of the run died, and verl waits for it in {self._phase()}",
                    where=str(actor),
                    got=actor.died,
                    fix="look for its last lines in the log; if the kernel ended it, `dmesg | grep -i oom`",
                )
        return None

    def _dead_server(self, actors: list[Actor]) -> SayoError | None:
        """Ask vLLM's servers for the health of their engines."""
        if time.monotonic() - self._asked < HEALTH_S or self._message[1] == START:
            return None
        self._asked = time.monotonic()
        for actor in actors:
            if not (actor.alive and actor.name.startswith(SERVER) and actor.kind == SERVERS):
                continue
            if why := self._why_ill(actor):
                return SayoError(
                    "X12",
                    f"vLLM's engine is dead, and verl waits for it in {self._phase()}",
                    where=f"{actor}, http://{self._addresses[actor.name]}/health",
                    got=why,
                    fix="look for EngineCore in the log; if the kernel ended it, `dmesg | grep -i oom`, and lower "
                    "actor_rollout_ref.rollout.gpu_memory_utilization",
                )
        return None

    def _why_ill(self, actor: Actor) -> str:
        if actor.name not in self._addresses:
            if not actor.name.endswith("_0"):
                return ""  # only the first node of a server has an address
            try:
                server: Any = ray.get_actor(actor.name)
                host, port = ray.get(server.get_server_address.remote(), timeout=ANSWER_S)
            except (RayError, ValueError):  # busy or without a name any more: the limit of the phase holds
                return ""
            self._addresses[actor.name] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # No proxy of the environment: it is this cluster's own address
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            opener.open(f"http://{self._addresses[actor.name]}/health", timeout=ANSWER_S).close()
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}" if error.code in (500, 503) else ""
        except TimeoutError:
            return ""  # a busy server
        except OSError as error:
            self._refused[actor.name] = self._refused.get(actor.name, 0) + 1
            return str(error) if self._refused[actor.name] > 1 else ""
        self._refused[actor.name] = 0
        return ""

    def _phase(self) -> str:
        _, phase, step = self._message
        return f"phase {phase} of step {step} ({OF_TIMER[phase].says if phase in OF_TIMER else 'the trainer itself'})"

    def _silent(self, actors: list[Actor]) -> SayoError | None:
        limit = self.limits.of_phase(self._message[1], self._step_seconds)
        silent = time.monotonic() - self._changed
        if limit is None or silent < limit:
            return None
        setting = "sayo.start_limit" if limit == self.limits.start_s else "sayo.step_limit"
        kinds = OF_TIMER[self._message[1]].actors if self._message[1] in OF_TIMER else ()
        runners = [actor for actor in actors if actor.alive and actor.kind.endswith(("TaskRunner", "TaskRunnerV1"))]
        found = activity_of([a for a in actors if a.alive and a.kind in kinds] or runners)
        # A stopped or lost process first, then those that wait although it is their phase
        found.sort(key=lambda entry: (entry[1].startswith("uses"), entry[1] == "waits"))
        return SayoError(
            "X11",
            f"the run does not advance: nothing happened for {silent:.0f} s in {self._phase()}",
            where="; ".join(f"{actor}: {what}" for actor, what in found[:4])
            or "Ray: the trainer has not started, or does not answer",
            got=f"{len(found)} processes work in this phase" if found else "no process of this phase",
            wanted=f"a new phase or rollout within {limit:.0f} s",
            fix="look at that process's last lines in the log, and resume; if it only needs more time, set "
            f"{setting}=SECONDS or {OFF} (docs/running.md)",
        )

    # ------------------------------------------------------------------------------------------------------------- end

    def _end(self, last: str, cause: str, code: int) -> None:
        """End this process and the run's others on this machine. The main thread stays where it is."""
        if not self._ending.acquire(blocking=False):
            return  # run_ppo has returned
        try:
            # In a thread with a limit: the disk or the pipe of the output may be what hangs
            closing = threading.Thread(target=self._close, args=(cause,), daemon=True, name="sayo _close")
            closing.start()
            closing.join(CLOSE_S)
            end_processes(f"{RUN_TOKEN}={self.token}", spared=(self._reaper,))
            _say(last)
        finally:
            os._exit(code)

    def _close(self, cause: str) -> None:
        """Record the end, write the page, say how to resume; one that fails does not stop the others."""
        for step in (
            lambda: record_end(self.config, SystemExit(cause)),
            lambda: report_at_end(self.config),
            lambda: say_how_to_resume(self.config),
        ):
            try:
                step()
            except Exception as error:  # noqa: BLE001 (the process ends; the cause is the last line)
                _say(f"sayo-verl: {type(error).__name__} at the end of the run: {error}")


def _say(line: str) -> None:
    """Print to the error output, also if nobody reads the output any more."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is sys.stderr:
                print(line, file=stream)
            stream.flush()


def _taken(*_: Any) -> None:
    """The handler of signals that ``_listen`` reads."""


class _Runner:
    """A class of task runners as ``run_ppo`` uses it; called right after Ray's start."""

    def __init__(self, cls: Any, watchdog: Watchdog) -> None:
        self._cls, self._watchdog = cls, watchdog

    def options(self, **kwargs: Any) -> "_Runner":
        """As of Ray."""
        return _Runner(self._cls.options(**kwargs), self._watchdog)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """As of Ray."""
        self._watchdog.take_signals()
        return self._cls.remote(*args, **kwargs)
