"""Hostile responses, no text is executed, and judge=math."""

import ast
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rewards import GOOD, PROPERTY, marks
from transformers import AutoTokenizer

import sayo_verl
from sayo_verl.errors import SayoError
from sayo_verl.reward import (
    MAX_CHARACTERS,
    SLACK_CHARACTERS,
    compute_score,
    formula,
    length_factor,
    normalise,
    split_response,
    why_not_gradable,
)
from sayo_verl.reward.formula import TIME_LIMIT

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


# ---------------------------------------------------------------------------------------------------- hostile responses


@PROPERTY
@given(
    parts=st.lists(st.one_of(st.sampled_from([*TAGS, "red", " ", "\n", "<", ">"]), st.text(max_size=3)), max_size=12)
)
def test_the_rules_for_any_order_of_tags(parts):
    response = "".join(parts)
    right, answer = split_response(response)
    found = compute_score("", response, "red")
    assert found["format"] in (0.0, 1.0)
    assert found["acc"] in (0.0, 1.0)
    assert found["score"] == found["format"] + found["acc"]
    if right:
        assert answer
        assert all(response.count(tag) == 1 for tag in TAGS)
        before, rest = response.split("<think>")
        _, rest = rest.split("</think>")
        between, rest = rest.split("<answer>")
        inside, after = rest.split("</answer>")
        assert not (before + between + after).strip()
        assert inside.strip() == answer
    if answer is not None:
        assert response.count("<answer>") == response.count("</answer>") == 1


@PROPERTY
@given(thought=st.text(max_size=40), answer=st.text(min_size=1, max_size=20))
def test_any_text_without_tags_can_be_thought_and_answered(thought, answer):
    whole = f"<think>{thought}</think><answer>{answer}</answer>"
    if any(whole.count(tag) != 1 for tag in TAGS) or not answer.strip():
        assert split_response(whole)[0] is False
    else:
        assert split_response(whole) == (True, answer.strip())
        assert marks(whole)[0] == 1
        assert why_not_gradable(answer) or marks(whole, truth=answer)[1] == 1


MILLION = 1_000_000


@pytest.mark.parametrize(
    "response",
    [
        "<think>" * (MILLION // 7),
        "<think>" + "x" * MILLION + "</think><answer>red</answer>",
        "<think></think><answer>" + "<" * MILLION + "</answer>",
        " " * MILLION + GOOD,
        "<answer>" * (MILLION // 17) + "</answer>" * (MILLION // 17),
        "\n\t " * (MILLION // 3),
        "<think></think><answer>" + "a " * 30_000 + "</answer>",
        "<think></think><answer>" + "(" * 60_000 + "</answer>",
        "<think></think><answer>a" + "\u0300\u0316" * 30_000 + "</answer>",  # marks in the wrong order
        "<think></think><answer>" + "\u0300" * 30_000 + "\u0316" * 30_000 + "</answer>",
        "<think></think><answer>" + "\ufdfa" * 60_000 + "</answer>",  # one character that NFKC makes 18
    ],
    ids=[
        "open tags",
        "long thought",
        "brackets",
        "blanks",
        "nested answers",
        "white space",
        "long answer",
        "punctuation",
        "marks",
        "marks apart",
        "expanding",
    ],
)
def test_a_huge_response_is_scored_at_once(response):
    start = time.process_time()
    found = compute_score("", response, "red")
    assert time.process_time() - start < 1.0
    assert found["acc"] == 0.0


@pytest.mark.parametrize("part", ["a,", "+", "the ", "*_ ", "5 ", "'", "n!"])
def test_a_long_answer_is_normalised_at_once(part):
    start = time.process_time()
    normalise(part * (MAX_CHARACTERS // len(part)))
    normalise(part * (MAX_CHARACTERS // len(part)) + "x")
    assert time.process_time() - start < 1.0


def test_a_response_is_cut_where_it_says():
    fill = MAX_CHARACTERS - len("<think></think><answer>red</answer>")
    fits = "<think>" + "x" * fill + "</think><answer>red</answer>"
    assert len(fits) == MAX_CHARACTERS
    assert marks(fits) == (1, 1)
    assert marks("<think>x" + fits[len("<think>") :]) == (0, 0)


def test_a_long_ground_truth_can_be_answered():
    truth = "word " * 2_000 + "end"
    assert marks(f"<think>x</think><answer>{truth}</answer>", truth) == (1, 1)
    assert marks(f"<think>x</think><answer>red{' ' * SLACK_CHARACTERS}</answer>") == (1, 1)
    assert marks(f"<think>x</think><answer>red{' ' * MAX_CHARACTERS}</answer>") == (0, 0)


@pytest.mark.parametrize(
    "response",
    [
        "\ud800",
        "<think>\ud800</think><answer>\udfff</answer>",
        "\x00",
        "<answer>\x00</answer>",
        "🟥" * 1000,
        "<answer>\u202ered\u202c</answer>",
        "<answer>{red}</answer>",
    ],
    ids=ascii,
)
def test_odd_characters_are_no_error(response):
    assert compute_score("", response, "red")["format"] in (0.0, 1.0)


def test_text_that_looks_like_code_is_only_text(tmp_path):
    witness = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    assert marks(f"<think>{code}</think><answer>{code}</answer>", "red") == (1, 0)
    assert marks("<think>x</think><answer>1 + 1</answer>", "2") == (1, 0)
    assert not witness.exists()


# ----------------------------------------------------------------------------------------- the package executes no text


FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.loads",
    "pickle.load",
    "marshal.loads",
    "os.system",
    "os.popen",
    "signal.alarm",
    "signal.setitimer",
    "yaml.load",
    "yaml.unsafe_load",
}


def forbidden_calls(source: str) -> list[str]:
    """Names in ``FORBIDDEN`` that a source refers to, under any alias, and calls through a shell."""
    tree, found, alias = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            alias |= {name.asname or name.name: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            alias |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append(alias.get(node.id, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(f"{alias.get(node.value.id, node.value.id)}.{node.attr}".removeprefix("builtins."))
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("shell=")
    return sorted(FORBIDDEN.union({"shell="}).intersection(found))


# In a worker process's main thread, where an alarm works; a reward function runs in a thread, where it does not.
ALLOWED = {"metis.py": ["signal.setitimer"]}


SOURCES = sorted(Path(sayo_verl.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(Path(sayo_verl.__file__).parent)))
def test_no_module_executes_text_or_sets_an_alarm(path):
    assert forbidden_calls(path.read_text()) == ALLOWED.get(path.name, [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval('1')", ["eval"]),
        ("import os as o\no.system('ls')", ["os.system"]),
        ("from pickle import loads as l\nl(b'')", ["pickle.loads"]),
        ("import builtins\nbuiltins.exec('')", ["exec"]),
        ("f = eval", ["eval"]),
        ("import subprocess\nsubprocess.run('ls', shell=True)", ["shell="]),
        ("import signal\nsignal.alarm(3)", ["signal.alarm"]),
        ("model.eval()\nimport re\nre.compile('x')", []),
    ],
)
def test_the_search_finds_what_it_looks_for(source, found):
    assert forbidden_calls(source) == found


@pytest.mark.parametrize(
    ("tokens", "factor"), [(0, 0.0), (30, 0.3), (59, 0.59), (60, 1.0), (100, 1.0), (101, 60 / 101), (200, 0.3)]
)
def test_the_released_length_factor(tokens, factor):
    assert length_factor(tokens) == pytest.approx(factor)


def test_the_length_factor_multiplies_format_alone(random_policy):
    response = "<think> circle red .</think><answer> red</answer>"
    plain = compute_score("", response, "red")
    assert plain == {"score": 2.0, "acc": 1.0, "format": 1.0}
    scored = compute_score("", response, "red", length_tokenizer=str(random_policy))
    tokens = len(AutoTokenizer.from_pretrained(random_policy).encode(response))
    assert scored == {"score": 1.0 + 0.6 * tokens / 60, "acc": 1.0, "format": 1.0, "length_factor": 0.6 * tokens / 60}
    assert 0 < tokens < 60


# ---------------------------------------------------------------------------------------------------------- judge=math


def math_acc(answer: str, truth: Any) -> float:
    return compute_score("", f"<answer>{answer}</answer>", truth, judge="math")["acc"]


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"$\frac{1}{2}$", "1/2", True),
        ("1+x^2", "x^2+1", True),
        (r"\boxed{3}", "3", True),
        ("3", r"\boxed{3}", True),
        ("10^5", "100000", True),
        ("[0, 1)", "[0,1)", True),
        ("{2,1}", "{1,2}", True),
        ("3.0 cm", "3 cm", True),
        ("red", "Red.", True),
        ("“5”", "5", True),
        ("5", 5.0, True),
        ("5!", "5", False),
        ("10⁵", "105", False),
        ("[0,1)", "(0,1]", False),
        ("(1,2)", "(2,1)", False),
        ("-3", "3", False),
        (".5", "5", False),
        ("act", "cat", False),
        ("not 3", "3", False),
        ("3 cm", "3 m", False),
        ("3 or 4", "4", False),
        ("", "3", False),
        ("x", "y", False),
        ("1/0", "3", False),
        ("5%", "5", False),
        ("5 m", "5 s", False),
        ("12°C", "12°F", False),
        ("2020-01-01", "2018", False),
        ("8:30", "8/30", False),
        ("5_2", "5_3", False),
        ("A,B", "B,A", False),
        ("5=6", "6", False),
        ("n!", "n", False),
        ("f'(x)", "f(x)", False),
        ("X", "x", False),
        ("Blue", "blue", True),
        ("x+1", "1+x", True),
        ("x+x", "2x", True),
        ("y+x", "x+y", True),
        (r"12^\circ", "12°", True),
        (r"5\%", "5%", True),
    ],
)
def test_math_verify_judges_numbers_and_formulas(answer, truth, same):
    assert math_acc(answer, truth) == same


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9^{9}}}", "9**9**9**9", "(10^9)!", "(" * 150 + "1" + ")" * 150, "x^" * 200 + "2", "1" * 5_000],
    ids=lambda answer: answer[:12],
)
def test_a_hostile_formula_is_wrong_within_its_time(answer):
    math_acc("1", "2")  # the worker is up
    start = time.monotonic()
    assert math_acc(answer, "3") == 0
    assert time.monotonic() - start < TIME_LIMIT + 60  # on a busy machine; without a limit it does not end
    assert math_acc("1/2", "0.5") == 1  # the next worker


def test_formulas_are_compared_in_threads_as_verl_calls():
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda n: math_acc(f"{2 * n}/4", str(n / 2)), range(12))) == [1.0] * 12


def test_a_formula_executes_nothing(tmp_path):
    witness = tmp_path / "executed"
    code = f"__import__('pathlib').Path('{witness}').touch()"
    for answer in (code, f"${code}$", f"1 + {code}", rf"\boxed{{{code}}}"):
        assert math_acc(answer, "3") == 0
    assert not witness.exists()


def test_a_boxed_truth_can_be_graded_by_math_alone():
    assert "boxed" in why_not_gradable(r"\boxed{3}")
    assert why_not_gradable(r"\boxed{3}", judge="math") is None


def test_a_worker_that_does_not_start_is_no_wrong_answer(monkeypatch):
    formula._stop()
    monkeypatch.setattr(formula, "_start_worker", math.sqrt)  # raises without an argument, as an import may
    with pytest.raises(SayoError, match=r"^SAYO-D71: .*fix: "):
        math_acc("1/2", "0.5")
    monkeypatch.undo()
    assert math_acc("1/2", "0.5") == 1
