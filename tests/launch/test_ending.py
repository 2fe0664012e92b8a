"""The last line of a failed run is its first cause."""

import errno
import re
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from sayo_verl.errors import SayoError
from sayo_verl.launch.ending import first_cause
from sayo_verl.report.log import first_exception, why_it_failed

OURS = SayoError("A03", "a reward is not finite", where="row 2", fix="look")


def of_worker(error: BaseException, *, note: str = "") -> BaseException:
    """The error as Ray raises it in the process that waits: its text holds the traceback of the worker."""
    name = f"{type(error).__module__.removeprefix('builtins').lstrip('.')}.{type(error).__name__}".lstrip(".")
    text = "Traceback (most recent call last):\n" + '  File "/home/me/reward.py", line 3, in compute_score\n    x\n'
    return RayTaskError(
        "f", f"{text}{name}: {error}\n{note}", error, proctitle="w", pid=1, ip="i"
    ).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OURS, r"SAYO-A03: a reward is not finite | at row 2 | fix: look"),
        (of_worker(OURS), r"SAYO-A03: a reward is not finite | at row 2 | fix: look"),
        (
            of_worker(OURS, note="in step 3, advantages"),
            "SAYO-A03: a reward is not finite | at row 2 | in step 3, advantages | fix: look",
        ),
        (
            of_worker(KeyError("answer"), note="in step 3, update of the actor"),
            "SAYO-X25: an exception ended the run in step 3, update of the actor | at /home/me/reward.py, line 3, in "
            "compute_score | got KeyError: 'answer' | fix: correct what it names; the traceback is above",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/metrics.jsonl"),
            "SAYO-X26: the disk is full | at the launcher | got OSError: [Errno 28] No space left on device: "
            "'/x/metrics.jsonl' | fix: free space, or name a folder that this user can write",
        ),
        (ValueError(), "SAYO-X25: an exception ended the run | at the launcher | got ValueError: | fix: correct"),
    ],
)
def test_one_line_names_the_innermost_cause_its_place_and_step(error, line):
    assert first_cause(error).startswith(line)
    assert "\n" not in first_cause(error)


def without_parser():
    try:
        import fast_parser_xyz  # noqa: F401
    except ImportError:
        return 1 / 0


def with_a_handled_error_of_ours():
    try:
        raise OURS
    except SayoError:
        return {}["answer"]


def quoting_ours():
    raise RuntimeError("judge said:\nSAYO-D01: not mine | at z | fix: q")


def ours_because_of_another():
    try:
        return 1 / 0
    except ZeroDivisionError as error:
        raise OURS from error


def wrapped_ours():
    try:
        raise OURS
    except SayoError as error:
        raise RuntimeError("no batch") from error


def refused_connection():
    raise ConnectionError(errno.EACCES, "Permission denied on http://x")


@pytest.mark.parametrize(
    ("run", "begins"),
    [
        (
            without_parser,
            "SAYO-X25: .*, in without_parser | got ZeroDivisionError: division by zero; raised while hand",
        ),
        (with_a_handled_error_of_ours, "SAYO-X25: .* | got KeyError: 'answer'; raised while handling "),
        (quoting_ours, "SAYO-X25: .* | got RuntimeError: judge said: | "),
        (ours_because_of_another, "SAYO-A03: "),
        (wrapped_ours, "SAYO-A03: "),
        (refused_connection, "SAYO-X25: .* | got ConnectionError: [Errno 13] Permission denied on http://x | "),
    ],
)
def test_an_exception_that_was_handled_is_not_the_cause(run, begins):
    with pytest.raises(Exception, match=r".") as caught:
        run()
    assert re.match(re.escape(begins).replace(r"\.\*", ".*"), first_cause(caught.value)), first_cause(caught.value)


def test_a_wrapper_of_ours_around_verls_code_is_not_the_place():
    frames = ["/x/site-packages/verl/loop.py", "/me/sayo_verl/hooks/rollout_errors.py", "/x/site-packages/verl/base.py"]
    text = "".join(f'  File "{file}", line 1, in f\n' for file in frames)
    found = first_exception(f"Traceback (most recent call last):\n{text}TypeError: no number\n")
    assert found.place.startswith(frames[-1])


def test_a_dead_process_is_named_as_one():
    line = first_cause(ActorDiedError())
    assert line.startswith("SAYO-X25: a process of the run died")
    assert "dmesg" in line


def test_a_raylet_that_died_is_named_and_not_the_actors_that_it_kept(monkeypatch):
    ended, living = (SimpleNamespace(dead_processes=lambda dead=dead: dead) for dead in ([("raylet", None)], []))
    monkeypatch.setattr("ray._private.worker._global_node", ended)
    line = first_cause(ActorUnavailableError("Socket closed", b"\0" * 16))
    assert line.startswith("SAYO-X15: Ray's raylet on this machine died | at the Ray that the launcher started | got ")
    assert first_cause(KeyError("answer")).startswith("SAYO-X25: an exception ended the run")
    monkeypatch.setattr("ray._private.worker._global_node", living)
    assert first_cause(ActorDiedError()).startswith("SAYO-X25: a process of the run died")


def test_the_cause_that_the_launcher_prints_last_is_the_only_one_shown(tmp_path):
    log = tmp_path / "train.log"
    rows = "".join(f"(w pid={n}) sayo_verl.errors.E: SAYO-X09: row {n} | at x | fix: y\n" for n in range(5))
    log.write_text(f"{rows}to resume after step 2: bash x\nSAYO-X23: all rollouts of step 3 failed | at r | fix: y\n")
    assert why_it_failed(log) == ["SAYO-X23: all rollouts of step 3 failed | at r | fix: y"]
