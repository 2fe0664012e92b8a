"""Analyses on invented responses with a planted answer, and the page."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.diagnosed import answers

from sayo_verl import estimates as e
from sayo_verl.diagnose import findings, layers
from sayo_verl.diagnose.answers import IMAGE, REGION, needs_of, read_row, signals_of, usable_methods, write_row
from sayo_verl.diagnose.page import write_files
from sayo_verl.diagnose.run import analyse, headline, labels_of
from sayo_verl.methods import METHODS, Credit, DualMethod, Needs, RegionMethod
from sayo_verl.probe.statistics import StatisticsRequest

ANALYSES = {analysis.name: analysis for analysis in findings.ANALYSES}
REAL = json.loads((Path(__file__).parent.parent / "golden" / "tiny_attention.json").read_text())["responses"]


def finding(name: str, *sets) -> findings.Finding:
    return ANALYSES[name]({f"model {n}": own for n, own in enumerate(sets)})


# ------------------------------------------------------------------------------------------- the number of tokens


def test_on_real_attention_the_pooled_score_of_random_tokens_rises_and_that_of_single_tokens_is_flat():
    responses = [(np.array(a), np.array(v)) for a, v in REAL]
    found = e.random_tokens([pair for pair in responses if len(pair[0]) >= 8], (1, 2, 4, 8, 0), draws=64)
    change = {
        name: [e.mean(values[:, k] - values[:, 0], range(len(values))) for k in range(1, 5)]
        for name, values in found.items()
    }
    print({name: [estimate.text(sign=True) for estimate in row] for name, row in change.items()})
    assert [estimate.value for estimate in change["pooled"]] == sorted(estimate.value for estimate in change["pooled"])
    assert change["pooled"][0].low > 0.04
    assert change["pooled"][-1].low > 0.2
    assert all(estimate.low <= 0 <= estimate.high for estimate in change["single"])
    assert all(abs(estimate.value) < 0.01 for estimate in change["single"])


def test_high_entropy_and_all_tokens_do_not_differ_if_entropy_says_nothing_although_pooled_scores_do():
    for seed in range(3):
        own = answers(60, seed=seed)  # entropy is drawn independently of attention
        gap = finding("entropy", own).facts["model 0/high-entropy minus all tokens"]
        assert gap.low < 0 < gap.high
        high = [e.pooled_score(*(part[findings.selected(a)] for part in a.densities)) for a in own]
        assert e.difference(high, [e.pooled_score(*a.densities) for a in own], findings.prompts_of(own)).high < -0.02


def test_long_and_short_responses_do_not_differ_if_they_look_alike():
    short, long = answers(60, tokens=4), answers(60, tokens=40, seed=1)
    gap = findings.paired({"long": long, "short": short}).facts["R_a of single tokens"]
    assert gap.low < 0 < gap.high
    pooled = [[e.pooled_score(*a.densities) for a in own] for own in (long, short)]
    assert e.difference(*pooled, [a.row for a in long]).low > 0.04


# -------------------------------------------------------------------------------------------- planted differences


def test_looking_that_goes_with_being_right_is_found_within_questions():
    result = finding("score_and_accuracy", answers(looks=lambda row, right: 1.5 if right else 0.6))
    assert result.facts["model 0/concordance within a question"].low > 0.6
    assert "looking at the target goes with being right" in result.sentences[-1]


def test_looking_that_goes_with_easy_questions_alone_is_not_taken_for_help():
    own = answers(
        60,
        accuracy=lambda random, row, sample: float(random.random() < (0.85 if row % 2 else 0.25)),
        looks=lambda row, right: 1.6 if row % 2 else 0.5,
    )
    result = finding("score_and_accuracy", own)
    assert result.facts["model 0/rank correlation"].low > 0.15
    assert "no sign that looking at the target" in result.sentences[-1]


def test_two_models_are_paired_by_row_and_rows_of_one_alone_do_not_count():
    one = answers(30, looks=lambda row, right: 2.0)
    two = [a for a in answers(30) if a.row != 7]
    result = findings.paired({"new": one, "old": two})
    assert "29 questions" in result.sentences[0]
    assert "R_a of single tokens +" in result.sentences[0]
    assert result.facts["accuracy"].value == pytest.approx(0)


def test_late_over_early_is_the_dual_method_s_own_number():
    (own,) = answers(1, 1, tokens=9)
    for name, method in findings.SCORES.items():
        of_method = method.credit(signals_of([own], needs_of([method]))).metrics["late_early_visual_score"]
        late, early = findings.late_and_early(own, method)
        assert late / early == pytest.approx(of_method, rel=1e-5), name


def test_the_scores_of_responses_are_those_that_the_region_method_logs():
    own = answers(3, 2)
    metrics = RegionMethod().credit(signals_of(own, RegionMethod().needs())).metrics
    assert np.mean([a.score for a in own]) == pytest.approx(metrics["token_target_attention_all/mean"], rel=1e-5)
    high = np.mean([a.scores[findings.selected(a)].mean() for a in own])
    assert high == pytest.approx(metrics["token_target_attention/mean"], rel=1e-5)


# ------------------------------------------------------------------------------------------------ layers and heads


def advice(lift_of_layers) -> tuple[str, findings.Finding]:
    result = layers.heads({"m": answers(40, 1, lift_of_layers=lift_of_layers)})
    return result.sentences[0], result


def test_a_layer_that_looks_at_the_boxes_is_proposed_with_its_value_on_the_other_rows():
    says, result = advice(lambda row: [1.0, 3.0, 1.0])
    assert "try algorithm.attn.region.layers=[1]" in says
    assert result.facts["layer 1, held out"].low > 2.5
    assert "No method has a setting heads=" in result.sentences[1]


def test_a_layer_that_looks_there_on_the_choosing_rows_alone_is_not_proposed():
    says, _ = advice(lambda row: [1.0, 1.0 if row % 2 else 3.0, 1.2])
    assert "no reason to change algorithm.attn.region.layers" in says


def test_chance_does_not_propose_a_layer_on_few_rows():
    result = layers.heads({"m": answers(15, 1, lift_of_layers=lambda row: [1.0, 3.0, 1.0])})
    assert "no layer can be chosen and checked; 16 are needed" in result.sentences[0]
    assert "Boxes over chance" in result.grids


def test_the_last_layer_is_kept_if_it_looks_most():
    says, _ = advice(lambda row: [1.0, 1.0, 3.0])
    assert "keep it" in says


def test_without_boxes_heads_are_chosen_by_spatial_entropy():
    result = layers.heads({"m": answers(10, 1, boxes=False)})
    assert "no layer can be chosen" in result.sentences[0]
    assert result.table[1][:3] == ("spatial entropy", "0", "0")
    assert result.header == ("layer", "head", "image_mass", "spatial_entropy")


# ---------------------------------------------------------------------------------------------- what data lack


def test_without_boxes_what_needs_them_says_so():
    found = {f.name: f for f in analyse({"m": answers(6, boxes=False)})}
    assert found["score_and_accuracy"].left_out == found["random_tokens"].left_out == "no row has a box"
    assert [panel[0] for panel in found["position"].panels] == ["Attention to the image"]
    assert not found["length"].left_out


def test_without_a_ground_truth_answers_are_not_parted():
    found = {f.name: f for f in analyse({"m": answers(6, truth=False)})}
    assert "no row has a ground truth" in found["length"].left_out
    assert {line.label for line in found["position"].lines} == {"all answers"}


def test_boxes_over_chance_with_a_low_score_are_explained_at_once():
    own = []
    for a in answers(40, looks=lambda row, right: 0.05):
        region = a.values[REGION.key].copy()
        region[0] = 1.0  # one token looks at the boxes alone
        image = a.values[IMAGE.key] + (np.arange(a.tokens) == 0)
        own.append(dataclasses.replace(a, values={**a.values, REGION.key: region, IMAGE.key: image}))
    first = headline({"m": own}, analyse({"m": own}))[0]
    assert "A few tokens look there strongly and most do not (R_a of single tokens 0." in first
    assert "A few tokens" not in headline({"m": answers(40)}, [])[0]


def test_one_response_has_values_and_no_interval():
    own = answers(1, 1)
    found = analyse({"m": own})
    assert "no interval" in headline({"m": own}, found)[0]
    assert all(math.isnan(v.low) for f in found for v in f.facts.values())


# --------------------------------------------------------------------------------------------------------- methods


@dataclasses.dataclass(frozen=True)
class OwnMethod:
    """A method of a user."""

    name = "attn_own"
    gives = frozenset()

    def needs(self) -> Needs:
        return Needs(StatisticsRequest((IMAGE,)))

    def credit(self, signals) -> Credit:
        return Credit(metrics={"own/mean": float(signals[IMAGE][signals.response_mask.bool()].mean())})


def test_metrics_of_every_registered_method_appear_and_a_missing_package_leaves_one_out(monkeypatch):
    ours = {name: cls for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.methods.")}
    monkeypatch.setattr("sayo_verl.diagnose.answers.METHODS", {**ours, "attn_own": OwnMethod})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    methods, left_out = usable_methods()
    assert list(left_out) == ["attn_anchor"]
    result = findings.methods_table({"m": answers(3)}, methods, left_out)
    assert {"attn_region", "attn_dual", "attn_faithful", "attn_sensitivity", "attn_evidence", "attn_own"} == {
        row[0] for row in result.rows
    }
    assert "pip install" in result.sentences[-1]


def test_methods_that_need_right_answers_are_given_the_responses_that_have_them():
    result = findings.methods_table({"m": answers(3, truth=False)}, {"attn_dual": DualMethod()}, {})
    assert ("attn_dual", "dual_gate_rate", "m") in {row[:3] for row in result.rows}
    methods, _ = usable_methods()
    faithful = {"attn_faithful": methods["attn_faithful"]}
    assert findings.methods_table({"m": answers(3, truth=False)}, faithful, {}).rows == []


# ----------------------------------------------------------------------------------------------------------- files


def test_a_row_s_file_gives_back_what_was_measured(tmp_path: Path):
    own = answers(1, 3)
    write_row(tmp_path / "row.npz", own)
    for a, b in zip(own, read_row(tmp_path / "row.npz"), strict=True):
        assert dataclasses.replace(a, values={}) == dataclasses.replace(b, values={})
        assert a.values.keys() == b.values.keys()
        assert all(np.array_equal(value, b.values[key]) for key, value in a.values.items())
    assert [file.name for file in tmp_path.iterdir()] == ["row.npz"]


def test_files_of_two_models(tmp_path: Path):
    sets = {"a <b>": answers(6), "b": answers(6, seed=1, looks=lambda row, right: 2.0)}
    found = analyse(sets)
    (tmp_path / "length.csv").write_text("of an earlier run")
    left = [dataclasses.replace(f, left_out="no & reason") if f.name == "length" else f for f in found]
    file = write_files(tmp_path, "a <b>", ["What was run."], headline(sets, found), left, [], {"seed": 0})
    html = file.read_text()
    assert "a &lt;b&gt;" in html
    assert "<b>" not in html.replace("</b>", "")
    assert "no &amp; reason" in html
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert len(summary["sentences"]) == 3
    names = {f.name for f in left if not f.left_out}
    assert {path.stem for path in tmp_path.glob("*.csv")} == names
    assert {path.stem for path in tmp_path.glob("*.png")} == names - {"paired", "methods"}
    header, *rows = (tmp_path / "position.csv").read_text().splitlines()
    assert header.split(",")[:4] == ["panel", "answers", "x", "mean"]
    assert len(rows) == 2 * 2 * 2 * findings.POSITIONS


def test_models_of_one_name_are_told_apart():
    assert labels_of(["runs/a/huggingface", "runs/b/huggingface"]) == ["huggingface (1)", "huggingface (2)"]
    assert labels_of(["x/old", "x/new"]) == ["old", "new"]


def test_every_finding_has_a_place_on_the_page():
    found = analyse({"m": answers(4)})
    assert len({f.name for f in found}) == len(found) == len(findings.ANALYSES) + 4
    assert all(f.sentences or f.left_out for f in found)
