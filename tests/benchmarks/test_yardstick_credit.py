"""Methods and statistics scored on rollouts whose truth is known."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.yardstick.credit import Known, credit_of, of_credit, of_values, token_statistics
from benchmarks.yardstick.scores import Truth
from sayo_verl.methods import Credit, Needs, RewardTerm, Signals
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

B, T, GROUP = 64, 12, 8
MASS = Statistic("image_mass", layers=(0,))


@pytest.fixture
def rollouts():
    random = np.random.default_rng(0)
    perceptual = np.tile([False, False, True], (B, T // 3))
    right = ~perceptual | (random.random((B, T)) > 0.15)
    correct = right.all(1)
    uid = tuple(str(row // GROUP) for row in range(B))
    signals = Signals(
        response_mask=torch.ones(B, T),
        entropy=torch.as_tensor(random.random((B, T)), dtype=torch.float32),
        log_probs=-torch.as_tensor(random.random((B, T)), dtype=torch.float32),
        statistics={MASS: torch.as_tensor(0.1 + 0.5 * perceptual, dtype=torch.float32)},
        image_tokens=torch.full((B,), 16.0),
        region_tokens=torch.full((B,), 4.0),
        is_padding=torch.zeros(B, dtype=torch.bool),
        uid=uid,
    )
    own = {0: np.full((B, T), 0.1), 1: random.random((B, T))}
    truth = Truth(np.ones((B, T), bool), perceptual, right, correct, uid)
    return Known(signals, truth, torch.as_tensor(correct, dtype=torch.float32), own)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A method whose credit is given."""

    made: Credit
    name = "attn_scripted"
    gives = frozenset({"token"})

    def needs(self):
        return Needs(StatisticsRequest((MASS,)))

    def credit(self, signals):
        return self.made


def scored(method, known):
    return of_credit(*credit_of(method, known), known)


def test_grpo_scores_zero_everywhere(rollouts):
    assert scored(None, rollouts) == scored(Scripted(Credit()), rollouts)
    found = scored(None, rollouts)
    halves = {"first half", "second half"}
    assert set(found) == {"separation", *halves, "precision", "control", "blame", "afterwards"}
    assert all(estimate.value == pytest.approx(0.0) for estimate in found.values())


def test_a_mask_of_perceptual_tokens_separates_perfectly_and_its_permutation_does_not(rollouts):
    mask = torch.as_tensor(rollouts.truth.perceptual, dtype=torch.float32)
    found = scored(Scripted(Credit(token_weight=mask)), rollouts)
    assert found["separation"].value == found["precision"].value == pytest.approx(1.0)
    control = found["control"]  # one permutation in twenty is outside its interval, none far outside
    assert abs(control.value) < control.high - control.low
    assert 0 < found["blame"].value < 1


def test_a_weight_on_the_first_error_alone_takes_all_blame(rollouts):
    first = np.arange(T)[None] == rollouts.truth.first_error[:, None]
    weight = torch.as_tensor(np.where(rollouts.truth.correct[:, None], 1.0, first), dtype=torch.float32)
    found = scored(Scripted(Credit(token_weight=weight)), rollouts)
    assert found["blame"].value == pytest.approx(1.0)
    assert found["afterwards"].value < 0


def test_groups_without_contrast_do_not_dilute_the_scores(rollouts):
    few = dataclasses.replace(rollouts, reward=torch.where(torch.arange(B) < GROUP, rollouts.reward, 1.0))
    few.reward[0] = 1.0 - few.reward[1]
    mask = torch.as_tensor(rollouts.truth.perceptual, dtype=torch.float32)
    assert scored(Scripted(Credit(token_weight=mask)), few)["separation"].n == GROUP


def test_a_reward_term_is_compared_with_the_layer_that_looks_best(rollouts):
    looks = np.where(rollouts.truth.perceptual, rollouts.own_region[1], np.nan)
    value = torch.as_tensor(np.nanmean(looks, 1), dtype=torch.float32)
    term = RewardTerm("own", value, torch.ones(B, dtype=torch.bool), 0.1)
    assert scored(Scripted(Credit(terms=(term,))), rollouts)["look"].value == pytest.approx(1.0)


def test_statistics_are_scored_by_name_and_layer(rollouts):
    found = {name: of_values(values, rollouts.truth) for name, values in token_statistics(rollouts.signals).items()}
    mass = "image_mass, layer 0, row of the token"
    assert set(found) == {"entropy", "surprise", mass}
    assert found[mass]["separation"].value == pytest.approx(1.0)
    entropy = found["entropy"]["separation"]
    assert abs(entropy.value) < entropy.high - entropy.low
