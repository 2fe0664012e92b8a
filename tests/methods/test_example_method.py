"""The methods of docs/add_a_method.md: the page shows the files, the files do what it says.

Shape suffixes: B rows, T response tokens.
"""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.refusals import refusal

from sayo_verl.launch.settings import load_methods, settings_from_config
from sayo_verl.methods import METHODS, Signals, own_methods
from sayo_verl.methods.random_signals import random_signals

ROOT = Path(__file__).parent.parent.parent
NAMES = ("sensitivity", "glance")
FILES = {name: ROOT / "recipe" / "example" / f"{name}.py" for name in NAMES}
YAMLS = {name: ROOT / "configs" / "method" / f"{name}.yaml" for name in NAMES}
load_methods([str(FILES[name]) for name in NAMES])
METHOD, GLANCE = METHODS["attn_sensitivity"], METHODS["attn_glance"]
NAN = float("nan")


def test_the_page_shows_the_files_as_they_are():
    page = (ROOT / "docs" / "add_a_method.md").read_text()
    python = re.findall(r"```python\n(.*?)```", page, re.S)
    assert sorted(python) == sorted(FILES[name].read_text() for name in NAMES)
    assert re.findall(r"```yaml\n(.*?)```", page, re.S) == [YAMLS["glance"].read_text()]


def test_the_users_own_methods_are_those_of_other_packages():
    own = own_methods()
    assert {own["attn_sensitivity"], own["attn_glance"]} == {METHOD, GLANCE}
    assert own.keys() & {"attn_region", "attn_dual", "attn_anchor", "attn_faithful"} == set()


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_selects_it_with_its_defaults(name):
    config = yaml.safe_load(YAMLS[name].read_text())
    assert [ROOT / path for path in config["sayo"]["modules"]] == [FILES[name]]
    method = settings_from_config(config["algorithm"]["adv_estimator"], config["algorithm"].get("attn", {})).method
    assert method == METHODS[f"attn_{name}"]()


def test_a_glance_is_the_mean_attention_on_the_image_in_rows_with_an_image():
    mass = torch.tensor([[0.2, 0.4, 0.9], [0.0, 0.0, 0.0], [NAN, NAN, NAN]])
    (statistic,) = GLANCE().needs().statistics.statistics
    assert (statistic.name, statistic.layers) == ("image_mass", (-1,))
    signals = Signals(
        response_mask=torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        entropy=torch.zeros(3, 3),
        log_probs=torch.full((3, 3), -1.0),
        statistics={statistic: mass},
        image_tokens=torch.tensor([4.0, 0.0, 4.0]),
        region_tokens=torch.zeros(3),
        is_padding=torch.zeros(3, dtype=torch.bool),
        uid=("a", "a", "a"),
    )
    (term,) = GLANCE().credit(signals).terms
    assert term.valid.tolist() == [True, False, False]
    assert float(term.value[0]) == pytest.approx(0.3)
    assert GLANCE().credit(signals).metrics["glance/mean"] == pytest.approx(0.3)
    with refusal("A05", "weight"):
        GLANCE(weight=-1.0)


def test_it_keeps_the_tokens_that_depend_on_the_image():
    differences = torch.tensor([[0.0, 2.0, 0.1, 1.0, 0.0], [0.5, 0.5, NAN, NAN, NAN]])
    signals = Signals(
        response_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
        entropy=torch.zeros(2, 5),
        log_probs=torch.full((2, 5), -1.0),
        statistics={},
        image_tokens=torch.tensor([4.0, 4.0]),
        region_tokens=torch.zeros(2),
        is_padding=torch.zeros(2, dtype=torch.bool),
        uid=("a", "a"),
        counterfactuals={METHOD().counterfactual: -1.0 - differences},
    )
    credit = METHOD().credit(signals)  # 0.4 of 5 tokens are 2; of 2 tokens 1, and of equals the earlier
    assert credit.token_weight.tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 1, 1]]
    k = [math.exp(-d) - 1 + d for d in (0.0, 2.0, 0.1, 1.0, 0.0, 0.5, 0.5)]
    assert credit.metrics["sensitivity/mean"] == pytest.approx(sum(k) / 7, abs=1e-6)
    assert credit.metrics["sensitivity_kept_share"] == pytest.approx(3 / 7)
    half = dataclasses.replace(METHOD(), strength=0.5).credit(signals)
    assert half.token_weight[0].tolist() == [0.5, 1, 0.5, 1, 0.5]


def test_it_needs_a_second_pass_and_no_statistic():
    needs = METHOD().needs()
    assert needs.statistics.statistics == ()
    assert needs.interventions == (METHOD().counterfactual,)
    assert METHOD().credit(random_signals(needs, 0, 4, 5)).terms == ()
