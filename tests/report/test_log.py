"""train.log: lines without their prefixes, and the first cause of a failure.

The logs in tests/report/logs are of real runs, shortened. ray.log is of two nested Ray actors, engine.log of a vLLM
engine whose libraries were being replaced, reward.log of a tiny run with a mistake in its reward function.
"""

import re
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
                "the last traceback: RuntimeError: Sync replay buffer selected terminal groups with no materializable "
                "trajectories. Enable trainer.v1.sampler.sync_refill_failed_groups to replace failed groups.",
                "  at /home/me/sayo-verl/sayo_verl/main_ppo.py, line 131, in main",
            ],
        ),
        (
            "engine.log",
            [
                "OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory",
                "  at /usr/local/lib/python3.11/ctypes/__init__.py, line 376, in __init__",
                "the last traceback: RuntimeError: Engine core initialization failed. See root cause above. Failed "
                "core proc(s): {'EngineCore': 1}",
                "  at /home/me/sayo-verl/sayo_verl/main_ppo.py, line 131, in main",
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


def traceback(exception: str, *frames: tuple[str, int, str]) -> str:
    """As Python prints it."""
    lines = [f'  File "{file}", line {number}, in {name}\n    call()\n' for file, number, name in frames]
    return "".join(["Traceback (most recent call last):\n", *lines, exception, "\n"])


HANDLED = traceback("ModuleNotFoundError: No module named 'flash_attn'", ("/home/u/a.py", 9, "load"))
FATAL = traceback("ZeroDivisionError: division by zero", ("/home/u/r.py", 3, "score"))
AND_THEN = "\nThe above exception was the direct cause of the following exception:\n\n"
HIDING = [
    "ModuleNotFoundError: No module named 'flash_attn'",
    "  at /home/u/a.py, line 9, in load",
    "the last traceback: ZeroDivisionError: division by zero",
    "  at /home/u/r.py, line 3, in score",
]


@pytest.mark.parametrize(
    ("end", "told"),
    [
        (FATAL, HIDING),
        (FATAL + "note: bye\n", [*HIDING, "the log ends with: note: bye"]),  # no second exception of that traceback
        (
            FATAL + AND_THEN + traceback("RuntimeError: no batch", ("/home/u/job.py", 8, "main")),
            [*HIDING, "the log ends with: RuntimeError: no batch"],
        ),
        (
            "During handling of the above exception, another exception occurred:\n\n" + FATAL,
            ["ZeroDivisionError: division by zero", "  at /home/u/r.py, line 3, in score"],
        ),
        (HANDLED, HIDING[:2]),
    ],
)
def test_a_handled_exception_does_not_hide_the_last_traceback(tmp_path, end, told):
    steps = "".join(f"step {n}: reward 0.5\n" for n in range(50))
    (tmp_path / "train.log").write_text(HANDLED + steps + end)
    assert why_it_failed(tmp_path / "train.log") == told


FILTER = ("/x/lib/python3.11/site-packages/verl/utils/dataset/rl_dataset.py", 228, "doc2len")
SKIPPING = "Error processing one of the samples, skipping...\n"
SAMPLE = traceback("OSError: cannot identify image file", FILTER, ("/home/u/images.py", 4, "open_it"))


@pytest.mark.parametrize(
    "skipped",
    [
        SKIPPING + SAMPLE,
        SAMPLE + SKIPPING,  # two streams
        SKIPPING + traceback("KeyError: 'x'", ("/home/u/images.py", 2, "read")) + AND_THEN + SAMPLE,
    ],
)
def test_a_traceback_of_a_sample_that_verl_skips_is_no_cause(tmp_path, skipped):
    log = tmp_path / "train.log"
    told = ["ZeroDivisionError: division by zero", "  at /home/u/r.py, line 3, in score"]
    log.write_text(skipped + FATAL)
    assert why_it_failed(log) == told
    log.write_text(FATAL + skipped + "bye\n")
    assert why_it_failed(log) == [*told, "the log ends with: bye"]
    log.write_text(skipped + "Killed\n")
    assert why_it_failed(log)[-1] == "Killed"


def test_verl_still_skips_samples_in_doc2len():
    from verl.utils.dataset import rl_dataset

    source = Path(rl_dataset.__file__).read_text()
    functions = re.findall(r"( +)def doc2len\(doc\) -> int:\n((?:\1 .*\n|\n)+)", source)
    assert functions
    for _, body in functions:
        assert "except Exception:" in body
        assert SKIPPING.strip() in body


@pytest.mark.parametrize(
    "mention", ["WARNING see SAYO-L15: docs", "the fix of SAYO-L15: a new folder", "# SAYO-L15: x"]
)
def test_a_mention_of_an_error_of_ours_is_not_the_error(tmp_path, mention):
    log = tmp_path / "train.log"
    log.write_text(f"{mention}\n{FATAL}")
    assert why_it_failed(log)[0] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("before", ["", "  ", "SayoError: ", "ERROR x: sayo_verl.errors.SayoError: ", "SayoError('"])
def test_an_error_of_ours_starts_a_line_or_the_text_of_an_exception(tmp_path, before):
    log = tmp_path / "train.log"
    log.write_text(f"{before}SAYO-L15: used | fix: y\n{FATAL}")
    assert why_it_failed(log) == ["SAYO-L15: used | fix: y"]
