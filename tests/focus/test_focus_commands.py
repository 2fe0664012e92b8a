"""Responses to imitate, the report and the commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.focus_rows import SHORT, batch_of, load, mixed_rows

from sayo_verl.cli import main as sayo
from sayo_verl.data.rows import schema_of
from sayo_verl.errors import SayoError
from sayo_verl.focus import report, respond
from sayo_verl.focus.config import RespondConfig
from sayo_verl.focus.loss import (
    forward_with_focus,
)
from sayo_verl.focus.rows import AnchorRows
from sayo_verl.focus.trainer import anchor


def main(arguments: list[str]) -> int:
    return sayo(["focus", *arguments])


def test_respond_keeps_right_answers_only(folders, parquet, tmp_path, monkeypatch):
    calls = []

    def sample(_model, _processor, rows, *_):
        calls.append(len(rows))
        answers = [row["reward_model"]["ground_truth"] for row in rows]
        return [
            f"<think> x</think><answer> {answer}</answer>" if i % 2 else f"{answer}" for i, answer in enumerate(answers)
        ]

    monkeypatch.setattr(respond, "_sample", sample)
    done = respond.write_responses(
        folders["qwen3_vl"], [parquet], tmp_path / "r.parquet", RespondConfig(tries=2, batch_size=64, max_rows=8)
    )
    assert calls == [8, 4]
    assert done == {"rows": 8, "kept": 6}
    rows = AnchorRows([tmp_path / "r.parquet"])
    assert rows.without_response() == 0
    assert all(rows[i]["reward_model"]["ground_truth"] in rows[i]["response"] for i in range(6))


def test_respond_says_when_nothing_is_right(folders, parquet, tmp_path):
    with pytest.raises(SayoError, match="F18"):
        respond.write_responses(
            folders["qwen3_vl"], [parquet], tmp_path / "r.parquet", RespondConfig(tries=1, max_new_tokens=3, max_rows=2)
        )
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(parquet).slice(0, 0), empty)
    with pytest.raises(SayoError, match="F10"):
        respond.write_responses(folders["qwen3_vl"], [empty], tmp_path / "e.parquet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"tries": 0},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"max_rows": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_respond_refuses_numbers_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(SayoError, match=f"F05: .* at --{name.replace('_', '-')}"):
        RespondConfig(**wrong)


def test_respond_samples_without_the_penalties_of_the_models_generation_config(folders, parquet, tmp_path, monkeypatch):
    changed = tmp_path / "changed"
    shutil.copytree(folders["qwen3_vl"], changed)
    file = changed / "generation_config.json"
    values = json.loads(file.read_text()) if file.exists() else {}
    penalties = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 1, "top_k": 1}
    file.write_text(json.dumps(values | {"do_sample": True, "eos_token_id": [3, 5]} | penalties))
    sample, used = respond._sample, []

    def spy(model, *args):
        inner = model._get_logits_processor

        def processors(generation_config, *args, **kwargs):
            used.append(generation_config)
            return inner(generation_config, *args, **kwargs)

        model._get_logits_processor = processors
        return sample(model, *args)

    monkeypatch.setattr(respond, "_sample", spy)
    with pytest.raises(SayoError, match="F18"):
        respond.write_responses(
            changed, [parquet], tmp_path / "r.parquet", RespondConfig(tries=1, max_new_tokens=3, max_rows=2)
        )
    (config,) = used
    assert config.eos_token_id == [3, 5]
    assert config.repetition_penalty in (None, 1.0)
    assert not config.no_repeat_ngram_size


def test_respond_brings_files_of_different_columns_together(folders, parquet, tmp_path, guesses):
    table = pq.read_table(parquet).slice(0, 12)
    other = table.append_column("source", pa.array(["b"] * 12))
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(table.append_column("n", pa.nulls(12)), files[0])
    pq.write_table(other.append_column("n", pa.array(range(12))), files[1])
    done = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "r.parquet")
    kept = pq.read_table(tmp_path / "r.parquet")
    assert kept.num_rows == done["kept"]
    assert set(zip(kept["source"].to_pylist(), (n is None for n in kept["n"].to_pylist()), strict=True)) == {
        (None, True),
        ("b", False),
    }
    assert AnchorRows([tmp_path / "r.parquet"]).without_response() == 0


def test_files_with_different_columns_are_refused(parquet, tmp_path):
    table = pq.read_table(parquet).slice(0, 2)
    pq.write_table(table.append_column("n", pa.array([1, 2])), tmp_path / "a.parquet")
    pq.write_table(table.append_column("n", pa.array(["x", "y"])), tmp_path / "b.parquet")
    with pytest.raises(SayoError, match=r"F24: .* at .*b\.parquet .* wanted types as in .*a\.parquet"):
        respond.write_responses(
            "no model is loaded", [tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "r.parquet"
        )
    assert not (tmp_path / "r.parquet.parts").exists()


@pytest.fixture
def guesses(monkeypatch):
    """Answers drawn from torch's generator, about half of them right; a list of the rows that were sampled."""
    sampled: list[str] = []

    def sample(_model, _processor, rows, *_):
        sampled.extend(row["_where"] for row in rows)
        right = torch.rand(len(rows)) < 0.5
        return [
            f"<think> {float(torch.rand(1)):.6f}</think><answer> {row['reward_model']['ground_truth']}</answer>"
            if ok
            else "no"
            for row, ok in zip(rows, right, strict=True)
        ]

    monkeypatch.setattr(respond, "_sample", sample)
    return sampled


def test_responses_do_not_depend_on_the_number_of_processes(folders, parquet, tmp_path, guesses):
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]  # 30 and 18 rows
    table = pq.read_table(parquet)
    pq.write_table(table.slice(0, 30), files[0])
    pq.write_table(table.slice(30), files[1])
    config = RespondConfig(tries=2, batch_size=2, max_rows=45, seed=3)
    one = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "one.parquet", config)
    guesses.clear()
    first = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "two.parquet", config, rank=1, world=2)
    assert first == {"rows": 45, "left": 3}, (
        "blocks of 8 rows, none across files: 4 of the first file and 2 of the second"
    )
    assert not (tmp_path / "two.parquet").exists()
    second = respond.write_responses(folders["qwen3_vl"], files, tmp_path / "two.parquet", config, rank=0, world=2)
    assert second == one
    assert 0 < one["kept"] < 45
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    kept = pq.read_table(tmp_path / "one.parquet")
    order = [row["index"] for row in kept["extra_info"].to_pylist()]
    assert order == sorted(order)
    assert len(set(kept["response"].to_pylist())) == one["kept"], "each block has random numbers of its own"


def test_an_interrupted_run_goes_on_where_it_stood(folders, parquet, tmp_path, guesses, monkeypatch):
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    config = RespondConfig(tries=2, batch_size=4, seed=1)
    done = respond.write_responses(folders["qwen3_vl"], [parquet], whole, config)
    answers, n = respond._answers, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        return answers(*args, **kwargs)

    monkeypatch.setattr(respond, "_answers", stops)
    with pytest.raises(KeyboardInterrupt):
        respond.write_responses(folders["qwen3_vl"], [parquet], cut, config)
    assert not cut.exists()
    monkeypatch.setattr(respond, "_answers", answers)
    guesses.clear()
    assert respond.write_responses(folders["qwen3_vl"], [parquet], cut, config) == done
    assert {int(where.split()[1]) for where in guesses} == set(range(32, 48)), "the third block of 16"
    assert cut.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(respond, "AutoModelForImageTextToText", None)  # nothing is left to sample: no model is loaded
    assert respond.write_responses(folders["qwen3_vl"], [parquet], cut, config) == done


@pytest.mark.parametrize("change", [{"tries": 3}, {"seed": 2}, {"max_rows": 40}, {"batch_size": 2}])
def test_responses_begun_with_other_settings_are_refused(folders, parquet, tmp_path, guesses, change):
    out, config = tmp_path / "r.parquet", RespondConfig(tries=2, batch_size=4, seed=1)
    respond.write_responses(folders["qwen3_vl"], [parquet], out, config, rank=0, world=2)
    with pytest.raises(SayoError, match=r"F19: .*settings.json.* got {.*}, wanted {.*} .*rm -r"):
        respond.write_responses(folders["qwen3_vl"], [parquet], out, replace(config, **change))
    assert "kept" in respond.write_responses(folders["qwen3_vl"], [parquet], out, config)


def test_report_measures_what_the_loss_is_about(folders, tmp_path):
    model, processor = load(folders["qwen3_vl"])
    rows = mixed_rows()
    figures, looks = report.measure(model, processor, rows, SHORT, batch_size=4)
    batch, focus = batch_of(model, processor, rows)
    with torch.no_grad():
        divergence = forward_with_focus(model, batch, focus, (2,))[1]["divergence"]
    assert figures["anchor_loss"] == pytest.approx(float(divergence.mean()), abs=1e-5)
    assert (figures["rows"], figures["rows_with_boxes"]) == (6, 4)
    assert [look is not None for look in looks] == [True, False, True, False, True, False]
    assert all(float(look.p.sum()) == pytest.approx(1, abs=1e-5) and look.grid == (3, 3) for look in looks if look)
    exact, _ = load(folders["qwen3_vl"], attention="eager")
    with torch.no_grad():
        attention_S = exact(**batch, output_attentions=True).attentions[2][0, :, focus.at[0]].mean(0)
    p_S = attention_S * focus.image[0] / attention_S[focus.image[0]].sum()
    only, _ = report.measure(model, processor, rows[:1], SHORT)
    assert only["region_share"] == pytest.approx(float(p_S[focus.region[0]].sum()), abs=1e-5)
    assert only["image_mass"] == pytest.approx(float(attention_S[focus.image[0]].sum()), abs=1e-5)
    assert "lm_loss" not in figures
    assert report.draw(rows, looks, looks, tmp_path / "a.png", n=2).stat().st_size > 10_000


def test_the_commands_work_together(folders, parquet, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--base", str(folders["qwen3_vl"]), "--rows", str(parquet)]
    quiet = json.dumps({"disable_tqdm": True, "use_cpu": True})
    assert (
        main(
            [
                "train",
                *common,
                "--out",
                str(out),
                "--steps",
                "2",
                "--warmup-steps",
                "1",
                "--batch-size",
                "4",
                "--layers",
                "1",
                "-1",
                "--trainer-args",
                quiet,
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out)
    assert "layers [1, 2]" in captured.err
    assert main(["report", *common, "--after", str(out), "--out", str(tmp_path), "--max-rows", "4"]) == 0
    assert set(json.loads((tmp_path / "focus.json").read_text())) == {"base", "before", "after"}
    assert "L_anchor" in capsys.readouterr().out
    assert main(["train", *common, "--out", str(out), "--alpha", "2"]) == 2
    assert "SAYO-F05" in capsys.readouterr().err


@pytest.fixture(scope="module")
def no_boxes(parquet: Path) -> Path:
    rows = pq.read_table(parquet).to_pylist()
    for row in rows:
        row["extra_info"]["boxes"] = []
    file = parquet.with_name("no_boxes.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(link=False)), file)
    return file


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [
        ("train", ["--alpha", "2"], "F05"),
        ("train", ["--trainer-args", '{"sav_strategy": "steps"}'], "F21"),
        ("train", [], "F22"),
        ("report", ["--after", "x"], "F22"),
    ],
)
def test_a_check_refuses_wrong_arguments_before_a_model_is_looked_for(
    no_boxes, tmp_path, capsys, command, arguments, code
):
    common = [command, "--base", "no/model", "--rows", str(no_boxes), "--out", str(tmp_path / "out"), "--check"]
    assert main([*common, *arguments]) == 2
    assert f"SAYO-{code}: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*common, *arguments, "--wieght", "1"])
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_check_of_right_arguments_is_silent_and_starts_nothing(parquet, tmp_path, capsys):
    common = ["--base", "no/model", "--out", str(tmp_path / "out"), "--check", "--rows"]
    quiet = json.dumps({"disable_tqdm": True})
    assert main(["train", *common, str(parquet), "--trainer-args", quiet]) == 0
    assert main(["respond", *common, str(parquet)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["report", *common, "absent.parquet", "--after", "x"]) == 0
    assert capsys.readouterr().out == "not checked, missing: absent.parquet\n"
    assert not (tmp_path / "out").exists()


def test_files_without_any_box_are_refused(no_boxes, tmp_path):
    with pytest.raises(SayoError, match="F22"):
        anchor("no/model", [no_boxes], tmp_path / "out", SHORT)
    with pytest.raises(SayoError, match="F22"):
        report.compare("no/model", "no/model", no_boxes, SHORT, picture=tmp_path / "a.png")
