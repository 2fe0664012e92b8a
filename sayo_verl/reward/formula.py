"""Comparison of answers as numbers and formulas by the package math-verify, in a worker process.

math-verify limits its time with an alarm, which works only in the main thread of a process, but verl calls reward
functions in other threads. So a worker process compares and is stopped after ``TIME_LIMIT`` seconds or above
``MEMORY_LIMIT`` bytes. "9**9**9**9" is then wrong, and the run continues.

math-verify reads letters as factors ("cat" would equal "act") and ignores words ("not 3" would equal "3"). So it
compares only sides with the same words in the same order. A word is two or more letters that are not a LaTeX command.
Both sides must also have the same single letters ("5 m" is not "5 s", "X" is not "x"), equal counts of the marks that
it ignores or reads differently (``MARKS``), and the same indices, dates and numbers like "01". All others are compared
as text.
"""

import atexit
import importlib.util
import logging
import multiprocessing
import os
import re
import resource
import threading
import time
from concurrent.futures import CancelledError, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from sayo_verl.errors import SayoError
from sayo_verl.reward.text import _fold

PIP = "pip install 'sayo-verl[math]'"
MAX_FORMULA_CHARACTERS = 512
TIME_LIMIT = 5.0
MEMORY_LIMIT = 4 << 30
# Time to import sympy on a busy machine and to finish earlier comparisons of other threads.
START_SECONDS = 600.0
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LETTER = re.compile(r"(?<![^\W\d_])[A-Za-z](?![^\W\d_])")
_DEGREE = re.compile(r"\^?\s*\{?\s*\\circ(?![a-zA-Z])\s*\}?|\\degree(?![a-zA-Z])")
_FIXED = re.compile(r"_\{?(\w+)|(\d{4}-\d\d?-\d\d?)|(?<![\d.,])(0\d+)")
MARKS = "°%_:'!="
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed", "\\fbox")


def require_math_verify() -> None:
    """Refuse ``judge=math`` without its packages.

    Raises:
        SayoError: L32 with the command that installs them.
    """
    for package in ("math_verify", "pebble"):
        if importlib.util.find_spec(package) is None:
            raise SayoError(
                "L32",
                f"judge=math needs the package {package}, which is not installed",
                where="reward.custom_reward_function.reward_kwargs.judge",
                got="math",
                fix=f"{PIP}, on every node; or set judge=text",
            )


def equal_formulas(answer: str, truth: str) -> bool:
    """Whether two texts are the same number or formula by math-verify.

    False for texts longer than ``MAX_FORMULA_CHARACTERS``, with different words, letters or marks, that it cannot
    read, or that it does not compare within ``TIME_LIMIT`` seconds.

    Raises:
        SayoError: L32 without the packages, D71 when the worker process does not start.
    """
    if max(len(answer), len(truth)) > MAX_FORMULA_CHARACTERS or _ignored_parts(answer) != _ignored_parts(truth):
        return False
    require_math_verify()
    from pebble import ProcessExpired

    pool = _pool()
    future = pool.schedule(_equal, args=(answer, truth), timeout=TIME_LIMIT)
    deadline = time.monotonic() + START_SECONDS
    while not wait([future], timeout=0.5).done:
        if not pool.active or time.monotonic() > deadline:
            raise _no_worker(pool)
    try:
        return future.result()
    except (FutureTimeoutError, ProcessExpired):
        return False
    except (CancelledError, ImportError) as error:
        raise _no_worker(pool) from error


def same_letters(answer: str, truth: str) -> bool:
    """Whether two texts without words have the same single letters in the same case, because "X" is not "x"."""
    return bool(_words(answer) or _words(truth)) or _letters(answer) == _letters(truth)


def _letters(text: str) -> list[str]:
    return _LETTER.findall(_COMMAND.sub(" ", text))


def _ignored_parts(text: str) -> tuple[object, ...]:
    """Parts of a text that math-verify does not compare, or compares differently."""
    text = "".join(map(_fold, _DEGREE.sub("°", text)))
    letters = _letters(text)
    ordered = "," in text and not text.strip("$\\ ").startswith("{")  # of a list, not of a set
    return _words(text), letters if ordered else set(letters), [text.count(m) for m in MARKS], _FIXED.findall(text)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(_COMMAND.sub(" ", text))]


def _no_worker(pool: Any) -> SayoError:
    global _CURRENT
    with _LOCK:
        if _CURRENT is not None and _CURRENT[1] is pool:
            _CURRENT = None
    pool.stop()
    return SayoError(
        "D71",
        "the process that compares formulas does not start",
        where="sayo_verl.reward, judge=math",
        fix=f"{PIP} on every node, and see the log of the reward workers; or set judge=text",
    )


# --------------------------------------------------------------------------------------------------------- the worker


def _equal(answer: str, truth: str) -> bool:
    """Compare in the worker."""
    from math_verify import parse, verify

    sides = [parse(_delimited(text), parsing_timeout=None) for text in (truth, answer)]  # [] if it cannot be read
    return all(sides) and bool(verify(*sides, timeout_seconds=None))


def _delimited(text: str) -> str:
    """Add delimiters, because math-verify finds LaTeX only between them."""
    return text if any(mark in text for mark in _DELIMITERS) else f"${text}$"


def _start_worker() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    _equal("1", "x^2")  # imports and builds the grammar before the time of the first comparison starts
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))


_LOCK = threading.Lock()
_CURRENT: tuple[int, Any] | None = None  # process that made it, pool


def _pool() -> Any:
    """Return this process's worker pool; a forked child does not use its parent's."""
    global _CURRENT
    from pebble import ProcessPool

    with _LOCK:
        if _CURRENT is None or _CURRENT[0] != os.getpid() or not _CURRENT[1].active:
            spawn = multiprocessing.get_context("spawn")
            _CURRENT = (os.getpid(), ProcessPool(max_workers=1, initializer=_start_worker, context=spawn))
        return _CURRENT[1]


def _stop() -> None:
    global _CURRENT
    with _LOCK:
        old, _CURRENT = _CURRENT, None
    if old is not None and old[0] == os.getpid():
        old[1].stop()
        old[1].join()


atexit.register(_stop)
