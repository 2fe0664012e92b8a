"""What is shown of which method."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.report_runs import GRPO, OF_METHOD, line, make_run, write_run

from sayo_verl.errors import SayoError
from sayo_verl.hooks import phases, step_guard, store
from sayo_verl.hooks import trainer as trainer_of_ours
from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.methods import METHODS, Credit, Needs, Signals, TokenBonus
from sayo_verl.methods.random_signals import random_signals
from sayo_verl.metrics import Metric, Panel, declaration
from sayo_verl.probe.statistics import StatisticsRequest
from sayo_verl.report import catalogue as c
from sayo_verl.report.runs import load_run


class Adds:
    """Gives the one kind of credit that no method of the package gives."""

    name = "attn_adds"

    def needs(self) -> Needs:
        return Needs(StatisticsRequest(()))

    def credit(self, signals: Signals) -> Credit:
        return Credit(bonuses=(TokenBonus(signals.response_mask.float()),))


def logged_names() -> set[str]:
    """Every name below ``sayo/`` that the methods and the trainer log."""
    anchor = METHODS["attn_anchor"]
    made = [cls() for cls in METHODS.values() if cls.__module__.startswith("sayo_verl.")]
    made += [METHODS["attn_region"](per_token=True), anchor(parts=2), anchor(weighting="top")]
    found = set()
    for method in [*made, Adds()]:
        signals = random_signals(method.needs(), 3, 12, 9)
        context = AdvantageContext(method, signals, norm_by_std=True, spread_floor=None)
        token = CURRENT.set(context)
        try:
            make_estimator(method.name)(torch.zeros(12, 9), signals.response_mask, index=signals.uid)
        finally:
            CURRENT.reset(token)
        found |= {f"sayo/{name}" for name in context.metrics}
    source = Path(trainer_of_ours.__file__).read_text()
    found |= set(re.findall(r'metrics\["(sayo/[a-z_]+)"\]', source + Path(phases.__file__).read_text()))
    found |= set(re.findall(r'"(sayo/[a-z_/]+)"', Path(step_guard.__file__).read_text()))
    assert 'f"sayo/{name}/mean": value for name, value in store.fetch_reward_parts(batch)' in source
    stale = store.staleness(SimpleNamespace(tags=[{"min_global_steps": 0, "max_global_steps": 0}]), 1)
    return found | {"sayo/accuracy/mean", "sayo/format/mean"} | {f"sayo/{name}" for name in stale}


def test_the_catalogue_knows_what_is_logged_and_nothing_else():
    listed = {name for section in c.SECTIONS for name in section.names if name.startswith("sayo/")}
    assert logged_names() ^ listed == set()


def test_the_catalogue_has_a_section_with_a_paper_for_each_method_and_no_name_twice():
    own = {name for name, cls in METHODS.items() if cls.__module__.startswith("sayo_verl.")}
    assert {section.estimator for section in c.OF_METHODS} == own
    assert all(section.reference[0] and section.reference[1].startswith("arXiv ") for section in c.OF_METHODS)
    for section in c.OF_METHODS:  # what has no public formulas is called so, as in the method's own file
        ours = "OUR READING" in (sys.modules[METHODS[section.estimator].__module__].__doc__ or "")
        assert section.reference[0].startswith("our reading of ") is ours
        assert section.reference[1] in sys.modules[METHODS[section.estimator].__module__].__doc__.replace("\n", " ")
    every = [metric for section in c.SECTIONS for metric in section.metrics]
    assert len({metric.name for metric in every}) == len({metric.label for metric in every}) == len(every)
    panels = [panel for section in c.SECTIONS for panel in section.panels]
    assert len({panel.title for panel in panels}) == len(panels)
    assert all(panel.unit and len(panel.metrics) <= 2 and panel.every for panel in panels)


@pytest.mark.parametrize(
    ("estimator", "label"),
    {
        "attn_anchor": "attn_anchor: our reading of AT-RL, arXiv 2602.11455",
        "attn_faithful": "attn_faithful: our reading of Faithful-MR1, arXiv 2605.22072",
        "attn_sensitivity": "attn_sensitivity: VPPO, arXiv 2510.09285",
        "attn_evidence": "attn_evidence: Evidence-RL, arXiv 2608.08021",
        "attn_mix": "attn_mix: SAYO + VGPO",
        "attn_mine": "attn_mine",
        "grpo": "grpo: GRPO, arXiv 2402.03300",
        "unknown": "estimator unknown",
    }.items(),
)
def test_an_estimator_is_named_with_its_paper(tmp_path, estimator, label):
    run = make_run(tmp_path, OF_METHOD.get(estimator, GRPO), estimator=estimator)
    assert c.estimator_of(run) == label


@pytest.mark.parametrize(
    ("estimator", "shown"),
    {
        "grpo": [],
        "attn_region": ["r_v", "R_a"],
        "attn_dual": ["gate rate", "token factor std"],
        "attn_anchor": ["anchor share", "largest weight"],
        "attn_faithful": ["faithful reward", "effect"],
        "attn_sensitivity": ["sensitivity", "largest factor"],
        "attn_evidence": ["margin", "drop"],
        "attn_mix": ["r_v", "R_a", "gate rate", "token factor std"],
        "attn_mine": ["a_third", "mine/mean"],
    }.items(),
)
def test_the_live_view_shows_a_methods_own_headlines(estimator, shown):
    assert [metric.live for metric in c.headlines(OF_METHOD[estimator])] == ["reward", "accuracy", *shown]


def test_metrics_that_a_users_own_method_declares_are_shown_as_declared(tmp_path):
    class Mine:
        reference = ("mine", "arXiv 0000.00000")
        metrics = (
            Panel("Mine", "share", (Metric("mine/mean", "mean of mine", 0, 1, live="mine"),), limits=(0, 1)),
            Metric("mine_share", "share of mine"),
        )

    declared = {"attn_mine": json.loads(json.dumps(declaration(Mine)))}
    launch = {"estimator": "attn_mine", "methods": declared}
    run = load_run(write_run(tmp_path, line(1, **OF_METHOD["attn_mine"]), launch=launch))
    assert [panel.title for panel in c.panels_of([run])][-2:] == ["Mine", "a_third"]
    assert {"mean of mine", "share of mine", "a_third"} <= {metric.label for metric in c.rows_of(run)}
    assert [metric.live for metric in c.headlines(run.series, run.methods)][-2:] == ["mine", "a_third"]
    assert c.estimator_of(run) == "attn_mine: mine, arXiv 0000.00000"


def test_a_damaged_declaration_of_metrics_is_refused_by_the_report(tmp_path):
    launch = {"methods": {"attn_mine": {"reference": ["a", "b"], "metrics": [{"label": "no name"}]}}}
    run = load_run(write_run(tmp_path, line(1, **GRPO), launch=launch))
    with pytest.raises(SayoError, match="R04"):
        c.rows_of(run)


def test_the_room_needs_neither_torch_nor_verl():
    code = "import sys, sayo_verl.report.curves, sayo_verl.report.table, sayo_verl.report.watch as w; "
    code += "assert not {'torch', 'verl', 'ray'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seconds_of_single_passes_are_rows_of_the_table_and_nothing_else(tmp_path):
    passes = {f"{c.PASSES}/region.grey": 1.0, f"{c.PASSES}/elsewhere.grey.s0.d1": 2.0}
    run = make_run(tmp_path, OF_METHOD["attn_evidence"] | {c.PASSES: 3.0} | passes, estimator="attn_evidence")
    rows = {metric.name: metric for metric in c.rows_of(run)}
    assert rows[f"{c.PASSES}/region.grey"].label == "pass region.grey (seconds)"
    assert passes.keys() | {c.PASSES} <= rows.keys()
    assert not {m.name for panel in c.panels_of([run]) for m in panel.metrics} & passes.keys()
    assert not {metric.name for metric in c.headlines(run.series)} & passes.keys()
