"""The methods of docs/add_a_method.md: the page shows the files, the files do what it says.

Shape suffixes: B rows, T response tokens.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.counterfactual_signals import changed
from support.refusals import refusal

from sayo_verl.launch.settings import load_methods, settings_from_config
from sayo_verl.methods import METHODS, Signals, advantages, own_methods
from sayo_verl.methods.random_signals import random_signals

ROOT = Path(__file__).parent.parent.parent
NAMES = ("reliance", "glance")
FILES = {name: ROOT / "recipe" / "example" / f"{name}.py" for name in NAMES}
YAMLS = {name: ROOT / "configs" / "method" / f"{name}.yaml" for name in NAMES}
load_methods([str(FILES[name]) for name in NAMES])
METHOD, GLANCE = METHODS["attn_reliance"], METHODS["attn_glance"]
NAN = float("nan")


def test_the_page_shows_the_files_as_they_are():
    page = (ROOT / "docs" / "add_a_method.md").read_text()
    python = re.findall(r"```python\n(.*?)```", page, re.S)
    assert sorted(python) == sorted(FILES[name].read_text() for name in NAMES)
    assert re.findall(r"```yaml\n(.*?)```", page, re.S) == [YAMLS["glance"].read_text()]


def test_the_users_own_methods_are_those_of_other_packages():
    own = own_methods()
    assert {own["attn_reliance"], own["attn_glance"]} == {METHOD, GLANCE}
    shipped = {"attn_region", "attn_dual", "attn_anchor", "attn_faithful", "attn_sensitivity", "attn_evidence"}
    assert not own.keys() & shipped


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


def test_tokens_get_more_advantage_as_far_as_the_image_raises_their_probability():
    signals = changed([[math.log(2), 0.0, -3.0], [math.log(4)], [1.0]], "aaa", no_image=[2])
    credit = METHOD().credit(signals)
    (bonus,) = credit.bonuses
    assert bonus.value.tolist() == [pytest.approx(row) for row in ([0.25, 0, -0.5], [0.375, 0, 0], [0, 0, 0])]
    assert credit.metrics["reliance/mean"] == pytest.approx((0.5 + 0 - 1 + 0.75) / 4)
    reward = torch.tensor([1.0, 0.0, 0.5])
    plain, _ = advantages(reward, signals.response_mask, signals.uid)
    got, _ = advantages(reward, signals.response_mask, signals.uid, credit)
    assert torch.allclose(got[0], plain[0] * torch.tensor([1.25, 1.0, 0.5]))
    assert float(got[1, 0]) == pytest.approx(float(plain[1, 0]) * 0.625)
    assert torch.equal(got[2], plain[2])
    with refusal("A05", "weight"):
        METHOD(weight=-1.0)


def test_it_needs_a_second_pass_and_no_statistic():
    needs = METHOD().needs()
    assert needs.statistics.statistics == ()
    assert needs.interventions == (METHOD().counterfactual,)
    assert METHOD().credit(random_signals(needs, 0, 4, 5)).terms == ()
