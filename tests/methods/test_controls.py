"""Credit from the policy's own probabilities: recipe/controls/controls.py.

Shape suffixes: B rows, T response tokens.
"""

from pathlib import Path

import pytest
import torch
from support.counterfactual_signals import changed
from support.method_advantages import of

from sayo_verl.launch.settings import load_methods
from sayo_verl.methods import METHODS

ROOT = Path(__file__).parent.parent.parent
load_methods([str(ROOT / "recipe" / "controls" / "controls.py")])
SURPRISE, SHARPEN = METHODS["attn_surprise"], METHODS["attn_sharpen"]


def rows(*log_probs, no_image=(), correct=None):
    signals = changed([[0.0] * len(row) for row in log_probs], "a" * len(log_probs), no_image=no_image, correct=correct)
    for b, row in enumerate(log_probs):
        signals.log_probs[b, : len(row)] = torch.tensor(row)
    return signals


def test_the_blame_of_a_wrong_response_is_in_proportion_to_surprise_and_praise_stays():
    signals = rows([-1.0, -3.0, 0.0, 0.0], [-1.0, -3.0, 0.0], correct=[0.0, 1.0])
    got, plain = of(SURPRISE(), signals, 0.0, 1.0)
    assert torch.allclose(got[0], plain[0] * torch.tensor([1.0, 3.0, 0.0, 0.0]))
    assert got[0].sum() == pytest.approx(plain[0].sum().item())
    assert torch.equal(got[1], plain[1])


def test_the_blame_of_a_response_that_was_certain_stays_uniform():
    got, plain = of(SURPRISE(), rows([0.0, 0.0], [-1.0, 0.0], correct=[0.0, 1.0]), 0.0, 1.0)
    assert torch.equal(got, plain)


def test_without_contrast_there_is_no_blame():
    assert (of(SURPRISE(), rows([-1.0, -2.0], [-3.0], correct=[0.0, 0.0]), 0.0, 0.0)[0] == 0).all()


def test_sharpening_prefers_likely_tokens_in_all_responses_and_reads_no_reward():
    signals = rows([-1.0, -3.0, 0.0, 0.0], [-2.0, 0.0])
    expected = torch.tensor([[0.0, -2.0, 1.0, 1.0], [-1.0, 1.0, 0.0, 0.0]])
    for rewards in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        got, _ = of(SHARPEN(), signals, *rewards)
        assert torch.allclose(got, expected)


@pytest.mark.parametrize("method", [SURPRISE(), SHARPEN()], ids=["surprise", "sharpen"])
def test_a_row_without_an_image_has_grpos_advantage(method):
    signals = rows([-1.0, -3.0], [-1.0, -3.0], [-1.0, 0.0], no_image=[0], correct=[0.0, 0.0, 1.0])
    got, plain = of(method, signals, 0.0, 0.0, 1.0)
    assert torch.equal(got[0], plain[0])
    assert not torch.equal(got[1], plain[1])


@pytest.mark.parametrize("method", [SURPRISE, SHARPEN])
def test_half_the_strength_is_half_the_way(method):
    signals = rows([-1.0, -3.0, 0.0], [-2.0, 0.0], correct=[0.0, 1.0])
    whole, plain = of(method(), signals, 0.0, 1.0)
    half, _ = of(method(strength=0.5), signals, 0.0, 1.0)
    assert torch.allclose(half, (whole + plain) / 2)
