"""Learning as a share of a known span, worked by hand; the plan; files that are made once."""

import json
import math

import pytest

from benchmarks.yardstick import learning, store
from benchmarks.yardstick.loop import LoopConfig
from benchmarks.yardstick.plan import Plan, _used


def run(method, seed, accuracies, rate=3e-4, kind="half_ignorant"):
    curve = [{"step": 10 * n, "acc": acc} for n, acc in enumerate(accuracies)]
    return {"start": f"{kind}-{seed}-abc", "method": method, "rate": rate, "seed": seed, "curve": curve}


RUNS = [
    run("grpo", 0, [0.2, 0.2, 0.3, 0.4]),
    run("grpo", 1, [0.2, 0.2, 0.2, 0.2]),
    run("grpo", 2, [0.2, 0.3, 0.3, 0.3]),
    run("oracle_plus", 0, [0.2, 0.4, 0.5, 0.6]),
    run("oracle_plus", 1, [0.2, 0.4, 0.5, 0.6]),
    run("oracle_plus", 2, [0.2, 0.5, 0.5, 0.5]),
    run("half", 0, [0.2, 0.3, 0.4, 0.5]),
    run("half", 1, [0.2, 0.35, 0.35, 0.35]),
    run("half", 2, [0.2, 0.4, 0.4, 0.4]),
    run("grpo", 100, [0.2, 0.9, 0.9, 0.9]) | {"start": "half_ignorant-0-abc"},
]
GRPO, PLUS, OTHER = (learning.by_seed(RUNS, "half_ignorant", m, 3e-4) for m in ("grpo", "oracle_plus", "half"))


def test_the_baseline_has_learned_nothing_and_the_ceiling_all():
    assert learning.share(GRPO, GRPO, PLUS).value == pytest.approx(0.0)
    assert learning.share(PLUS, GRPO, PLUS).value == pytest.approx(1.0)


def test_a_method_is_a_share_of_the_span_over_all_seeds():
    # gains 0.1, 0.15, 0.1 of spans 0.2, 0.3, 0.2
    assert learning.share(OTHER, GRPO, PLUS).value == pytest.approx(0.35 / 0.7)
    gain = learning.gain(OTHER, GRPO)
    assert gain.value == pytest.approx(0.35 / 3)
    assert gain.low < gain.value < gain.high


def test_without_a_span_nothing_is_a_share_of_it():
    assert math.isnan(learning.share(OTHER, PLUS, GRPO).value)  # the ceiling learned less than the baseline
    one = {0: run("oracle_plus", 0, [0.2, 0.1, 0.2, 0.2]), 1: PLUS[1], 2: GRPO[2]}
    assert learning.gain(one, GRPO).value > 0
    assert math.isnan(learning.share(OTHER, GRPO, one).value)  # more, but not clearly


def tuned(method, rate, start, accuracy):
    return run(method, 100, [0.2, accuracy], rate) | {"start": f"half_ignorant-{start}-abc"}


def test_the_best_rate_has_the_highest_mean_over_the_starts():
    ends = {1e-4: (0.5, 0.5), 3e-4: (0.8, 0.1), 6e-4: (0.4, 0.4)}
    tuning = [tuned("grpo", rate, start, acc) for rate, accs in ends.items() for start, acc in enumerate(accs)]
    assert learning.chosen_rates([*tuning, run("grpo", 0, [0.2, 0.9], 6e-4)], 100) == {"grpo": 1e-4}


def test_a_method_that_lacks_a_start_or_a_rate_has_no_best_one():
    all_four = [tuned("grpo", rate, start, 0.3) for rate in (1e-4, 3e-4) for start in (0, 1)]
    one_start = [tuned("region", rate, 0, 0.3) for rate in (1e-4, 3e-4)]
    one_rate = [tuned("dual", 1e-4, start, 0.3) for start in (0, 1)]
    assert learning.chosen_rates([*all_four, *one_start, *one_rate], 100) == {"grpo": 1e-4}


def test_a_rate_that_was_tried_on_fewer_starts_chooses_nothing():
    uneven = [tuned("grpo", 3e-4, 0, 0.5), tuned("grpo", 3e-4, 1, 0.3), tuned("grpo", 6e-4, 0, 0.45)]
    assert learning.chosen_rates(uneven, 100) == {}


def test_final_accuracy_leaves_out_the_start():
    assert learning.final(run("grpo", 0, [0.0, 0.4, 0.6])) == pytest.approx(0.5)


def test_runs_that_chose_the_rate_are_not_compared():
    assert sorted(GRPO) == [0, 1, 2]
    assert all(one["seed"] != 100 for one in GRPO.values())


def test_the_span_is_wide_where_the_ceiling_needs_half_of_the_steps():
    steps = learning.speed(PLUS, GRPO)
    assert steps[0] == (10, 20)
    assert 0 in learning.is_wide(steps)
    assert learning.is_wide({0: (20, 30), 1: (None, 10), 2: (10, None)}) == []


def test_a_plan_has_each_method_at_its_best_rate_and_at_the_common_one_once():
    plan = Plan(methods=("grpo", "region"), variants=(), rates=(1e-4, 3e-4))
    best = {"grpo": 1e-4, "region": 3e-4}
    found = [(c.method, c.rate) for c in plan.learning(best, 0, "half_ignorant")]
    assert found == [("grpo", 1e-4), ("region", 1e-4), ("region", 3e-4)]


def test_a_plan_chooses_rates_on_the_first_starts_with_a_seed_of_its_own():
    tuning = list(Plan(methods=("grpo", "region"), variants=(), rates=(1e-4, 3e-4)).tuning())
    assert [start for start, _ in tuning] == [0] * 4 + [1] * 4
    assert {(c.method, c.rate) for _, c in tuning} == {(m, r) for m in ("grpo", "region") for r in (1e-4, 3e-4)}
    assert {c.seed for _, c in tuning}.isdisjoint(Plan.seeds)
    assert len(list(Plan(methods=("grpo",), variants=(), seeds=(7,)).tuning())) == len(Plan.rates)


def test_a_plan_of_one_rate_or_of_knowing_starts_alone_chooses_none():
    plans = Plan(methods=("grpo",), rates=()), Plan(methods=("grpo",), kinds=("knowing",))
    assert [list(plan.tuning()) for plan in plans] == [[], []]
    assert [c.rate for c in plans[0].learning({}, 0, "half_ignorant")] == [Plan.common_rate]


def test_variants_and_knowing_starts_have_the_common_rate_and_a_variant_is_left_out_without_its_method():
    variants = ("dual_predicting", "anchor_rest", "region_all")
    plan = Plan(methods=("grpo", "region", "dual"), variants=variants, rates=(1e-4, 3e-4))
    assert plan.compared() == ("grpo", "region", "dual", "dual_predicting", "region_all")
    best = {"grpo": 1e-4, "region": 3e-4, "dual": 1e-4}
    runs = [(c.method, c.rate) for c in plan.learning(best, 0, "half_ignorant")]
    assert runs == [("grpo", 1e-4), ("region", 1e-4), ("region", 3e-4), ("dual", 1e-4), ("dual_predicting", 1e-4)]
    knowing = [(c.method, c.rate) for c in plan.learning(best, 0, "knowing")]
    assert knowing == [("grpo", 1e-4), ("region", 1e-4), ("dual", 1e-4)]


def test_a_result_names_the_settings_of_its_methods_and_the_file_of_an_own_one():
    used = _used([LoopConfig(method=name) for name in ("grpo", "anchor_rest", "oracle")])
    assert list(used) == ["anchor_rest", "oracle"]
    assert (used["anchor_rest"]["weighting"], used["anchor_rest"]["strength"]) == ("rest", 1.0)
    assert "code" not in used["anchor_rest"]
    assert set(used["oracle"]) == {"strength", "code"}


def test_a_result_is_made_once_and_holds_its_settings(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    first = store.once(tmp_path, "a", {"seed": 0}, make)
    assert store.once(tmp_path, "a", {"seed": 0}, make) == first == {"seed": 0, "value": 1}
    assert store.once(tmp_path, "a", {"seed": 1}, make)["value"] == 2
    assert store.all_of(tmp_path) == [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_that_make_the_same_result_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(store.os, "getpid", lambda: 1)

    def make():
        monkeypatch.setattr(store.os, "getpid", lambda: 2)
        assert store.once(tmp_path, "a", {"seed": 0}, lambda: {"value": 2})["value"] == 2
        return {"value": 1}

    assert store.once(tmp_path, "a", {"seed": 0}, make) == {"seed": 0, "value": 1}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def score_of(seed, used, prompts=64):
    names = ["grpo", *used]
    return {"start": f"half_ignorant-{seed}-a", "prompts": prompts, "responses": 8, "seed": 0, "used": used,
            "methods": {name: {} for name in names}, "example": {"credit": {name: [0] for name in names}}}  # fmt: skip


def test_scores_of_several_lists_of_methods_are_one_entry_of_their_start(tmp_path):
    for each in (score_of(0, {"own": {"code": "x"}}), score_of(0, {"own": {"code": "x"}, "region": {}})):
        store.once(tmp_path, "s", each, dict)
    store.once(tmp_path, "s", score_of(1, {"region": {}}), dict)
    found = sorted(store.scores_of(tmp_path), key=lambda each: each["start"])
    assert [set(each["methods"]) for each in found] == [{"grpo", "own", "region"}, {"grpo", "region"}]
    assert set(found[0]["example"]["credit"]) == {"grpo", "own", "region"}


@pytest.mark.parametrize("other", [score_of(0, {"own": {"code": "y"}}), score_of(1, {}, prompts=8)])
def test_scores_of_a_changed_method_or_of_other_rollouts_are_not_put_together(other, tmp_path):
    for each in (score_of(0, {"own": {"code": "x"}}), other):
        store.once(tmp_path, "s", each, dict)
    with pytest.raises(store.MixedResults):
        store.scores_of(tmp_path)
