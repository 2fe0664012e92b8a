"""Figures of runs."""

import math
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from support.report_runs import ATTENTION, GRPO, OF, OF_METHOD, OWN, R_V, cells, line, make_run, write_run

from sayo_verl.errors import SayoError
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.curves import plot_run, plot_runs
from sayo_verl.report.panels import running_mean
from sayo_verl.report.runs import Run, load_run
from sayo_verl.report.table import first_last_markdown


def figure_of(monkeypatch, draw) -> Figure:
    """The figure that ``draw`` saves."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: found.append(figure))
    draw()
    (figure,) = found
    return figure


def texts_of(monkeypatch, draw) -> list[str]:
    """Every text of the figure that ``draw`` saves."""
    artists = figure_of(monkeypatch, draw).findobj(match=lambda artist: hasattr(artist, "get_text"))
    return [text.get_text() for text in artists]


def titles_of(figure: Figure) -> list[str]:
    return [title for axis in figure.axes if (title := axis.get_title(loc="left"))]


def test_plot_run_writes_the_same_png_each_time(tmp_path):
    run = make_run(tmp_path / "run", ATTENTION)
    first, second = (plot_run(run, tmp_path / "out" / f"{i}.png") for i in range(2))
    with Image.open(first) as image:
        assert image.width == 2000
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 50
    assert first.read_bytes() == second.read_bytes()


def test_figure_says_what_it_shows(tmp_path, monkeypatch):
    run = make_run(tmp_path, ATTENTION)
    found = texts_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    for text in (
        "demo  ·  attn_region: SAYO, arXiv 2602.08241  ·  12 steps",
        "0.5: no preference",
        "all tokens",
        "validation",
        "nats per token",
    ):
        assert text in found
    assert r.NOT_MEASURED not in found


def test_figure_of_grpo_has_the_common_panels_and_says_not_measured(tmp_path, monkeypatch):
    run = make_run(tmp_path, GRPO, estimator="grpo")
    figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    assert titles_of(figure) == ["Task reward", "Total reward", "Accuracy", "Entropy", "Response length"]
    assert "training: not measured" in [text.get_text() for text in figure.axes[2].texts]  # there are validation points
    bare = load_run(write_run(tmp_path / "bare", line(1, **{c.REWARD.name: 1.0})))
    assert texts_of(monkeypatch, lambda: plot_run(bare, tmp_path / "x.png")).count(r.NOT_MEASURED) == 4


@pytest.mark.parametrize(
    ("estimator", "own"),
    {
        "attn_region": {"Region reward $r_v$", "Target attention $R_a$", "$R_a$ of single tokens"},
        "attn_dual": {
            "Visual score $S$",
            "Late to early score",
            "Gate rate",
            "Token factor spread",
            "Trajectory factor",
        },
        "attn_anchor": {"Anchor share", "Anchor weights", "Clusters", "Connectivity $d$"},
        "attn_faithful": {"Faithful reward", "Causal effect $k$", "Causal attention"},
        "attn_sensitivity": {"Sensitivity $k$", "Sensitivity factor"},
        "attn_evidence": {"Evidence margin $m$", "Drop of support"},
        "attn_mine": {"mine/mean", "mine_share", "a_third"},
    }.items(),
)
def test_a_method_has_its_own_panels_and_rows_and_no_others(tmp_path, monkeypatch, estimator, own):
    run = make_run(tmp_path, OF_METHOD[estimator], estimator=estimator)
    figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    assert set(titles_of(figure)) == own | {panel.title for panel in c.COMMON.panels}
    rows = cells(first_last_markdown(run)).keys()
    others = [section for section in c.OF_METHODS if section.estimator != estimator]
    assert not rows & {metric.label for section in others for metric in section.metrics}
    mine = [section for section in c.OF_METHODS if section.estimator == estimator]
    labels = [metric.label for section in mine for metric in section.metrics] or ["mine/mean", "mine_share", "a_third"]
    assert set(labels) < rows


def test_a_mix_has_the_panels_of_its_parts(tmp_path, monkeypatch):
    run = make_run(tmp_path, OF_METHOD["attn_mix"] | OWN, estimator="attn_mix")
    figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    assert {"Region reward $r_v$", "Gate rate", "mine_share"} < set(titles_of(figure))
    assert c.estimator_of(run) == "attn_mix: SAYO + VGPO + others"


def test_figure_counts_nan_of_each_run(tmp_path, monkeypatch):
    good, bad = make_run(tmp_path / "a", ATTENTION), make_run(tmp_path / "b", {**ATTENTION, R_V: math.nan})
    found = texts_of(monkeypatch, lambda: plot_runs({"good": good, "bad": bad}, tmp_path / "x.png"))
    label = "(attn_region: SAYO, arXiv 2602.08241, 12 steps)"
    assert {"2 runs", f"good  {label}", f"bad  {label}"} <= set(found)
    assert any("bad, training: NaN (12 of 12)" in text for text in found)
    assert not any("good" in text and "NaN" in text for text in found)


def runs_of_all_methods(folder: Path) -> dict[str, Run]:
    methods = ("grpo", "attn_region", "attn_dual", "attn_anchor", "attn_faithful", "attn_sensitivity", "attn_evidence")
    return {name: make_run(folder / name, OF_METHOD[name], estimator=name) for name in methods}


def test_a_comparison_has_every_methods_panels_and_says_how_many_runs_measured_them(tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, lambda: plot_runs(runs_of_all_methods(tmp_path), tmp_path / "x.png"))
    shown = {axis.get_title(loc="left"): axis for axis in figure.axes}
    colours = []
    for section in c.OF_METHODS:
        axes = [shown[panel.title] for panel in section.panels]
        assert {axis.get_title(loc="right") for axis in axes} == {"1 of 7 runs"}
        guides = {axis.lines[-1].get_color() for axis, panel in zip(axes, section.panels, strict=True) if panel.guide}
        colours.append({line.get_color() for axis in axes for line in axis.lines} - guides)
    assert [len(of_one_run) for of_one_run in colours] == [1] * len(c.OF_METHODS)
    assert len(set.union(*colours)) == len(c.OF_METHODS)
    assert "not measured: grpo" in [text.get_text() for text in shown["Accuracy"].texts]
    assert shown["Total reward"].get_title(loc="right") == ""


def drawn_texts(figure: Figure) -> list[Text]:
    """Every text that the figure shows; an axis keeps labels of ticks beyond its ends, which are not drawn."""
    every = set(figure.findobj(match=Text))
    for axis in figure.axes:
        for scale in (axis.xaxis, axis.yaxis):
            low, high = scale.get_view_interval()
            labels = zip(scale.get_ticklocs(), scale.get_ticklabels(), strict=True)
            every -= {label for place, label in labels if not low <= place <= high}
    return [text for text in every if text.get_text() and text.get_visible() and (not text.axes or text.axes.axison)]


@pytest.mark.parametrize("estimator", [*OF_METHOD, "all"])
def test_no_text_leaves_the_figure_or_covers_another(tmp_path, monkeypatch, estimator):
    if estimator == "all":
        figure = figure_of(monkeypatch, lambda: plot_runs(runs_of_all_methods(tmp_path), tmp_path / "x.png"))
    else:
        run = make_run(tmp_path, OF_METHOD[estimator], estimator=estimator)
        figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    assert figure.bbox.width == 2000
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_texts(figure)]
    assert len(boxes) > 40
    outside = [text for text, box in boxes if box.min.min() < 0 or (box.max > figure.bbox.max).any()]
    covered = [(text, other) for (text, box), (other, there) in combinations(boxes, 2) if box.overlaps(there)]
    assert (outside, covered) == ([], [])


def test_a_range_is_shaded_between_its_ends_and_nan_is_marked(tmp_path, monkeypatch):
    low, high = (metric.name for metric in OF["attn_anchor"].panels[1].band)
    lines = [line(n, **{low: None if n == 3 else 0.5, high: 1.5}) for n in range(1, 6)]
    run = load_run(write_run(tmp_path, *lines))
    figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == "Anchor weights"]
    (band,) = axis.collections
    heights = {round(float(y), 6) for path in band.get_paths() for _, y in path.vertices}
    assert heights == {0.5, 1.5}
    texts = [text.get_text() for text in axis.texts]
    assert "1: as in GRPO" in texts
    assert "anchor weight, smallest: NaN (1 of 5)" in texts


def test_a_constant_is_drawn_as_one(tmp_path, monkeypatch):
    rounding = {n: 1 + 1e-7 * (n % 3) for n in range(1, 20)}
    run = load_run(write_run(tmp_path, *(line(n, **{"sayo/token_weight/mean": y}) for n, y in rounding.items())))
    figure = figure_of(monkeypatch, lambda: plot_run(run, tmp_path / "x.png"))
    (axis,) = [axis for axis in figure.axes if axis.get_title(loc="left") == "Mean weight"]
    low, high = axis.get_ylim()
    assert high - low > 0.01


def test_figure_of_an_unknown_run_of_one_step(tmp_path):
    run = load_run(write_run(tmp_path, line(1, **ATTENTION)))
    assert plot_run(run, tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize("count", [0, 8])
def test_a_figure_takes_one_to_seven_runs(tmp_path, count):
    run = make_run(tmp_path, GRPO)
    with pytest.raises(SayoError, match="SAYO-R05"):
        plot_runs({str(i): run for i in range(count)}, tmp_path / "x.png")


def test_running_mean_looks_back_and_skips_nan():
    assert running_mean([1, 3, 5], window=2) == [1, 2, 4]
    means = running_mean([math.nan, 2, math.nan, 4], window=2)
    assert math.isnan(means[0])
    assert means[1:] == [2, 2, 4]
