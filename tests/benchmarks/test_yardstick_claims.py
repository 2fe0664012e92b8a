"""Verdicts on claims from intervals, and numbers from stored results."""

import math

import pytest

from benchmarks.yardstick.claims import Claim, across, claim_lines, claims, late_lift, same_layer
from benchmarks.yardstick.plan import Plan
from sayo_verl.estimates import Estimate

ABOVE, BELOW, ACROSS = Estimate(0.3, 0.1, 0.5), Estimate(-0.3, -0.5, -0.1), Estimate(0.0, -0.1, 0.1)
NONE = Estimate(math.nan)


@pytest.mark.parametrize(
    ("numbers", "needs", "verdict"),
    [
        ((ABOVE, ABOVE), "above", "holds"),
        ((ABOVE, ACROSS), "above", "open"),
        ((ABOVE, BELOW), "above", "open"),
        ((BELOW, BELOW), "above", "fails"),
        ((BELOW,), "below", "holds"),
        ((ABOVE, NONE), "above", "holds, in part"),
        ((NONE,), "above", "not run"),
        ((Estimate(0.3),), "above", "open"),
        ((ABOVE,), "", "no verdict"),
    ],
)
def test_a_claim_holds_or_fails_only_if_every_interval_is_on_one_side(numbers, needs, verdict):
    claim = Claim("it is so", "a paper", {str(n): each for n, each in enumerate(numbers)}, needs)
    assert claim.verdict == verdict
    assert claim_lines([claim])[-1].endswith(f"| {verdict} |")


def scored(value):
    looks = {"share": [0.5, 0.4, 0.6], "late / early": [value, 0.0, 2.0]}
    return {
        "start": "half_ignorant-0-a",
        "methods": {},
        "statistics": {"image_mass, layer 0": {"separation": [0.9, 0.8, 1.0]}},
        "looks": {"layer 0": looks},
        "rates": {"tokens with 90 % of the dependence": 0.1},
    }


def test_a_number_is_the_mean_over_starts_with_their_spread_as_interval():
    found = across([scored(0.7), scored(0.8), scored(0.9)], "looks", "layer 0", "late / early")
    assert found.value == pytest.approx(0.8)
    assert found.low < 0.7 < 0.9 < found.high
    assert math.isnan(across([scored(None)], "looks", "layer 0", "late / early").value)
    assert math.isnan(across([], "looks", "layer 0", "late / early").value)


def run(method, seed, late):
    curve = [{"step": step, "acc": 0.2} for step in (0, 10)]
    looks = {"layer 0": {"late / early": [late, None, None]}}
    return {"start": f"half_ignorant-{seed}-a", "method": method, "rate": 1e-4, "seed": seed, "curve": curve,
            "looks": looks}  # fmt: skip


def test_the_lift_of_late_attention_is_paired_by_seed():
    runs = [run("grpo", 0, 0.6), run("grpo", 1, 0.9), run("dual", 0, 0.7), run("dual", 1, 1.0), run("dual", 2, 9.0)]
    assert late_lift(runs, "dual", 1e-4, "layer 0").value == pytest.approx(0.1)
    assert math.isnan(late_lift(runs, "anchor", 1e-4, "layer 0").value)


def test_the_layer_that_looks_is_compared_with_the_layer_that_separates():
    two = scored(0.7)
    two["looks"]["layer 1"] = {"share": [0.1, 0.0, 0.2], "late / early": [0.7, 0.6, 0.8]}
    two["statistics"]["image_mass, layer 1"] = {"separation": [0.95, 0.9, 1.0]}
    assert same_layer([scored(0.7), two]).value == pytest.approx(0.5)
    assert math.isnan(same_layer([]).value)


def test_claims_of_what_was_not_run_say_so():
    found = {claim.text: claim.verdict for claim in claims([], [scored(0.7), scored(0.8), scored(0.75)], Plan())}
    assert found["Attention on the image decays along a response"] == "holds"
    assert (
        found["Training without the anchors hurts: gain over GRPO of the other 85 % of the tokens alone"] == "not run"
    )
