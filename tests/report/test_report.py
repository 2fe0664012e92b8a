"""The report room: reading run folders, figures, tables, and watching a process that writes such a folder."""

import importlib.util
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from support.invented_signals import invent

from sayo_verl.errors import SayoError
from sayo_verl.hooks import trainer as mixin
from sayo_verl.hooks.estimator import CURRENT, AdvantageContext, make_estimator
from sayo_verl.methods import METHODS
from sayo_verl.metrics import Metric, Panel, declaration
from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.curves import plot_run, plot_runs, running_mean
from sayo_verl.report.log import PHASES, Follower
from sayo_verl.report.runs import Run, load_run
from sayo_verl.report.table import first_last_markdown, first_last_table
from sayo_verl.report.watch import Pace, duration, run_and_watch, watch

OF = {section.estimator: section for section in c.OF_METHODS}
COMMON = {c.REWARD.name: 1.0, "actor/entropy": 0.4, "response_length/mean": 12.0}  # what every run has
PARTS = {c.ACCURACY.name: 0.5, "sayo/format/mean": 0.9, "sayo/probe_share_of_log_prob": 0.05}
ATTENTION = COMMON | PARTS | dict.fromkeys(OF["attn_region"].names, 0.6)
GRPO = COMMON
R_V = "sayo/region_reward/mean"
OWN = {"sayo/mine/mean": 0.3, "sayo/mine_share": 0.2, "sayo/a_third": 0.1}  # of a method that no list knows
OF_METHOD = {
    section.estimator: COMMON | PARTS | {metric.name: 0.6 for metric in section.metrics} for section in c.OF_METHODS
}
OF_METHOD["grpo"] = GRPO
OF_METHOD["attn_mix"] = OF_METHOD["attn_region"] | OF_METHOD["attn_dual"]
OF_METHOD["attn_mine"] = COMMON | PARTS | OWN
VALIDATION = "val-core/sayo/scenes/acc/mean@1"


def line(step: int, **data: object) -> str:
    return json.dumps({"step": step, "data": data}) + "\n"


def write_run(folder: Path, *lines: str, launch: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / r.METRICS_FILE).write_text("".join(lines))
    if launch is not None:
        (folder / r.RUN_FILE).write_text(json.dumps(launch))
    return folder


def make_run(folder: Path, data: dict[str, float], steps: int = 12, estimator: str = "attn_region") -> Run:
    launch = {"run_id": "demo", "estimator": estimator, "total_steps": steps}
    lines = [line(0, **{VALIDATION: 0.4})]
    lines += [line(n, **{name: value + 0.01 * n for name, value in data.items()}) for n in range(1, steps + 1)]
    return load_run(write_run(folder, *lines, launch=launch))


# ---------------------------------------------------------------------------------------------------------- run folders


def test_load_run_reads_metrics_and_launch_record(tmp_path):
    launch = {"run_id": "a", "estimator": "grpo", "total_steps": 9, "started": "now", "versions": {"verl": "0.9.1"}}
    run = load_run(write_run(tmp_path, line(1, x=1, y=0.5), line(2, x=2.5), launch={**launch, "overrides": ["a=b"]}))
    assert run.steps == [1, 2]
    assert run.series == {"x": [(1, 1.0), (2, 2.5)], "y": [(1, 0.5)]}
    assert (run.run_id, run.estimator, run.total_steps, run.started) == ("a", "grpo", 9, "now")
    assert (run.versions, run.overrides, run.notes) == ({"verl": "0.9.1"}, ["a=b"], [])


def test_without_launch_record_everything_about_it_is_unknown(tmp_path):
    run = load_run(write_run(tmp_path, line(1, x=1)))
    assert (run.run_id, run.estimator, run.started, run.total_steps) == ("unknown", "unknown", "unknown", None)
    assert "run.json" in run.notes[0]


def test_a_file_cut_at_any_byte_gives_the_whole_lines_before_the_cut(tmp_path):
    whole = "".join(line(n, x=float(n)) for n in (1, 2, 3)).encode()
    for cut in range(len(whole) + 1):
        (tmp_path / r.METRICS_FILE).write_bytes(whole[:cut])
        # A record that lacks nothing but its newline is whole.
        complete = sum(cut >= end for end in (len(whole) // 3 * k - 1 for k in (1, 2, 3)))
        if not complete:
            with pytest.raises(SayoError, match="SAYO-R03"):
                load_run(tmp_path)
            continue
        run = load_run(tmp_path)
        assert run.steps == [1, 2, 3][:complete]
        in_a_line = whole[:cut].count(b"\n") < complete or whole[:cut].endswith(b"\n")
        assert any("truncated" in note for note in run.notes) is not in_a_line


@pytest.mark.parametrize(
    "bad", ['{"step": 2, "da', "[2]", '{"step": "2", "data": {}}', '{"step": true, "data": {}}', '{"step": 2}', "\xff"]
)
def test_a_broken_line_before_the_end_is_refused_with_its_place(tmp_path, bad):
    (tmp_path / r.METRICS_FILE).write_bytes((line(1, x=1) + bad + "\n" + line(3, x=3)).encode("latin-1"))
    with pytest.raises(SayoError, match=r"SAYO-R01: .*metrics\.jsonl:2 "):
        load_run(tmp_path)


def test_no_file_no_data_and_a_damaged_record_have_their_own_codes(tmp_path):
    with pytest.raises(SayoError, match="SAYO-R02"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(SayoError, match="SAYO-R03: no data"):
        load_run(write_run(tmp_path / "empty", "\n"))
    for i, damaged in enumerate(('{"run_id"', "[]", '{"total_steps": "many"}')):
        folder = write_run(tmp_path / str(i), line(1, x=1))
        (folder / r.RUN_FILE).write_text(damaged)
        with pytest.raises(SayoError, match="SAYO-R04"):
            load_run(folder)


def test_after_a_resume_the_later_lines_win_and_abandoned_steps_go(tmp_path):
    lines = [line(n, x=float(n)) for n in (1, 2, 3, 4)] + [line(2, **{VALIDATION: 0.5}), line(3, x=30.0)]
    run = load_run(write_run(tmp_path, *lines))
    assert run.series["x"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert run.validation_accuracy() == {"sayo/scenes": [(2, 0.5)]}
    assert any("from step 4 to step 2" in note for note in run.notes)


def attempt(folder: Path, name: str, steps: range, value: float, started: str | None = None, **launch: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"metrics{name}.jsonl").write_text("".join(line(step, x=value) for step in steps))
    if started:
        (folder / f"run{name}.json").write_text(json.dumps({"started": started, "estimator": "grpo", **launch}))


def test_all_metrics_files_of_a_folder_are_one_run(tmp_path):
    attempt(tmp_path, "", range(1, 6), 1.0)
    attempt(tmp_path, "-resumed", range(5, 9), 2.0)
    run = load_run(tmp_path)
    assert run.series["x"] == [(n, 1.0) for n in range(1, 5)] + [(n, 2.0) for n in range(5, 9)]
    assert [file.name for file in run.files] == ["metrics.jsonl", "metrics-resumed.jsonl"]
    assert run.notes[0] == "one run in several attempts, in this order: metrics.jsonl, metrics-resumed.jsonl"
    assert any("step 5 is logged twice" in note for note in run.notes)


def test_attempts_are_ordered_by_their_start(tmp_path):
    """The third went further back than the second: by first steps alone the second would win."""
    attempt(tmp_path, "", range(1, 9), 1.0, "2026-11-26T10:00:00+0000", total_steps=8)
    attempt(tmp_path, "-2", range(7, 13), 2.0, "2026-11-26T13:00:00+0200", total_steps=12)
    attempt(tmp_path, "-3", range(4, 6), 3.0, "2026-11-26T11:30:00+0000", total_steps=14)
    run = load_run(tmp_path)
    assert run.series["x"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, 3.0)]
    assert (run.started, run.total_steps) == ("2026-11-26T10:00:00+0000", 14)
    assert any("from step 12 to step 4" in note for note in run.notes)


def test_attempts_without_a_start_are_ordered_by_first_step_then_by_number(tmp_path):
    for n in (10, 2):
        attempt(tmp_path, f"-{n}", range(3, 5), float(n))
    attempt(tmp_path, "", range(1, 5), 1.0, "2026-11-26T10:00:00+0000")
    run = load_run(tmp_path)
    assert [file.name for file in run.files] == ["metrics.jsonl", "metrics-2.jsonl", "metrics-10.jsonl"]
    assert run.series["x"] == [(1, 1.0), (2, 1.0), (3, 10.0), (4, 10.0)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("started", [None, "2026-11-26T10:00:00+0000"])
def test_a_second_file_that_starts_from_scratch_is_refused(tmp_path, first, started):
    """A copy of another run's metrics beside those of the run: neither resumed the other."""
    attempt(tmp_path, "", range(1, 4), 1.0, started)
    attempt(tmp_path, "-old", range(first, 3), 2.0, started and "2026-11-26T11:00:00+0000")
    with pytest.raises(SayoError, match="SAYO-R06") as caught:
        load_run(tmp_path)
    error = caught.value
    assert error.where == str(tmp_path)
    assert "metrics.jsonl (from step 1 to 3)" in str(error.got)
    assert f"metrics-old.jsonl (from step {first} to 2)" in str(error.got)
    assert "run.json" in error.fix
    assert "run-old.json" in error.fix
    (tmp_path / "metrics-old.jsonl").unlink()
    assert load_run(tmp_path).series["x"] == [(1, 1.0), (2, 1.0), (3, 1.0)]


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("names", [("", "-2"), ("-a", "")])  # by name, the resumed attempt of ("-a", "") comes first
def test_a_resumed_attempt_may_begin_with_the_validation_of_the_step_it_starts_from(tmp_path, start, names):
    one, two = (tmp_path / f"metrics{name}.jsonl" for name in names)
    one.write_text("".join(line(n, x=1.0) for n in (1, 2, 3)))
    two.write_text(line(start, **{VALIDATION: 0.5}) + line(start + 1, x=2.0))
    run = load_run(tmp_path)
    assert run.files == [one, two]
    assert run.series["x"] == [(n, 1.0) for n in range(1, start + 1)] + [(start + 1, 2.0)]
    assert run.validation_accuracy() == {"sayo/scenes": [(start, 0.5)]}


def test_an_attempt_without_a_step_is_left_out(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0, "2026-11-26T10:00:00+0000")
    attempt(tmp_path, "-2", range(0), 2.0, "2026-11-26T11:00:00+0000", estimator="rloo")
    run = load_run(tmp_path)
    assert ([file.name for file in run.files], run.estimator, run.notes) == (["metrics.jsonl"], "grpo", [])


def test_a_change_between_attempts_is_noted(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0, "2026-11-26T10:00:00+0000")
    attempt(tmp_path, "-2", range(3, 5), 2.0, "2026-11-26T11:00:00+0000", estimator="rloo")
    run = load_run(tmp_path)
    assert run.estimator == "rloo"
    assert "estimator changed between the attempts; the last is shown" in run.notes


def test_each_metrics_file_has_a_run_card_of_its_own():
    names = ("metrics.jsonl", "metrics-2.jsonl", "metrics_b.jsonl", "other.jsonl")
    cards = [r.run_card(Path("out") / name).name for name in names]
    assert cards == ["run.json", "run-2.json", "run_b.json", "run-other.json"]


def test_a_step_logged_twice_is_noted(tmp_path):
    run = load_run(write_run(tmp_path, line(1, x=1), line(1, x=2), line(2, x=3)))
    assert run.series["x"] == [(1, 2.0), (2, 3.0)]
    assert any("step 1 is logged twice" in note for note in run.notes)


def test_nan_is_kept_and_counted_and_text_is_left_out(tmp_path):
    run = load_run(
        write_run(tmp_path, line(1, x=None, s="text"), line(2, x=math.nan), line(3, x=math.inf), line(4, x=1))
    )
    assert [math.isnan(value) for _, value in run.series["x"]] == [True, True, True, False]
    assert "x: NaN (3 of 4)" in run.notes
    assert "s" not in run.series
    assert any(note.startswith("s: left out") for note in run.notes)


def test_validation_accuracy_prefers_core_and_takes_the_plain_mean(tmp_path):
    core = {"val-core/a/b/acc/mean@4": 0.5, "val-core/a/b/acc/best@4/mean": 0.9, "val-aux/c/acc/mean@4": 0.1}
    assert load_run(write_run(tmp_path / "1", line(5, **core))).validation_accuracy() == {"a/b": [(5, 0.5)]}
    aux = {"val-aux/c/acc/mean@4": 0.1, "val-aux/c/acc_success_only/mean@4": 0.2}
    assert load_run(write_run(tmp_path / "2", line(5, **aux))).validation_accuracy() == {"c": [(5, 0.1)]}


def test_follower_gives_whole_lines_once_and_starts_again_with_a_new_file(tmp_path):
    file = tmp_path / "f"
    follower = Follower(file)
    assert follower.new_lines() == []
    file.write_bytes(b"one\ntw")
    assert follower.new_lines() == [b"one"]
    file.write_bytes(b"one\ntwo\n")
    assert follower.new_lines() == [b"two"]
    assert follower.new_lines() == []
    file.write_bytes(b"new\n")
    assert follower.new_lines() == [b"new"]


# --------------------------------------------------------------------------------------------------- figures and tables


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
    assert titles_of(figure) == ["Total reward", "Accuracy", "Entropy", "Response length"]
    assert "training: not measured" in [text.get_text() for text in figure.axes[1].texts]  # there are validation points
    bare = load_run(write_run(tmp_path / "bare", line(1, **{c.REWARD.name: 1.0})))
    assert texts_of(monkeypatch, lambda: plot_run(bare, tmp_path / "x.png")).count(r.NOT_MEASURED) == 3


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


def test_figure_tells_nan_apart_by_run(tmp_path, monkeypatch):
    good, bad = make_run(tmp_path / "a", ATTENTION), make_run(tmp_path / "b", {**ATTENTION, R_V: math.nan})
    found = texts_of(monkeypatch, lambda: plot_runs({"good": good, "bad": bad}, tmp_path / "x.png"))
    label = "(attn_region: SAYO, arXiv 2602.08241, 12 steps)"
    assert {"2 runs", f"good  {label}", f"bad  {label}"} <= set(found)
    assert any("bad, training: NaN (12 of 12)" in text for text in found)
    assert not any("good" in text and "NaN" in text for text in found)


def five_runs(folder: Path) -> dict[str, Run]:
    methods = ("grpo", "attn_region", "attn_dual", "attn_anchor", "attn_faithful")
    return {name: make_run(folder / name, OF_METHOD[name], estimator=name) for name in methods}


def test_a_comparison_has_every_methods_panels_and_says_how_many_runs_measured_them(tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, lambda: plot_runs(five_runs(tmp_path), tmp_path / "x.png"))
    shown = {axis.get_title(loc="left"): axis for axis in figure.axes}
    colours = []
    for section in c.OF_METHODS:
        axes = [shown[panel.title] for panel in section.panels]
        assert {axis.get_title(loc="right") for axis in axes} == {"1 of 5 runs"}
        guides = {axis.lines[-1].get_color() for axis, panel in zip(axes, section.panels, strict=True) if panel.guide}
        colours.append({line.get_color() for axis in axes for line in axis.lines} - guides)
    assert [len(of_one_run) for of_one_run in colours] == [1, 1, 1, 1]
    assert len(set.union(*colours)) == 4
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


@pytest.mark.parametrize("estimator", [*OF_METHOD, "five"])
def test_no_text_leaves_the_figure_or_covers_another(tmp_path, monkeypatch, estimator):
    if estimator == "five":
        figure = figure_of(monkeypatch, lambda: plot_runs(five_runs(tmp_path), tmp_path / "x.png"))
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


def test_a_range_is_shaded_between_its_ends_and_tells_of_nan(tmp_path, monkeypatch):
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


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_has_means_of_both_ends_and_their_change(tmp_path):
    run = make_run(tmp_path / "region", ATTENTION)
    table = cells(first_last_markdown(run, k=3))
    assert table["metric"] == ["first 3 steps", "last 3 steps", "change"]
    assert table["reward"] == ["1.020", "1.110", "+0.090"]
    assert table["response length (tokens)"] == ["12.0", "12.1", "+0.1"]
    assert table["region reward r_v"] == ["0.620", "0.710", "+0.090"]
    grpo = cells(first_last_markdown(make_run(tmp_path / "grpo", GRPO)))
    assert grpo["accuracy"] == grpo["format"] == [r.NOT_MEASURED] * 3
    assert not [label for label in grpo if "region" in label or "R_a" in label]
    console = Console(file=io.StringIO(), width=120)
    console.print(first_last_table(run, k=3))
    assert "+0.090" in console.file.getvalue()


def test_windows_of_a_short_run_do_not_overlap(tmp_path):
    table = cells(first_last_markdown(make_run(tmp_path / "a", GRPO, steps=5)))
    assert table["metric"][:2] == ["first 2 steps", "last 2 steps"]
    assert table["reward"] == ["1.015", "1.045", "+0.030"]
    only = cells(first_last_markdown(make_run(tmp_path / "b", GRPO, steps=1)))["reward"]
    assert only[0] == only[1] == "1.010"
    assert only[2] not in ("+0.000", "")


def test_nan_in_a_window_spoils_it_and_nan_elsewhere_is_told(tmp_path):
    gaps = {c.REWARD.name: 2, "actor/entropy": 6}
    lines = [line(n, **{name: None if n == gap else 1.0 for name, gap in gaps.items()}) for n in range(1, 11)]
    table = cells(first_last_markdown(load_run(write_run(tmp_path, *lines)), k=3))
    assert table["reward"] == ["NaN (1 of 10)", "1.000", "NaN"]
    assert table["entropy (nats per token), NaN (1 of 10)"] == ["1.000", "1.000", "+0.000"]


def test_a_metric_of_some_steps_says_so(tmp_path):
    lines = [line(n, **{c.REWARD.name: 1.0}, **({"actor/entropy": n} if n % 2 else {})) for n in range(1, 11)]
    table = cells(first_last_markdown(load_run(write_run(tmp_path, *lines)), k=2))
    assert table["entropy (nats per token) (5 of 10 steps)"] == ["2.000", "8.000", "+6.000"]


def test_neutral_rows_are_shown_where_there_were_any(tmp_path):
    data = [{"sayo/neutral_rows/padding": 0.0, "sayo/neutral_rows/no_image": float(n == 2)} for n in range(4)]
    table = cells(first_last_markdown(load_run(write_run(tmp_path, *(line(n + 1, **d) for n, d in enumerate(data))))))
    assert table["neutral rows: no image"] == ["0.0", "0.5", "+0.5"]
    assert "neutral rows: padding" not in table


def test_a_change_that_rounds_to_nothing_has_no_sign_of_a_fall(tmp_path):
    lines = [line(n, **{c.REWARD.name: 1 - 1e-6 * n}) for n in (1, 2)]
    assert cells(first_last_markdown(load_run(write_run(tmp_path, *lines))))["reward"][2] == "+0.000"


# ------------------------------------------------------------------------------------------------------- the catalogue


def logged_names() -> set[str]:
    """Every name below ``sayo/`` that the methods and the trainer log."""
    anchor = METHODS["attn_anchor"]
    made = [cls() for cls in METHODS.values() if cls.__module__.startswith("sayo_verl.")]
    made += [METHODS["attn_region"](per_token=True), anchor(parts=2), anchor(weighting="top")]
    found = set()
    for method in made:
        signals = invent(method.needs(), 3, 12, 9)
        context = AdvantageContext(method, signals, norm_by_std=True, spread_floor=None)
        token = CURRENT.set(context)
        try:
            make_estimator(method.name)(torch.zeros(12, 9), signals.response_mask, index=signals.uid)
        finally:
            CURRENT.reset(token)
        found |= {f"sayo/{name}" for name in context.metrics}
    source = Path(mixin.__file__).read_text()
    found |= set(re.findall(r'metrics\["(sayo/[a-z_]+)"\]', source))
    assert 'f"sayo/{name}/mean": value for name, value in store.fetch_reward_parts(batch)' in source
    return found | {"sayo/accuracy/mean", "sayo/format/mean"}


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


# ------------------------------------------------------------------------------------------------------------- watching

QUICK = Pace(poll=0.02)
START = """
import json, os, signal, subprocess, sys, time
def say(text): print(text, flush=True)
def log(step, **data):
    with open("metrics.jsonl", "ab") as file: file.write(json.dumps({"step": step, "data": data}).encode() + b"\\n")
"""


def follow(folder: Path, script: str, total_steps: int | None = 2, pace: Pace = QUICK, console: Console | None = None):
    """Run ``script`` in ``folder`` as the training process; returns (exit code, what was shown)."""
    folder.mkdir(exist_ok=True)
    console = console or Console(file=io.StringIO(), width=200)
    code = f"import os; os.chdir({str(folder)!r})\n{START}{textwrap.dedent(script)}"
    result = run_and_watch([sys.executable, "-c", code], folder, total_steps, pace=pace, console=console)
    return result, console.file.getvalue() if isinstance(console.file, io.StringIO) else ""


def test_watch_shows_phases_and_steps(tmp_path):
    script = """
    say("ray init kwargs: {}")
    say("\\x1b[36m(TaskRunnerV1 pid=1)\\x1b[0m INFO:2026:create worker group dict_keys(['actor'])")
    say("(TaskRunnerV1 pid=1) Using dataset class: late line of an earlier phase")
    time.sleep(0.1)
    log(0, **{"val-core/sayo/scenes/acc/mean@1": 0.25})
    log(1, **{"critic/rewards/mean": 1.5, "sayo/region_reward/mean": -0.125, "sayo/target_attention/mean": 0.4375,
              "sayo/accuracy/mean": 0.75})
    time.sleep(0.1)
    log(2, **{"critic/rewards/mean": None})
    """
    code, shown = follow(tmp_path, script)
    assert code == 0
    order = [
        "starting Ray",
        "loading the model",
        "validated at step 0  validation accuracy 0.250",
        "step 1/2",
        "step 2/2",
    ]
    places = [shown.index(text) for text in [*order, "done: step 2/2"]]
    assert places == sorted(places)
    assert "reading the data" not in shown
    assert "reward 1.500  accuracy 0.750  r_v -0.125  R_a 0.438" in shown
    assert "reward nan  accuracy not measured  r_v not measured" in shown
    assert "create worker group" in (tmp_path / r.LOG_FILE).read_text()


def test_each_phase_is_known_by_a_line_that_verl_and_ray_can_print():
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("verl", "ray")]
    files = [
        "trainer/main_ppo.py",
        "trainer/ppo/v1/trainer_base.py",
        "utils/dataset/rl_dataset.py",
        "utils/tracking.py",
    ]
    files += ["single_controller/ray/base.py", "workers/rollout/vllm_rollout/vllm_async_server.py"]
    source = "".join((roots[0] / file).read_text() for file in files)
    source += (roots[1] / "_private/worker.py").read_text()
    for pattern, phase in PHASES:
        for text in pattern.pattern.split("|"):
            literal = re.sub(r"\\?\['serve',", '["serve",', text).replace("\\", "").lstrip("^")
            literal = literal[literal.index("Initial") :] if "Initial" in literal else literal
            assert literal.rstrip() in source, phase


def test_watch_says_why_a_run_failed(tmp_path):
    script = "say('(A pid=3) sayo_verl.errors.SayoError: SAYO-P03: no layer 36 | fix: y'); say('noise'); sys.exit(3)"
    code, shown = follow(tmp_path / "named", script)
    assert code == 3
    assert "\nSAYO-P03: no layer 36 | fix: y\n" in shown
    assert "noise" not in shown
    assert str(tmp_path / "named" / r.LOG_FILE) in shown
    code, shown = follow(tmp_path / "unnamed", "raise ValueError('what happened')")
    assert code == 1
    assert "\nValueError: what happened\n" in shown


def test_watch_follows_the_metrics_file_of_a_resumed_run(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0)
    script = "; ".join(
        [
            "import json, os",
            "file = open(os.environ['VERL_FILE_LOGGER_PATH'], 'wb', buffering=0)",
            "row = {'critic/rewards/mean': 1.0}",
            "[file.write(json.dumps({'step': n, 'data': row}).encode() + b'\\n') for n in (3, 4)]",
        ]
    )
    shown = io.StringIO()
    environment = {**os.environ, "VERL_FILE_LOGGER_PATH": str(tmp_path / "metrics-2.jsonl")}
    console = Console(file=shown, width=200)
    assert run_and_watch([sys.executable, "-c", script], tmp_path, 4, environment, pace=QUICK, console=console) == 0
    assert "step 3/4" in shown.getvalue()
    assert "done: step 4/4" in shown.getvalue()
    assert "step 1/4" not in shown.getvalue()


def test_watch_takes_steps_and_metrics_file_from_the_card_of_the_run(tmp_path):
    attempt(tmp_path, "", range(1, 3), 1.0, total_steps=2)
    script = f"""
    time.sleep(0.5)
    card = {{"total_steps": 4, "metrics": "{tmp_path}/metrics-2.jsonl"}}
    open("run-2.json", "w").write(json.dumps(card))
    with open("metrics-2.jsonl", "w") as file:
        file.writelines(json.dumps({{"step": n, "data": {{"critic/rewards/mean": 1.0}}}}) + "\\n" for n in (3, 4))
    """
    code, shown = follow(tmp_path, script, total_steps=None)
    assert code == 0
    assert "step 3/4" in shown
    assert "done: step 4/4" in shown
    code, shown = follow(tmp_path / "other", "log(1)", total_steps=None)
    assert "done: step 1/?" in shown


def test_watch_warns_of_an_early_end_and_of_a_broken_line(tmp_path):
    code, shown = follow(
        tmp_path, "open('metrics.jsonl', 'w').write('{broken\\n'); log(1, **{'critic/rewards/mean': 1})"
    )
    assert code == 0
    assert "warning: SAYO-R01" in shown
    assert "warning: the run ended early at step 1/2" in shown


def test_watch_beats_in_silence_and_warns_once_per_stall(tmp_path):
    _, shown = follow(tmp_path, "say('ray init kwargs: {}'); time.sleep(1.3)", pace=Pace(0.02, 0.15, 0.5))
    # Far fewer than the 65 looks; the margins are for a busy machine.
    assert 2 <= shown.count("still in: starting Ray") <= 12
    assert 2 <= shown.count("warning: no log line and no step") <= 4


def test_watch_shows_nothing_of_an_earlier_attempt(tmp_path):
    write_run(tmp_path, *(line(n, **{c.REWARD.name: 9.0}) for n in (1, 2, 3)))
    (tmp_path / r.LOG_FILE).write_text("SAYO-D01: old\n")
    # verl's file logger empties its file at the start.
    _, shown = follow(
        tmp_path, "open('metrics.jsonl', 'w'); time.sleep(0.2); log(3, **{'critic/rewards/mean': 1.0}); sys.exit(1)"
    )
    assert "9.000" not in shown
    assert "SAYO-D01" not in shown
    assert "step 3/2  reward 1.000" in shown
    assert (tmp_path / r.LOG_FILE).read_text().startswith("SAYO-D01")


SLEEPER = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
{setup}
open("ready", "w").write(str(child.pid))
time.sleep(30)
"""


def signal_when_ready(folder: Path, *signums: int) -> threading.Thread:
    def send() -> None:
        while not (folder / "ready").exists() or not (folder / "ready").read_text():
            time.sleep(0.01)
        for signum in signums:
            os.kill(os.getpid(), signum)
            time.sleep(0.2)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def gone(pid: int) -> bool:
    """Whether the process ended (a zombie that nobody reaped counts)."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.fixture
def interruptible():
    """Ctrl-C as on a terminal, also where the tests run in the background and inherit it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_whole_process_group(tmp_path, signum):
    handler = signal.getsignal(signum)
    thread = signal_when_ready(tmp_path, signum)
    # The default action: Python would turn SIGINT into a KeyboardInterrupt.
    code, shown = follow(tmp_path, SLEEPER.format(setup="signal.signal(signal.SIGINT, signal.SIG_DFL)"))
    thread.join()
    assert code == 128 + signum
    assert f"{signum.name}: passed to the run" in shown
    assert "stopped: before step 1 (starting)" in shown
    child = int((tmp_path / "ready").read_text())
    deadline = time.monotonic() + 5
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(child)
    assert signal.getsignal(signum) is handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_kills_a_run_that_ignores_the_first(tmp_path):
    thread = signal_when_ready(tmp_path, signal.SIGINT, signal.SIGINT)
    code, shown = follow(tmp_path, SLEEPER.format(setup="signal.signal(signal.SIGINT, signal.SIG_IGN)"))
    thread.join()
    assert code == 128 + signal.SIGKILL
    assert "SIGINT: killed the run" in shown


def test_a_run_is_ended_when_watching_it_fails(tmp_path):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no terminal any more")

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
    with pytest.raises(OSError, match="no terminal"):
        watch(tmp_path, process, 2, pace=Pace(0.02, 0.05), console=Console(file=Broken()))
    assert process.returncode == -signal.SIGTERM


def test_on_a_terminal_a_live_area_shows_phase_and_steps(tmp_path):
    ours, theirs = pty.openpty()
    script = (
        "say('ray init kwargs: {}'); time.sleep(0.4); log(1, **{'critic/rewards/mean': 1.25}); time.sleep(0.4); log(2)"
    )
    shown = bytearray()

    def read() -> None:
        while b"done" not in shown:
            shown.extend(os.read(ours, 4096))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with open(theirs, "w") as terminal:
        console = Console(file=terminal, width=100, force_terminal=True, force_interactive=True)
        code, _ = follow(tmp_path, script, console=console)
        terminal.flush()
        reader.join(timeout=5)
    os.close(ours)
    text = shown.decode()
    assert code == 0
    assert "starting Ray  0 s" in text
    assert "step 1/2" in text
    assert "reward 1.250  accuracy not measured" in text
    assert "done: step 2/2" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
