"""train.log: lines without their prefixes, and the first cause of a failure.

The logs in tests/logs are of real runs, shortened: ray.log of two nested Ray actors, engine.log of a vLLM engine whose
libraries were being replaced, reward.log of a tiny run with a mistake in its reward function.
"""

from pathlib import Path

import pytest

from sayo_verl.report.log import clean_log_line, why_it_failed

LOGS = Path(__file__).parent / "logs"


def test_log_lines_lose_colours_and_prefixes():
    assert (
        clean_log_line(b"\x1b[36m(TaskRunnerV1 pid=7, ip=10.0.0.1)\x1b[0m (EngineCore pid=9) hi (you)\n") == "hi (you)"
    )
    assert clean_log_line(b"(pid=12) x [repeated 3x across cluster] (Ray deduplicates logs)\n") == "x"
    assert clean_log_line(b"10%\r50%\rdone\r\n") == "done"


def test_why_it_failed_names_each_error_once_and_only_of_this_attempt(tmp_path):
    log = tmp_path / "train.log"
    old = b"SayoError: SAYO-D01: old\n"
    error = b"sayo_verl.errors.SayoError: SAYO-P03: no layer 36 | fix: y\n"
    new = b"\x1b[36m(A pid=1)\x1b[0m " + error + error
    log.write_bytes(old + new)
    assert why_it_failed(log, offset=len(old)) == ["SAYO-P03: no layer 36 | fix: y"]


def test_why_it_failed_shows_the_last_meaningful_lines_where_no_code_is(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(f"line {i}\n\n   ^^^^\n 40%|####  | 2/5\n" for i in range(50)) + "same\nsame\n")
    assert why_it_failed(log) == [f"line {i}" for i in range(21, 50)] + ["same"]
    assert why_it_failed(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            "reward.log",
            [
                "ZeroDivisionError: division by zero",
                "  at /home/me/my_reward.py, line 6, in compute_score",
                "the log ends with: RuntimeError: Sync replay buffer selected terminal groups with no materializable "
                "trajectories. Enable trainer.v1.sampler.sync_refill_failed_groups to replace failed groups.",
            ],
        ),
        (
            "engine.log",
            [
                "OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory",
                "  at /usr/local/lib/python3.11/ctypes/__init__.py, line 376, in __init__",
                "the log ends with: RuntimeError: Engine core initialization failed. See root cause above. Failed core "
                "proc(s): {'EngineCore': 1}",
            ],
        ),
        (
            "ray.log",
            [
                "ZeroDivisionError: division by zero",
                "  at /home/me/my_code.py, line 2, in score",
                "the log ends with: RuntimeError: the batch could not be scored",
            ],
        ),
    ],
)
def test_why_it_failed_names_the_first_cause(log, told):
    assert why_it_failed(LOGS / log) == told
    assert why_it_failed(LOGS / log, offset=(LOGS / log).stat().st_size) == []  # of this attempt nothing


def test_lines_of_other_processes_do_not_part_a_traceback(tmp_path):
    own = [
        b"Traceback (most recent call last):",
        b'  File "/home/me/a.py", line 1, in f',
        b"    g()",
        b"KeyError: 'boxes'",
    ]
    other = b"(B pid=2) ValueError: only a message, no traceback"
    text = b"".join(other + b"\n(A pid=1) " + line + b"\n" for line in own)
    (tmp_path / "train.log").write_bytes(text + b"(B pid=2) bye\n")
    assert why_it_failed(tmp_path / "train.log") == [
        "KeyError: 'boxes'",
        "  at /home/me/a.py, line 1, in f",
        "the log ends with: bye",
    ]


def test_an_error_of_ours_is_named_even_below_a_traceback(tmp_path):
    error = "sayo_verl.errors.SayoError: SAYO-A03: NaN | at step 3 | fix: look\n"
    (tmp_path / "train.log").write_text((LOGS / "ray.log").read_text() + error)
    assert why_it_failed(tmp_path / "train.log") == ["SAYO-A03: NaN | at step 3 | fix: look"]


def test_a_traceback_of_the_engine_loses_vllms_prefix():
    raw = (
        b'\x1b[36m(vLLM pid=7)\x1b[0m (EngineCore pid=9) ERROR 11-26 10:41:26 [core.py:12]   File "a.py", line 1, in f'
    )
    assert clean_log_line(raw) == '  File "a.py", line 1, in f'
