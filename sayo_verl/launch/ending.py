"""What a run leaves when it ends: the end in its card, its page, and the command that resumes it."""

import atexit
import json
import sys
import time

from omegaconf import DictConfig

from sayo_verl.errors import SayoError
from sayo_verl.launch.resume import how_to_resume
from sayo_verl.launch.run_card import CLOCK, metrics_of_run
from sayo_verl.redact import redact
from sayo_verl.report.card import run_card
from sayo_verl.report.page import write_page_at_end


def at_end(config: DictConfig) -> None:
    """Make this process say at its end, after any traceback, where the page is and how to resume."""
    # The last that is registered is the first that runs.
    atexit.register(say_how_to_resume, config)
    atexit.register(report_at_end, config)


def record_end(config: DictConfig, error: BaseException | None) -> None:
    """Add to the run card when the run ended, and by which error; nothing for a run without metrics.

    A card that cannot be read or written is a message: the error that ended the run has to be the last.
    """
    metrics = metrics_of_run(config)
    if metrics is None:
        return
    said = "" if error is None else redact(f"{type(error).__name__}: {error}".strip().splitlines()[0])[:300]
    try:
        card = json.loads(run_card(metrics).read_text())
        card["ended"] = {"time": time.strftime(CLOCK), "error": said}
        run_card(metrics).write_text(json.dumps(card, indent=1) + "\n")
    except (OSError, ValueError) as cannot:
        print(f"the end of this run was not recorded in {run_card(metrics)}: {cannot}", file=sys.stderr)


def report_at_end(config: DictConfig) -> None:
    """Write the run's page, also of a run that failed; nothing before its first step. The exit code stays as it is."""
    if (metrics := metrics_of_run(config)) is None:
        return
    try:
        page = write_page_at_end(metrics.parent)
    except SayoError as error:
        print(f"the page of this run was not written: {error}", file=sys.stderr)
    else:
        if page:
            print(f"page of the run: {page}", flush=True)


def say_how_to_resume(config: DictConfig) -> None:
    """Print, as the last line, how to resume the last checkpoint; nothing if there is none."""
    if line := how_to_resume(config):
        print(redact(line), flush=True)
