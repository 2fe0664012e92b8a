"""The method of docs/add_a_method.md: the page shows the file, the file does what it says.

Shape suffixes: B rows, T response tokens.
"""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from support.invented_signals import invent

from sayo_verl.launch.settings import load_methods, settings_from_config
from sayo_verl.methods import METHODS, Signals

ROOT = Path(__file__).parent.parent.parent
FILE, YAML = ROOT / "recipe" / "example" / "sensitivity.py", ROOT / "configs" / "method" / "sensitivity.yaml"
load_methods([str(FILE)])
METHOD = METHODS["attn_sensitivity"]
NAN = float("nan")


def test_the_page_shows_the_files_as_they_are():
    page = (ROOT / "docs" / "add_a_method.md").read_text()
    assert re.findall(r"```python\n(.*?)```", page, re.S) == [FILE.read_text()]
    assert re.findall(r"```yaml\n(.*?)```", page, re.S) == [YAML.read_text()]


def test_the_yaml_selects_it_with_its_defaults():
    config = yaml.safe_load(YAML.read_text())
    assert [ROOT / path for path in config["sayo"]["modules"]] == [FILE]
    method = settings_from_config(config["algorithm"]["adv_estimator"], config["algorithm"].get("attn", {})).method
    assert method == METHOD()


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
        counterfactual_log_probs=-1.0 - differences,
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
    assert needs.intervention is not None
    assert METHOD().credit(invent(needs, 0, 4, 5)).terms == ()
