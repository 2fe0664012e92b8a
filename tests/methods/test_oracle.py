"""Credit by the truth of the walk task: recipe/oracle/oracle.py.

Shape suffixes: B rows, T response tokens.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counterfactual_signals import changed
from support.method_advantages import of
from support.refusals import refusal

from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import METHODS, advantages
from sayo_verl.methods.random_signals import random_signals

ROOT = Path(__file__).parent.parent.parent
load_methods([str(ROOT / "recipe" / "oracle" / "oracle.py")])
ORACLE, PLUS = METHODS["attn_oracle"], METHODS["attn_oracle_plus"]
NAME = "walk_marks"
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def walked(*marks: str, tokens=None, no_image=(), correct=None, uid=None):
    """Rows of one response each, with its marks; one token a letter and the end token, or ``tokens``."""
    counts = tokens or [len(row) + 1 for row in marks]
    return changed(
        [[0.0] * n for n in counts],
        uid or "a" * len(marks),
        no_image=no_image,
        correct=correct,
        reports={NAME: marks},
    )


def test_the_blame_of_a_wrong_response_falls_on_its_first_error_alone():
    signals = walked("..P.", "..E.x", "P.P.", correct=[1.0, 0.0, 1.0])
    got, plain = of(ORACLE(), signals, 1.0, 0.0, 1.0)
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[2], plain[2])
    assert torch.equal(got[1], plain[1] * torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))


def test_a_lucky_response_keeps_all_of_its_praise():
    signals = walked("..E.", "..x.", correct=[1.0, 0.0])
    got, plain = of(ORACLE(), signals, 1.0, 0.0)
    assert torch.equal(got[0], plain[0])
    assert got[1].nonzero().flatten().tolist() == [2]


def test_a_response_that_ends_too_early_is_blamed_at_its_end():
    signals = walked("..P", "..P.", correct=[0.0, 1.0])
    got, plain = of(ORACLE(), signals, 0.0, 1.0)
    assert torch.equal(got[0], torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]) * plain[0, 0])


def test_a_response_that_was_cut_off_before_any_error_keeps_grpos_advantage():
    signals = walked("..P", "..P.", tokens=[3, 5], correct=[0.0, 1.0])
    got, plain = of(ORACLE(), signals, 0.0, 1.0)
    assert torch.equal(got, plain)
    assert ORACLE().credit(signals).metrics["oracle_first_error_share"] == 0


def test_plus_praises_right_looks_before_the_first_error_of_every_response():
    signals = walked("P.P.E.P", "P.xP...", "P.P....", tokens=[8, 8, 7], correct=[1.0, 0.0, 1.0])
    got, plain = of(PLUS(), signals, 1.0, 0.0, 1.0)
    size = plain[:, 0].abs()
    assert torch.allclose(got[0], size[0] * torch.tensor([1.0, 0, 1, 0, -1, 0, 0, 0]))
    assert torch.allclose(got[1], size[1] * torch.tensor([1.0, 0, -1, 0, 0, 0, 0, 0]))
    assert torch.allclose(got[2], size[2] * torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0]))


def test_plus_blames_the_end_token_only_of_a_wrong_response():
    signals = walked("P.", "P.", "P.E", correct=[1.0, 0.0, 0.0])
    got, plain = of(PLUS(), signals, 1.0, 0.0, 0.0)
    size = plain[:, 0].abs()
    assert torch.allclose(got[0], size[0] * torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert torch.allclose(got[1], size[1] * torch.tensor([1.0, 0.0, -1.0, 0.0]))


def test_without_contrast_both_give_nothing():
    for method in (ORACLE(), PLUS()):
        got, _ = of(method, walked("P.E", "PPE", correct=[0.0, 0.0]), 0.0, 0.0)
        assert (got == 0).all()


@pytest.mark.parametrize("method", [ORACLE(), PLUS()], ids=["oracle", "oracle_plus"])
def test_a_row_without_an_image_has_grpos_advantage(method):
    signals = walked("..x", "..E", "...", no_image=[0], correct=[0.0, 0.0, 1.0])
    got, plain = of(method, signals, 0.0, 0.0, 1.0)
    assert torch.equal(got[0], plain[0])
    assert not torch.equal(got[1], plain[1])


@pytest.mark.parametrize("method", [ORACLE(strength=0.5), PLUS(strength=0.5)], ids=["oracle", "oracle_plus"])
def test_half_the_strength_is_half_the_way(method):
    signals = walked("P.E", "P.P", correct=[0.0, 1.0])
    whole, plain = of(type(method)(), signals, 0.0, 1.0)
    half, _ = of(method, signals, 0.0, 1.0)
    assert torch.allclose(half, (whole + plain) / 2)


@pytest.mark.parametrize("method", [ORACLE(), PLUS()], ids=["oracle", "oracle_plus"])
def test_marks_that_do_not_fit_stop_the_run_and_name_the_row(method):
    for marks, tokens, code in (("..", 4, "A36"), ("..", 1, "A36"), ("..O", 4, "A35"), (3.0, 4, "A35")):
        with refusal(code, "marks of a response") as caught:
            method.credit(walked("...", marks, tokens=[4, tokens], correct=[1.0, 1.0]))
        assert caught.value.row == 1


@PROPERTY
@given(
    seed=st.integers(0, 10_000),
    B=st.integers(1, 10),
    T=st.integers(1, 9),
)
def test_on_random_marks_the_sums_are_those_of_the_definition(seed, B, T):
    signals = random_signals(PLUS().needs(), seed, B, T)
    reward = torch.randint(0, 2, (B,), generator=torch.Generator().manual_seed(seed)).float()
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    got, _ = advantages(reward, signals.response_mask, signals.uid, PLUS().credit(signals))
    for b in signals.eligible_rows(boxes=False).nonzero().flatten().tolist():
        marks, size = signals.reported(NAME)[b], float(plain[b].abs().max())
        end = next((at for at, letter in enumerate(marks) if letter in "xE"), len(marks))
        blamed = end < len(marks) or float(signals.correct[b]) < 1
        assert float(got[b].sum()) == pytest.approx(size * (marks[:end].count("P") - blamed), abs=1e-5)
