"""Live view of a training process from the files it writes: the phase before step 1, then steps and metrics.

On a terminal it shows one or two live lines. Elsewhere (CI, a log file) it prints a plain line per phase and step, and
a heartbeat.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from types import FrameType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sayo_verl.report import runs as r
from sayo_verl.report.log import Follower, why_it_failed
from sayo_verl.report.progress import Pace, Progress, duration

LOGGER_PATH = "VERL_FILE_LOGGER_PATH"
WATCHED_BY = "SAYO_WATCHED_BY"  # process id of this process: the launcher ends if this process is killed
GROUP_S = 20.0  # from a signal to the process to the same signal to its group, if it has not ended


def run_and_watch(
    command: Sequence[str],
    run_dir: Path | str,
    total_steps: int | None = None,
    env: Mapping[str, str] | None = None,
    *,
    pace: Pace | None = None,
    console: Console | None = None,
) -> int:
    """Start ``command`` in a new session, append its output to run_dir/train.log, and watch it until it ends.

    Args:
        command: program and arguments.
        run_dir: folder of the run; created if missing. Output of earlier attempts is not shown again. Metrics are read
            from the file that the launcher's run card names. Without a card it is VERL_FILE_LOGGER_PATH of ``env``, or
            metrics.jsonl in this folder.
        total_steps: training steps of the command; None: those of the run card.
        env: its whole environment (default: this process's). PYTHONUNBUFFERED=1 is added, so that phases show at once.
        pace, console: as for :func:`watch`.

    Returns:
        The exit code, as :func:`watch`.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    environment = {"PYTHONUNBUFFERED": "1", **(os.environ if env is None else env)}
    # The file that verl's file logger will write; a resumed run has a separate one.
    environment[WATCHED_BY] = str(os.getpid())
    log_file, metrics_file = run_dir / r.LOG_FILE, Path(environment.get(LOGGER_PATH) or run_dir / r.METRICS_FILE)
    old_log, old_metrics = (file.stat().st_size if file.exists() else 0 for file in (log_file, metrics_file))
    with log_file.open("ab") as log:
        process = Popen(
            list(command), stdin=DEVNULL, stdout=log, stderr=STDOUT, env=environment, start_new_session=True
        )
    return watch(
        run_dir,
        process,
        total_steps,
        pace=pace,
        console=console,
        log_offset=old_log,
        metrics_offset=old_metrics,
        metrics_file=metrics_file,
    )


def watch(
    run_dir: Path | str,
    process: Popen,
    total_steps: int | None = None,
    *,
    pace: Pace | None = None,
    console: Console | None = None,
    log_offset: int = 0,
    metrics_offset: int = 0,
    metrics_file: Path | None = None,
) -> int:
    """Show the progress of a running training process until it ends.

    Ctrl-C, SIGTERM and SIGHUP are passed to the process, which ends its own, and after 20 s to its process group. This
    function waits for its end. A second signal kills the group. This works only in the main thread, because Python
    delivers signals only there. If watching fails, the run is stopped. What is left of the group then gets SIGTERM.

    Args:
        run_dir: folder of train.log and metrics.jsonl.
        process: writes its output to train.log; best started in a new session.
        total_steps: training steps of the process; None: those of the run card that it writes.
        console: output; default stdout.
        log_offset, metrics_offset: bytes of the two files from earlier attempts.
        metrics_file: if not run_dir/metrics.jsonl.

    Returns:
        The exit code of the process; 128 + n if signal n ended it, as in shells.
    """
    metrics = Follower(metrics_file or Path(run_dir) / r.METRICS_FILE, metrics_offset)
    progress = Progress(Path(run_dir), total_steps, pace or Pace(), log_offset, metrics)
    display = _Display(console or Console(), progress)
    with _signals_passed_to(process) as received, display.live or contextlib.nullcontext():
        try:
            shown, first = 0, 0.0
            while True:
                # before the files are read, so that its last output is read too
                ended = process.poll() is not None
                display.show(progress.update(), ended=ended)
                for signum in received[shown:]:
                    done = "killed the run" if shown else "passed to the run, waiting for its end (again: kill it)"
                    display.warn(f"{signal.Signals(signum).name}: {done}")
                    shown, first = shown + 1, first or time.monotonic()
                if first and time.monotonic() - first > GROUP_S:
                    # The leader alone, such as a shell that waits for a command, may not pass it on
                    _signal_group(process, received[0])
                    first = time.monotonic()
                if ended:
                    break
                with contextlib.suppress(TimeoutExpired):
                    process.wait(timeout=progress.pace.poll)
        finally:
            if process.poll() is None:
                _signal_group(process, signal.SIGTERM)
                process.wait()
            _end_group(process)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    display.conclude(code, stopped=bool(received), log_offset=log_offset)
    return code


class _Display:
    """Display of progress: a live area on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._spinner = Spinner("dots")
        self._last_line = time.monotonic()
        # isatty as well, because with FORCE_COLOR, which CI services set, rich takes a log file for a terminal
        self.live: Live | None = None
        if console.is_interactive and console.file.isatty():
            self.live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def show(self, events: list[tuple[str, str]], *, ended: bool) -> None:
        """Show new events; without a terminal also a heartbeat after some silence."""
        for kind, line in events:
            if kind == "warning":
                self.warn(line)
            elif self.live is None:
                self._say(line)
        progress, now = self._progress, time.monotonic()
        if self.live is None and not ended and now - self._last_line >= progress.pace.heartbeat:
            doing = f"step {progress.of_total(progress.step + 1)}" if progress.step else progress.phase
            self._say(f"still in: {doing}; last log line {duration(now - progress.logged)} ago")

    def warn(self, line: str) -> None:
        """Print a line that stays on the screen."""
        self._say(f"warning: {line}", "yellow")

    def conclude(self, code: int, *, stopped: bool, log_offset: int) -> None:
        """Print the result: done, stopped, or the cause of the failure and the path of the log."""
        progress = self._progress
        at_step = f"step {progress.of_total(progress.step)}"
        reached = at_step if progress.step else f"before step 1 ({progress.phase})"
        if code == 0 and progress.step >= (progress.total or 1):
            self._say(f"done: {reached}", "green")
        elif code == 0:
            ended = f"early, at {at_step}" if progress.step else reached
            self.warn(f"the run ended {ended}, with exit code 0; log: {progress.log}")
        elif stopped:
            self._say(f"stopped: {reached}, exit code {code}; log: {progress.log}", "yellow")
        else:
            self._say(f"the run failed: {reached}, exit code {code}", "bold red")
            self._say(f"log: {progress.log}")
            self._console.print(Text("\n".join(why_it_failed(progress.log, offset=log_offset))), soft_wrap=True)

    def _say(self, line: str, style: str = "") -> None:
        self._last_line = time.monotonic()
        stamp = f"[{duration(self._last_line - self._progress.started)}]"
        self._console.print(Text(f"{stamp} {line}", style=style), soft_wrap=True)

    def _render(self) -> RenderableType:
        progress, now = self._progress, time.monotonic()
        if not progress.step:
            self._spinner.update(text=Text(f"{progress.phase}  {duration(now - progress.started)}"))
            return self._spinner
        row = Table.grid(padding=(0, 2))
        row.add_row(
            f"step {progress.of_total(progress.step)}",
            ProgressBar(total=progress.total, completed=progress.step, width=20),
            progress.eta(),
            f"last step {duration(now - progress.step_started)} ago",
        )
        return Group(row, Text(progress.numbers()))


@contextlib.contextmanager
def _signals_passed_to(process: Popen) -> Iterator[list[int]]:
    """Pass Ctrl-C, SIGTERM and SIGHUP to the process, and yield the list of received signals."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def pass_on(signum: int, _: FrameType | None) -> None:
        # No printing here, because another print may be in progress.
        if received:
            _signal_group(process, signal.SIGKILL)
        else:
            process.send_signal(signum)
        received.append(signum)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    # An ignored signal stays ignored, because nohup and background jobs of a script rely on it.
    before = {signum: handler for signum, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, pass_on)
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _signal_group(process: Popen, signum: int) -> None:
    if process.returncode is not None:
        return  # reaped, so its number may belong to another process
    with contextlib.suppress(ProcessLookupError):
        group = os.getpgid(process.pid)
        if group == os.getpgrp():
            process.send_signal(signum)  # a group signal would also reach this process
        else:
            os.killpg(group, signum)


def _end_group(process: Popen) -> None:
    """SIGTERM to the processes that a process has left in its own group; it has ended and was reaped."""
    if process.pid != os.getpgrp():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the number stays taken while the group has a process
