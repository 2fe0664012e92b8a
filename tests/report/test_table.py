"""Tables of the first and last steps."""

import io

from rich.console import Console
from support.report_runs import ATTENTION, GRPO, cells, line, make_run, write_run

from sayo_verl.report import catalogue as c
from sayo_verl.report import runs as r
from sayo_verl.report.runs import load_run
from sayo_verl.report.table import first_last_markdown, first_last_table


def test_table_has_means_of_both_ends_and_their_change(tmp_path):
    run = make_run(tmp_path / "region", ATTENTION)
    table = cells(first_last_markdown(run, k=3))
    assert table["metric"] == ["first 3 steps", "last 3 steps", "change"]
    assert table["total reward"] == ["1.020", "1.110", "+0.090"]
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
    assert table["total reward"] == ["1.015", "1.045", "+0.030"]
    only = cells(first_last_markdown(make_run(tmp_path / "b", GRPO, steps=1)))["total reward"]
    assert only[0] == only[1] == "1.010"
    assert only[2] not in ("+0.000", "")


def test_nan_in_a_window_gives_nan_and_nan_elsewhere_is_noted(tmp_path):
    gaps = {c.REWARD.name: 2, "actor/entropy": 6}
    lines = [line(n, **{name: None if n == gap else 1.0 for name, gap in gaps.items()}) for n in range(1, 11)]
    table = cells(first_last_markdown(load_run(write_run(tmp_path, *lines)), k=3))
    assert table["total reward"] == ["NaN (1 of 10)", "1.000", "NaN"]
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
    assert cells(first_last_markdown(load_run(write_run(tmp_path, *lines))))["total reward"][2] == "+0.000"
