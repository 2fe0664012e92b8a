"""A user's own method is tried at launch; each mistake in it ends with one line."""

import time
from pathlib import Path

import pytest
from support.launch_config import refused
from support.refusals import refusal

import sayo_verl.methods
from sayo_verl.launch.method_check import ROWS, SEED, TOKENS, check_method
from sayo_verl.launch.settings import load_methods, settings_from_config
from sayo_verl.methods import METHODS, AnchorMethod, Mix, Needs, RegionMethod
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.probe.statistics import StatisticsRequest

FILE = """
from dataclasses import dataclass
import torch
from sayo_verl.methods import Credit, Needs, RewardTerm, TokenBonus, register_method
from sayo_verl.methods.base import masked_mean
from sayo_verl.probe.statistics import Statistic, StatisticsRequest

MASS = Statistic("image_mass")

@register_method
@dataclass(frozen=True)
class Mine:
    weight: float = 1.0
    name = "attn_mine"
    gives = frozenset({"reward"})

    def needs(self):
        return Needs(StatisticsRequest((MASS,)))

    def credit(self, signals):
        eligible = signals.eligible_rows(boxes=False)
        value = masked_mean(signals[MASS], signals.response_mask.bool())
        return Credit((RewardTerm("mine", value, eligible, self.weight),), metrics={"mine/mean": 0.5})
"""


@pytest.fixture
def registry(monkeypatch):
    """A registry that the test may change."""
    monkeypatch.setattr("sayo_verl.methods.METHODS", METHODS.copy())
    for module in ("settings", "preflight"):
        monkeypatch.setattr(f"sayo_verl.launch.{module}.METHODS", sayo_verl.methods.METHODS)
    return sayo_verl.methods.METHODS


@pytest.fixture
def mine(registry, tmp_path):
    """``mine(right, wrong)``: the registered class of the file above with this replacement."""

    def load(right: str = "", wrong: str = "") -> type:
        assert right in FILE
        (tmp_path / "mine.py").write_text(FILE.replace(right, wrong, 1) if right else FILE)
        load_methods([str(tmp_path / "mine.py")])
        return registry["attn_mine"]

    return load


def line_of(text: str, path: Path) -> str:
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return f"{path}:{number}"


def test_the_batch_of_the_trial_has_rows_of_every_kind_and_two_groups():
    signals = random_signals(Needs(StatisticsRequest(())), SEED, ROWS, TOKENS, unread=0.0)
    assert sorted(map(signals.uid.count, set(signals.uid))) == [2, 2]
    assert ((signals.image_tokens > 0).sum(), (signals.region_tokens > 0).sum()) == (3, 2)
    assert (signals.response_mask.sum(-1) > 1).all()


def test_a_right_method_passes_quickly_alone_and_in_a_mix(mine):
    method = mine()()
    start = time.perf_counter()
    check_method(method)
    check_method(Mix((RegionMethod(), method)))
    assert time.perf_counter() - start < 0.2


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("signals[MASS]", "signals.entropy[:, 99]", "IndexError: "),
        ("signals.eligible_rows(boxes=False)", "signals.rows()", "AttributeError: 'Signals' object has no"),
        ("(MASS,)", "(MASS,), layers=(-1,)", "TypeError: .*unexpected keyword argument 'layers'"),
    ],
    ids=["credit", "attribute", "needs"],
)
def test_an_exception_of_the_method_is_one_line_with_the_line_of_its_file(mine, tmp_path, right, wrong, says):
    method = mine(right, wrong)()
    place = line_of(wrong, tmp_path / "mine.py")
    with refusal("L72", f"the method fails .* at {place} .*got {says}"):
        check_method(method)
    with refusal("L72", f"the method fails .* at {place} .*got {says}"):
        check_method(settings_from_config("attn_mix", {"mix": ["region", "mine"]}).method)


def test_an_exception_in_a_post_init_is_one_line(mine, tmp_path):
    mine("    def needs(self)", "    def __post_init__(self):\n        assert self.weigth\n\n    def needs(self)")
    with refusal("L72", rf"gets its settings \| at {line_of('weigth', tmp_path / 'mine.py')} "):
        settings_from_config("attn_region", {})


def test_a_method_that_returns_no_credit_is_refused(mine):
    with refusal("L72", "what Mine returns"):
        check_method(mine("return Credit(", "return None and Credit(")())


@pytest.mark.parametrize(
    ("right", "wrong", "code"),
    [
        ("(MASS,)", '("image_mass",)', "P12"),
        ("(MASS,)", "(MASS)", "P12"),
        ("signals[MASS]", 'signals["image_mass"]', "A10"),
        ("signals[MASS]", 'signals.required("image_mass")', "A10"),
        ("signals[MASS]", "signals.image_mass", "A10"),
        ("signals[MASS]", 'signals[Statistic("image_mass", layers=(0,))]', "A10"),
        ('"image_mass"', '"patch_sums"', "A20"),
        ('{"reward"}', "{}", "A21"),
        ("value, eligible", "value[:1], eligible", "A02"),
        ("value, eligible", "value / 0, eligible", "A03"),
        ('{"mine/mean": 0.5}', '{"mine/mean": float("nan")}', "A03"),
        ("),), metrics", "),), token_weight=-signals.entropy, metrics", "A11"),
        ("),), metrics", "),), bonuses=(TokenBonus(signals.entropy / 0),), metrics", "A22"),
        ("),), metrics", "),), bonuses=(TokenBonus(signals.entropy),), metrics", "A21"),
        ("signals[MASS]", 'signals.reported("depth")', "A10"),
    ],
)
def test_an_error_that_says_what_to_do_passes_through(mine, right, wrong, code):
    with refusal(code):
        check_method(mine(right, wrong)())


def test_a_metric_that_another_method_of_the_mix_logs_is_refused(mine):
    with refusal("A12", "metric of the same name"):
        check_method(Mix((RegionMethod(), mine('"mine/mean"', '"region_reward/mean"')())))


def test_built_in_methods_are_not_called(mine, monkeypatch):
    """Those of the mix are, where they start no processes."""
    monkeypatch.setattr(AnchorMethod, "credit", lambda *_: pytest.fail("it would start processes"))
    monkeypatch.setattr(RegionMethod, "credit", lambda *_: pytest.fail("it is called"))
    check_method(RegionMethod())
    check_method(Mix((AnchorMethod(), mine()())))


def test_the_launcher_tries_the_method_before_it_looks_for_files(make, mine, tmp_path):
    mine("signals[MASS]", "signals.mass")
    config = make(**{"algorithm.adv_estimator": "attn_mine", "actor_rollout_ref.model.path": "/absent"})
    assert refused(config, "L72", dry_run=True).where == line_of("signals.mass", tmp_path / "mine.py")
