"""Errors: one line, a class that follows from the code, lists of rules."""

import copy
import pickle

import pytest

from sayo_verl.errors import ConfigError, DataError, ProbeError, Rule, SayoError, SetupError, raise_first

LINE = "SAYO-D04: no box | at rows.parquet | got 0, wanted 1 | fix: add boxes"


def made(code: str) -> SayoError:
    return SayoError(code, "no box", where="rows.parquet", got=0, wanted=1, fix="add boxes")


def pickled(error: SayoError) -> SayoError:
    return pickle.loads(pickle.dumps(error))  # noqa: S301


def test_an_error_is_one_line_of_what_where_got_wanted_and_fix():
    assert str(made("D04")) == LINE


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("L01", ConfigError),
        ("F05", ConfigError),
        ("D04", DataError),
        ("V01", DataError),
        ("P03", ProbeError),
        ("A10", ProbeError),
        ("X01", SetupError),
        ("L28", SetupError),
        ("Z99", SayoError),  # of a guest
    ],
)
def test_the_class_of_an_error_follows_from_its_code(code, kind):
    assert type(made(code)) is kind


def test_a_configuration_error_is_a_value_error_and_every_error_a_sayo_error():
    with pytest.raises(ValueError, match="SAYO-L01"):
        raise made("L01")
    assert not isinstance(made("D04"), ValueError)
    assert all(isinstance(made(code), SayoError) and isinstance(made(code), RuntimeError) for code in ("L01", "D04"))


@pytest.mark.parametrize("code", ["D04", "L01", "Z99"])
@pytest.mark.parametrize("through", [pickled, copy.copy, copy.deepcopy])
def test_an_error_keeps_class_line_and_parts_between_processes(code, through):
    there = through(made(code))
    assert (type(there), str(there), vars(there)) == (type(made(code)), str(made(code)), vars(made(code)))


def test_an_error_of_a_ray_task_is_caught_by_its_class():
    from ray.exceptions import RayTaskError

    cause = made("D04")
    error = RayTaskError("task", "traceback", cause).as_instanceof_cause()
    assert isinstance(error, DataError)
    assert error.code == "D04"


def rules():
    yield Rule("D04", False, "not this one", where="here", fix="-")
    yield Rule("D04", True, "no box", where="rows.parquet", got=0, wanted=1, fix="add boxes")
    raise AssertionError("rules behind a broken one are not evaluated")


def test_the_first_broken_rule_is_raised_with_its_own_words():
    with pytest.raises(DataError) as raised:
        raise_first(rules())
    assert str(raised.value) == LINE
    raise_first([Rule("D04", False, "no box", where="here", fix="-")])
