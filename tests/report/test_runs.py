"""Reading of run folders."""

import json
import math
from pathlib import Path

import pytest
from support.report_runs import VALIDATION, attempt, line, write_run

from sayo_verl.errors import SayoError
from sayo_verl.report import runs as r
from sayo_verl.report.card import RUN_FILE, run_card
from sayo_verl.report.log import Follower
from sayo_verl.report.runs import load_run


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
        (folder / RUN_FILE).write_text(damaged)
        with pytest.raises(SayoError, match="SAYO-R04"):
            load_run(folder)


def test_after_a_resume_the_later_lines_win_and_abandoned_steps_go(tmp_path):
    lines = [line(n, x=float(n)) for n in (1, 2, 3, 4)] + [line(2, **{VALIDATION: 0.5}), line(3, x=30.0)]
    run = load_run(write_run(tmp_path, *lines))
    assert run.series["x"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert run.validation_accuracy() == {"sayo/scenes": [(2, 0.5)]}
    assert any("from step 4 to step 2" in note for note in run.notes)


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


def test_numbered_attempts_are_in_order_if_one_has_no_card(tmp_path):
    """The third went back further than the second."""
    for name, first in (("metrics", 1), ("metrics-2", 5), ("metrics-3", 3)):
        lines = [json.dumps({"step": n, "data": {"critic/score/mean": float(first)}}) + "\n" for n in range(first, 7)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    for name, hour in (("run", 0), ("run-3", 2)):
        card = {"run_id": "r", "estimator": "grpo", "started": f"2026-01-01T0{hour}:00:00+0000"}
        (tmp_path / f"{name}.json").write_text(json.dumps(card))
    assert [file.name for file in load_run(tmp_path).files] == ["metrics.jsonl", "metrics-2.jsonl", "metrics-3.jsonl"]


def test_each_metrics_file_has_a_run_card_of_its_own():
    names = ("metrics.jsonl", "metrics-2.jsonl", "metrics_b.jsonl", "other.jsonl")
    cards = [run_card(Path("out") / name).name for name in names]
    assert cards == ["run.json", "run-2.json", "run_b.json", "run-other.json"]


def test_a_step_that_is_trained_again_keeps_nothing_of_the_attempt_before(tmp_path):
    """Killed in step 4 after the checkpoint of step 2; the validation of step 3 was not repeated."""
    lines = [line(n, x=n, y=n) for n in (1, 2)] + [line(3, x=3, **{VALIDATION: 0.1}), line(2, **{VALIDATION: 0.5})]
    run = load_run(write_run(tmp_path, *lines, line(3, x=30), line(4, x=40)))
    assert run.series["x"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert run.series[VALIDATION] == [(2, 0.5)]
    assert run.series["y"] == [(1, 1.0), (2, 2.0)]
    assert (run.seams, run.attempts, run.discarded) == ([2], 2, 1)
    assert run.resumed() == "resumed after step 2 (2 attempts; 1 step of an earlier attempt was discarded)"


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
