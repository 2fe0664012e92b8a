"""The page of a run."""

import json
import os
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.report_runs import ATTENTION, GRPO, R_V, VALIDATION, attempt, line, make_run, recorded, write_run

from sayo_verl.cli import main
from sayo_verl.errors import SayoError
from sayo_verl.report import catalogue as c
from sayo_verl.report import causal
from sayo_verl.report import runs as r
from sayo_verl.report.page import state_of, write_page, write_page_at_end
from sayo_verl.report.runs import load_run
from sayo_verl.report.verdict import Change
from sayo_verl.view.store import read_steps, step_file


class Texts(HTMLParser):
    """Headings and texts of a page, without scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.scripts = 0
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self._within = tag
        self.scripts += tag == "script" and dict(attrs).get("type") != "application/json"
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_data(self, data: str) -> None:
        if self._within in ("h1", "h2") and self.headings:
            self.headings[-1] += data.strip()
        if self._within not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path, **given: object) -> Texts:
    return Texts(write_page(load_run(folder), **given).read_text())


def test_the_page_says_in_this_order_what_matters(tmp_path):
    make_run(tmp_path, ATTENTION)
    recorded(tmp_path)
    page = page_of(tmp_path)
    assert page.headings == [
        "demo",
        "Did it get better?",
        "Where did the policy look?",
        "What was run",
        "Curves",
        "Curves of the method: attn_region: SAYO, arXiv 2602.08241",
        "Warnings",
        "Rollouts of fixed held-out prompts",
        "Causal beside attention",
    ]
    for said in (
        "Step 12 of 12. Finished.",
        "Task reward rose from 0.730 to 0.800.",
        "Region reward r_v rose from 0.630 to 0.700; 0 means no preference.",
        "20 % of the attention to the image fell on the boxes at step 0 and 40 % at step 10; looking everywhere alike "
        "would give 12.5 %.",
        "Right answers: 67 % at step 0, 67 % at step 10.",
        "Tokens that attend more to the image depend more on it",
        "At step 10, 0 of 1 wrong answers have a positive advantage and 0 of 2 right answers have",
    ):
        assert said in page.text


def test_a_run_without_rollouts_says_which_setting_records_them(tmp_path):
    make_run(tmp_path, GRPO, estimator="grpo")
    page = page_of(tmp_path)
    assert page.text.count("sayo.viz_every=10") == 2
    assert page.scripts == 0
    recorded(tmp_path, values={"image_mass": np.full(6, 0.1, np.float32)})
    assert "sayo.viz_causal=true measures it" in page_of(tmp_path).text


def test_settings_data_and_attempts_are_named(tmp_path):
    overrides = ["algorithm.attn.region.weight=0.5", "actor_rollout_ref.model.path=/m/<b>"]
    attempt(tmp_path, "", range(1, 6), 1.0, "2026-11-26T10:00:00+0000", overrides=overrides, data={"/d/t.parquet": 7})
    attempt(tmp_path, "-2", range(6, 9), 2.0, "2026-11-26T11:00:00+0000", overrides=overrides, data={"/d/t.parquet": 7})
    (tmp_path / "run-2.yaml").write_text(
        "algorithm: {attn: {region: {weight: 0.5}}}\ndata: {train_files: [/d/t.parquet]}\n"
        "actor_rollout_ref: {model: {path: /m/<b>}}\n"
    )
    page = page_of(tmp_path)
    assert "/m/<b> on /d/t.parquet (7 bytes)" in page.text
    assert "Step 8, resumed after step 5 (2 attempts)." in page.text
    assert "Dashed vertical lines: resumed after step 5 (2 attempts)." in page.text
    assert "Metrics: metrics.jsonl, metrics-2.jsonl" in page.text
    assert "one run in several attempts" in page.text
    assert load_run(tmp_path).seams == [5]


def test_seams_of_attempts_that_went_back_are_kept_only_where_their_curves_remain(tmp_path):
    attempt(tmp_path, "", range(1, 9), 1.0, "2026-11-26T10:00:00+0000")
    attempt(tmp_path, "-2", range(7, 13), 2.0, "2026-11-26T11:00:00+0000")
    attempt(tmp_path, "-3", range(4, 6), 3.0, "2026-11-26T12:00:00+0000")
    run = load_run(tmp_path)
    assert (run.seams, run.attempts) == ([3], 3)
    assert run.discarded == 11  # 7 and 8 of the first attempt, 7 to 12 of the second, 4 to 6 of the first
    assert run.resumed() == "resumed after step 3 (3 attempts; 11 steps of earlier attempts were discarded)"
    assert [value for _, value in run.series["x"]] == [1.0, 1.0, 1.0, 3.0, 3.0]
    one_file = write_run(
        tmp_path / "one", *(line(n, x=1) for n in (1, 2, 3)), line(3, **{VALIDATION: 0.5}), line(4, x=1)
    )
    assert load_run(one_file).seams == []
    back = write_run(tmp_path / "back", *(line(n, x=1) for n in (1, 2, 3, 2, 3)))
    assert load_run(back).seams == [1]


def test_warnings_name_nan_neutral_rows_cut_files_and_left_out_metrics(tmp_path):
    data = ATTENTION | {"sayo/neutral_rows/no_box": 2.0, "sayo/staleness/max": 3.0, "text": "no number"}
    lines = [line(n, **data | ({R_V: None} if n == 3 else {})) for n in range(1, 5)]
    write_run(tmp_path, *lines, '{"step": 5, "da', launch={"run_id": "demo", "estimator": "attn_region"})
    recorded(tmp_path)
    file = step_file(tmp_path, 10)
    file.write_bytes(file.read_bytes()[:300])
    text = page_of(tmp_path).text
    for said in (
        f"{R_V}: NaN (1 of 4)",
        "neutral rows: no box: 8 in 4 steps",
        "up to 3 versions of the weights old",
        "line 5 of metrics.jsonl is truncated",
        "text: left out, 4 values are not numbers",
        "SAYO-A28",
    ):
        assert said in text
    assert "2 prompts at 1 points of the training" in text


def test_each_count_of_rows_says_what_it_means_for_the_training(tmp_path):
    counts = [metric.name for metric in c.ANY_METHOD.metrics if metric.unless_zero]
    write_run(tmp_path, line(1, **ATTENTION, **dict.fromkeys(counts, 3.0)), launch={"run_id": "demo"})
    text = page_of(tmp_path).text
    assert "3 rollouts failed in 1 step and were left out of their groups." in text
    assert "skipped updates: 3 in 1 steps. The weights stayed as they were." in text
    assert text.count(": 3 in 1 steps. ") == len(counts) - 1, "failed rollouts have a sentence of their own"


def test_text_of_the_model_and_of_files_stays_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>$x_1"
    run = write_run(
        tmp_path, line(1, **ATTENTION), line(2, **{"sayo/<i>own": 1.0}), launch={"run_id": evil, "overrides": [evil]}
    )
    pieces = (evil, " a", " </script>", " $", "$ b", " c")
    recorded(run, pieces=pieces, facts={"query_row": evil}, notes=(evil,))
    page = Texts(content := write_page(load_run(run)).read_text())
    assert page.scripts == 1  # the viewer's
    assert page.headings[0] == evil
    assert "<img src=x" not in content
    assert "<i>own" not in content


def test_a_run_in_flight_is_readable_and_its_state_is_named(tmp_path):
    run = make_run(tmp_path, GRPO, steps=3, estimator="grpo")
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "demo", "estimator": "grpo", "total_steps": 30}))
    assert "probably still running" in page_of(tmp_path).text
    old = time.time() - 7200
    os.utime(run.files[0], (old, old))
    assert "killed, or it hangs" in state_of(load_run(tmp_path))[0]
    ended = {"time": "2026-11-27T08:00:00+0000", "error": "OutOfMemoryError: 3 GiB"}
    (tmp_path / "run.json").write_text(json.dumps({"total_steps": 30, "ended": ended}))
    (tmp_path / r.LOG_FILE).write_text("SAYO-L01: the reason | at x | fix: y\n")
    text = page_of(tmp_path).text
    assert "Failed at 2026-11-27T08:00:00+0000: OutOfMemoryError: 3 GiB" in text
    assert "SAYO-L01: the reason" in text
    (tmp_path / "run.json").write_text(json.dumps({"total_steps": 3, "ended": ended | {"error": ""}}))
    assert state_of(load_run(tmp_path)) == ("Finished at 2026-11-27T08:00:00+0000.", "ok")


def test_a_run_of_one_step_has_a_page_and_one_without_a_step_has_none(tmp_path):
    page = page_of(write_run(tmp_path / "one", line(1, **GRPO)))
    assert "Cannot be told: 1 training steps are too few (10 are needed)." in page.text
    assert write_page_at_end(write_run(tmp_path / "none", "")) is None
    with pytest.raises(SayoError, match="SAYO-R02"):
        write_page_at_end(tmp_path / "no run")


BATCH = ["data.train_batch_size=4", "actor_rollout_ref.rollout.n=2"]
LEFT, ROSE = "and were left out of their groups.", "The share rose; in each step, in %:"


@pytest.mark.parametrize(
    ("counts", "overrides", "said"),
    [
        ([0, 0, 0], BATCH, ""),
        ([1, 0, 0, 0], BATCH, f"1 of 32 rollouts failed (3 %) {LEFT}"),
        ([0, 2, 3, 5], BATCH, f"10 of 32 rollouts failed (31 %) {LEFT} {ROSE} 0, 25, 38, 62."),
        ([5], BATCH, f"5 of 8 rollouts failed (62 %) {LEFT}"),
        ([1, 2], BATCH[:1], f"3 rollouts failed in 2 steps {LEFT}"),
        ([1, 2], [*BATCH, "algorithm.filter_groups.enable=True"], f"3 rollouts failed in 2 steps {LEFT}"),
    ],
)
def test_failed_rollouts_are_said_beside_the_result_with_their_share(tmp_path, capsys, counts, overrides, said):
    lines = [line(step, **GRPO, **{"sayo/failed_rollouts": count}) for step, count in enumerate(counts, 1)]
    written = write_page_at_end(write_run(tmp_path, *lines, launch={"overrides": overrides}))
    assert written is not None
    assert written[1] == said
    warnings = Texts(written[0].read_text()).text.partition("Warnings")[2]
    assert (said in warnings) if said else ("failed rollouts" not in warnings)
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (f"note     {said}" in shown) if said else ("rollouts failed" not in shown)


def test_a_long_run_gives_the_shares_of_its_last_steps(tmp_path):
    lines = [line(step, **GRPO, **{"sayo/failed_rollouts": step // 10}) for step in range(1, 21)]
    _, said = write_page_at_end(write_run(tmp_path, *lines, launch={"overrides": BATCH}))
    assert said.endswith("in each of the last 8 steps, in %: 12, 12, 12, 12, 12, 12, 12, 25.")


def test_a_page_that_cannot_be_written_is_refused_and_a_damaged_configuration_too(tmp_path):
    run = make_run(tmp_path / "run", GRPO)
    (tmp_path / "file").write_text("")
    with pytest.raises(SayoError, match="SAYO-R07"):
        write_page(run, out=tmp_path / "file" / "report.html")
    (tmp_path / "run" / "run.yaml").write_text("a: [")
    with pytest.raises(SayoError, match=r"SAYO-R04: .*run\.yaml"):
        write_page(run)


def test_the_command_writes_a_page_for_each_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/run", "b/run"):
        Path(name).parent.mkdir()
        make_run(Path(name), GRPO, estimator="grpo")
    assert main(["report", "a/run", "b/run", "--out", "both.png"]) == 0
    shown = capsys.readouterr().out
    for file in ("a/run/report.html", "b/run/report.html", "a/run/curves.png", "both.png"):
        assert Path(file).exists()
        assert file in shown
    assert main(["report", "nowhere"]) == 2


def test_a_change_is_clear_beyond_two_standard_errors():
    clear = Change.of([(n, n / 100) for n in range(20)], 5)
    assert clear.text() == "rose from 0.020 to 0.170"
    noise = Change.of([(n, float(n % 2)) for n in range(10)], 5)
    assert "no clear change" in noise.text()
    assert Change.of([(1, 1.0)], 5) is None
    assert Change.of([(1, float("nan")), (2, 1.0)], 5) is None
    assert "noise is unknown" in Change.of([(1, 0.0), (2, 1.0)], 5).text()


def test_the_effect_of_a_token_is_set_beside_the_row_that_predicted_it(tmp_path):
    recorded(tmp_path, (0,))
    step = read_steps(tmp_path)[0]
    prompt, responses = step.prompts[0]
    found = causal.effects_of(step, prompt, responses)
    assert found.correlation.value > 0.7
    assert (found.tokens, len(found.responses)) == (18, 3)
    recorded(tmp_path, (0,), facts={"query_row": "input"})
    prompt, responses = read_steps(tmp_path)[0].prompts[0]
    shifted = causal.predicting_mass(responses[0])
    assert np.isnan(shifted[0])
    assert (shifted[1:] == responses[0].values["image_mass"][:-1]).all()
    assert causal.effects_of(step, prompt, responses).tokens == 15
    measured = replace(responses[0], values=responses[0].values | {"predicting_mass": np.full(6, 0.5, np.float32)})
    assert (causal.predicting_mass(measured) == 0.5).all()


def test_without_the_row_of_the_attention_no_correlation_is_shown(tmp_path):
    make_run(tmp_path, ATTENTION)
    recorded(tmp_path, (0,), facts={})
    page = page_of(tmp_path)
    assert "do not say at which position the attention was read" in page.text
    assert "rank correlation" not in page.text


def test_the_common_panels_begin_with_the_task_reward(tmp_path):
    run = make_run(tmp_path, ATTENTION)
    assert [panel.title for panel in c.panels_of([run])][:2] == ["Task reward", "Total reward"]
    assert [metric.name for metric in c.rows_of(run)][:2] == ["critic/score/mean", "critic/rewards/mean"]
