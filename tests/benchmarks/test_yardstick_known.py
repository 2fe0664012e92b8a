"""Scores of methods on rollouts of a walking policy, end to end."""

import numpy as np
import pytest
import torch

from benchmarks.yardstick import known
from benchmarks.yardstick.known import ScoreConfig, score
from benchmarks.yardstick.loop import LoopConfig
from benchmarks.yardstick.policy import new_policy
from sayo_verl.scenes.walk import WalkConfig
from sayo_verl.scenes.walk_truth import walk_truth

SCENES = WalkConfig()


@pytest.fixture(scope="module")
def found():
    """Of a policy that knows nothing: no response is right, so no group has contrast."""
    torch.set_num_threads(1)
    return score(new_policy(), SCENES, ScoreConfig(("grpo", "region", "sensitivity"), prompts=2, responses=2))


def test_every_method_statistic_and_layer_has_its_scores(found):
    assert list(found["methods"]) == ["grpo", "region", "sensitivity"]
    rows = {f"image_mass, layer {layer}{row}" for layer in range(3) for row in ("", ", row of the token")}
    cosines = {"image_cosine", "image_cosine, row of the token"}
    assert set(found["statistics"]) == {"entropy", "surprise", "dependence on the image", *rows, *cosines}
    assert list(found["looks"]) == ["layer 0", "layer 1", "layer 2"]
    for shares in found["looks"].values():
        assert 0 <= shares["share"][0] <= 1
    assert found["rates"]["reward"] == 0.0


def test_the_table_has_a_row_for_each_and_says_what_does_not_apply(found):
    table = known.as_table(found).splitlines()
    row = next(line for line in table if line.startswith("| sensitivity |"))
    assert row.startswith("| sensitivity | not measured |")
    assert next(line for line in table if line.startswith("| grpo |")).endswith("| - | - |")


def test_credit_of_groups_without_contrast_has_no_score(found):
    assert found["methods"]["sensitivity"]["separation"] == [None, None, None]


@pytest.mark.parametrize(
    ("words", "tokens", "right_end"), [("so a1 up , answer d1", 7, True), ("so a1", 3, False), ("so b1", 3, True)]
)
def test_the_end_token_is_wrong_only_where_a_response_without_an_error_should_have_gone_on(words, tokens, right_end):
    truth = walk_truth(words.split(), 4, 0, [0] * 16, 1)
    rollouts = known.Rollouts(None, None, torch.ones(1, tokens), [truth], torch.zeros(1), ("a",))
    of_tokens = known.truth_of([truth], rollouts)
    assert of_tokens.right[0, -1] == right_end
    assert not of_tokens.perceptual[0, -1]
    assert np.array_equal(of_tokens.right[0, :-1], truth.right)


def test_grpo_has_no_credit_of_its_own():
    assert known.method_of(LoopConfig(method="grpo")) is None
