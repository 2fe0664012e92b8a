"""What a run leaves when it ends: the end in its card, its page, the command that resumes it, and the first cause.

The last line of a run that failed is its first cause. Ray's traceback, which has many lines, comes before it.
"""

import atexit
import json
import sys
import time
from typing import Any

import ray
from omegaconf import DictConfig

from sayo_verl.errors import SayoError
from sayo_verl.launch.resume import how_to_resume
from sayo_verl.launch.run_card import CLOCK, metrics_of_run
from sayo_verl.redact import redact, redact_command
from sayo_verl.report.card import run_card
from sayo_verl.report.causes import HANDLING, describe_exception, note_of_step, os_problem

DEAD = ("ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
_last_line: list[str] = []


def at_end(config: DictConfig) -> None:
    """Make this process say at its end, after any traceback, where the page is, how to resume, and the first cause."""
    # The last that is registered is the first that runs.
    atexit.register(say_the_cause)
    atexit.register(say_how_to_resume, config)
    atexit.register(report_at_end, config)
    atexit.register(end_output_of_workers)


def record_end(config: DictConfig, error: BaseException | None) -> None:
    """Add to the run card when the run ended, and by which error; nothing for a run without metrics.

    The error is also the last line that this process prints. A card that cannot be read or written is a message before.
    """
    line = "" if error is None else redact(first_cause(error))
    if line and isinstance(error, Exception):
        _last_line[:] = [line]
    metrics = metrics_of_run(config)
    if metrics is None:
        return
    try:
        card = json.loads(run_card(metrics).read_text())
        card["ended"] = {"time": time.strftime(CLOCK), "error": line}
        run_card(metrics).write_text(json.dumps(card, indent=1) + "\n")
    except (OSError, ValueError) as cannot:
        print(f"the end of this run was not recorded in {run_card(metrics)}: {cannot}", file=sys.stderr)


def first_cause(error: BaseException) -> str:
    """One line for what ended a run: of a SAYO error its own, X26: the disk, X15: Ray, else X25; a signal's name."""
    if isinstance(error, SystemExit):  # of the watchdog, with its line
        return str(error)
    said, place = describe_exception(error)
    step = note_of_step(error)
    if said.startswith("SAYO-"):
        return said.replace(" | fix:", f" | {step} | fix:", 1) if step else said
    when, where = f" {step}" if step else "", place or "the launcher"
    if problem := os_problem(said.partition(HANDLING)[0]):
        fix = "free space, or name a folder that this user can write"
        return str(SayoError("X26", f"{problem}{when}", where=where, got=said, fix=fix))
    died = said.partition(":")[0].rpartition(".")[2] in DEAD
    if died and (daemons := dead_daemons()):
        return str(
            SayoError(
                "X15",
                f"Ray's {' and '.join(daemons)} on this machine died{when}",
                where="the Ray that the launcher started",
                got=said,
                fix="resume the run; if the kernel ended it, `dmesg | grep -i oom`; else see raylet.out and "
                "gcs_server.out in /tmp/ray/session_latest/logs",
            )
        )
    return str(
        SayoError(
            "X25",
            f"a process of the run died{when}" if died else f"an exception ended the run{when}",
            where=where,
            got=said,
            fix="read its last lines above; if the kernel killed it for memory (dmesg), lower what the plan lists"
            if died
            else "correct what it names; the traceback is above",
        )
    )


def end_output_of_workers() -> None:
    """Print what Ray has collected of its workers' output, so that nothing of it follows."""
    if ray.is_initialized():
        time.sleep(0.5)  # its thread reads five times a second
        ray.shutdown()


def say_the_cause() -> None:
    """Print the first cause of a failed run."""
    sys.stdout.flush()
    for line in _last_line:
        print(line, file=sys.stderr, flush=True)


def report_at_end(config: DictConfig) -> None:
    """Write the run's page, also of a run that failed; nothing before its first step. The exit code stays as it is."""
    if (metrics := metrics_of_run(config)) is None or not metrics.exists():
        return
    from sayo_verl.report.page import write_page_at_end  # matplotlib takes a second, which a dry run need not wait for

    try:
        written = write_page_at_end(metrics.parent)
    except SayoError as error:
        print(f"the page of this run was not written: {error}", file=sys.stderr)
    else:
        if written:
            page, failed = written
            print(f"page of the run: {page}", *([f"warning: {failed}"] if failed else []), sep="\n", flush=True)


def say_how_to_resume(config: DictConfig) -> None:
    """Print how to resume the last checkpoint; nothing if there is none."""
    if line := how_to_resume(config):
        print(redact_command(line), flush=True)


def dead_daemons() -> list[str]:
    """What died of the Ray that this process started: ``raylet``, ``gcs_server``; empty on a cluster that it joined.

    Without its raylet Ray only says that some actor is unavailable.
    """
    node: Any = ray._private.worker._global_node  # None: not connected
    found: set[str] = {kind for kind, _ in node.dead_processes()} if node is not None else set()
    return sorted(found & {"raylet", "gcs_server"})
