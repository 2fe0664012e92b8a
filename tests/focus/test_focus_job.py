"""A job of the anchoring stage: its values, its arithmetic, its plan, and what runs."""

import argparse
import dataclasses
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sayo_verl.cli import main
from sayo_verl.errors import SayoError
from sayo_verl.focus import command, run
from sayo_verl.focus.config import FocusConfig, RespondConfig
from sayo_verl.focus.job import FocusJob, ReportStep, accumulation, read_job
from sayo_verl.focus.plan import sampling_minutes, steps_of
from sayo_verl.focus.variables import UNREAD, refuse_variables
from sayo_verl.scenes import SceneConfig
from sayo_verl.script_variables import BY_SCRIPT
from sayo_verl.tiny.prepared import prepare_scenes

JOB = "configs/focus/qwen2_5vl_7b.yaml"
BASE = "--base Qwen/Qwen2.5-VL-7B-Instruct"
ALL = "torchrun --standalone --nproc_per_node=8 -m sayo_verl.focus"


@pytest.fixture(autouse=True)
def place(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    for name in (*UNREAD, BY_SCRIPT, "METHOD", "NNODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_scenes(tmp_path_factory.mktemp("scenes"), SceneConfig(n_train=4, n_val=2)).path


@pytest.fixture
def job(tmp_path, capsys):
    """``job(*settings)`` runs a job: the exit code, what it printed, and what it printed as an error."""

    def call(*settings: str, file: str = JOB) -> tuple[int, str, str]:
        code = main(["focus", "run", file, *settings])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def plan(job, *settings: str, file: str = JOB) -> dict[str, str]:
    rows = ["data=d"] if file == JOB and not any(s.startswith(("data=", "train_files=")) for s in settings) else []
    code, out, err = job(f"out={os.devnull}/o", *rows, *settings, "--dry-run", file=file)
    assert (code, err) == (0, ""), err
    *lines, last = out.splitlines()
    assert re.match("dry run: .*; nothing was started", last)
    return dict(line.split(maxsplit=1) for line in lines) | {"last": last}


# ------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("configs/focus/*.yaml")), ids=lambda f: f.stem)
@pytest.mark.parametrize("rank", [0, 8])
def test_every_job_composes_with_and_without_lora(file, rank):
    read, given_keys = read_job(file, [f"train.lora_rank={rank}"])
    assert read.train.lora_rank == rank
    assert given_keys == {"train.lora_rank"}


def test_values_of_the_7b_job_follow_the_rank_and_the_command_line():
    read = read_job(Path(JOB), [])[0].train
    assert (read.lora_alpha, read.learning_rate, read.dtype, read.trainer_args) == (128, 1e-4, "bfloat16", {})
    assert read_job(Path(JOB), ["train.lora_rank=8"])[0].train.lora_alpha == 16
    read = read_job(Path(JOB), ["train.lora_rank=0", "train.trainer_args.logging_steps=5", "train.weight=1e-1"])[
        0
    ].train
    assert (read.learning_rate, read.dtype, read.weight) == (1e-5, "float32", 0.1)
    assert read.trainer_args["logging_steps"] == 5
    assert read.trainer_args["fsdp"] == "full_shard auto_wrap", "an argument of the user's is added to the file's"
    assert read_job(Path(JOB), ["train.lora_rank=0", "train.learning_rate=3e-5"])[0].train.learning_rate == 3e-5
    for steps, warmup in ((500, 50), (10, 1), (1, 0)):
        assert read_job(Path(JOB), [f"train.steps={steps}"])[0].train.warmup_steps == warmup
    report = read_job(Path(JOB), ["train.alpha=0.2", "train.layers=[14,18]"])[0].report
    assert (report.alpha, list(report.layers), report.dtype) == (0.2, [14, 18], "bfloat16")


@pytest.mark.parametrize("path", ["a b", "a: b", "[x]", "a #1", "~", "7"])
def test_a_path_is_taken_as_it_is_typed(path):
    assert read_job(Path(JOB), [f"data={path}"])[0].data == path


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.stepz=3", r"F26: unknown key \(did you mean 'train.steps'\?\) \| at train.stepz"),
        ("train=3", "F26: unknown key .* at train "),
        ("steps", "F26: not a setting .* got steps"),
        ("train.steps=2.5", r"F27: .* at train.steps \| got 2.5, wanted int"),
        ("train.layers=[1,x]", "F27: .* at train.layers"),
        ("train.trainer_args={a: 1, b", "F27: .* at train.trainer_args"),
        ("train.trainer_args=5", "F27: .* at train.trainer_args"),
        ("base=null", "F27: .* at base"),
        ("train.trainer_args.loging_steps=5", "F21: .*did you mean 'logging_steps'"),
        ("train.alpha=2", "F05: .* got alpha=2.0"),
        ("respond.tries=0", "F05: .* at --tries"),
        ("gpus=0", r"F23: a setting has to be a whole number, at least 1 \| at gpus \| got 0"),
        ("lr=1e-5", r"F26: unknown key \(did you mean 'train.learning_rate'\?\) \| at lr "),
        ("steps=10", r"F26: unknown key \(did you mean 'train.steps'\?\)"),
        ("max_rows=1", r"F26: unknown key \(did you mean 'report.max_rows' or 'respond.max_rows'\?\)"),
        ("train.warmup_steps=500", r"F05: .* got warmup_steps=500, steps=500, wanted 0 <= warmup_steps < steps"),
        ("train.steps=${nothing}", "F32: .* at configs/focus"),
        ("resume=r", r"F29: the folder of the job is named twice .* got out=.*/o and resume=r"),
    ],
)
@pytest.mark.parametrize("flag", ["--dry-run", "--check"])
def test_a_wrong_setting_of_any_step_is_refused_before_the_first(job, tmp_path, setting, told, flag):
    code, out, err = job("data=d", setting, f"out={tmp_path}/o", flag)
    assert (code, out) == (2, "")
    assert re.match(f"SAYO-{told}", err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: [}",
        "- a",
        "",
        "base: m\ntrain: {stepz: 3}",
        "train: {steps: 3}",
        "base: m\ntrain: {lora_rank: 1}\nall_weights: {x: 1}",
        "base: !!python/object/apply:os.getcwd []",
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SayoError, match=r"F26: unknown key|F32: the file of the job cannot be used"):
        read_job(file, [])
    with pytest.raises(SayoError, match=r"F32: the file of the job cannot be used .* at .*absent"):
        read_job(tmp_path / "absent", [])


# --------------------------------------------------------------------------------------------------------------- rows
def test_data_of_the_command_line_wins_over_the_files_of_the_job(job, scenes, tmp_path):
    lines = plan(job, f"data={scenes}")
    assert f"--rows {scenes}/train-00000.parquet --out" in lines["1."]
    assert f"--rows {scenes}/val-00000.parquet --out" in lines["3."]
    assert lines["arguments"] == "checked"
    assert lines["then"] == (
        f"DATA={scenes} MODEL_PATH={os.devnull}/o/policy bash scripts/run_faithful_qwen2_5vl_7b.sh"
    )
    lines = plan(job, f"data={scenes}", "val_file=v.parquet")
    assert "--rows v.parquet" in lines["3."]
    assert lines["then"].endswith(f"data.val_files=[{Path.cwd()}/v.parquet]'")


def test_files_of_the_command_line_win_over_the_data_of_the_job(job):
    lines = plan(job, "train_files=[a b,c]", "val_file=v", file="configs/focus/tiny.yaml")
    assert "--rows 'a b' c --out" in lines["1."]
    assert "--rows v --out" in lines["3."]
    assert "DATA=" not in lines["then"]
    assert "'data.train_files=[" in lines["then"]


def test_a_missing_folder_is_shown_by_a_pattern_that_a_shell_expands(job):
    lines = plan(job, "data=data/a b")
    assert lines["held"] == "out   data/a b/val-*.parquet - NOT THERE YET, needed before the run"
    assert lines["arguments"] == (
        "checked; rows not checked, missing: data/a b/train-*.parquet, data/a b/val-*.parquet"
    )
    assert lines["last"].endswith("nothing was started; still missing: train rows, held-out rows, model")
    assert "--rows 'data/a b'/train-*.parquet --out" in lines["1."]
    assert lines["then"].startswith(f"DATA='{Path.cwd()}/data/a b' MODEL_PATH=")


@pytest.mark.parametrize(
    ("settings", "file", "told"),
    [
        (["data=d", "train_files=a"], JOB, "the training rows are named twice"),
        (["train_files=a"], "configs/focus/tiny.yaml", "would come from two places"),
        ([], JOB, "no rows to train on .*wanted rows with boxes .*DATA=FOLDER"),
        (["train_files=[]"], JOB, "no rows to train on"),
        (["train_files=a"], JOB, "no held-out rows"),
    ],
)
def test_rows_named_twice_or_not_at_all_are_refused(job, settings, file, told):
    code, _, err = job(*settings, "--dry-run", file=file)
    assert code == 2
    assert re.match(f"SAYO-F30: .*{told}", err)


def test_a_file_of_a_job_that_names_rows_twice_is_refused(job, tmp_path):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"base": "m", "data": "d", "train_files": "t"}))
    assert "SAYO-F30: the training rows are named twice" in job("--dry-run", file=str(tmp_path / "job.yaml"))[2]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"base": "m", "data": "d", "val_file": "v"}))
    assert plan(job, file=str(tmp_path / "job.yaml"))["held"].startswith("out   v ")


# --------------------------------------------------------------------------------------------------------- arithmetic
@given(rows=st.integers(1, 512), gpus=st.integers(1, 64), batch_size=st.integers(1, 64))
def test_accumulation_is_as_near_to_the_rows_as_it_can_be(rows, gpus, batch_size):
    n, one = accumulation(rows, gpus, batch_size), gpus * batch_size
    assert n == 1 if 2 * rows < 3 * one else abs(n * one - rows) <= one / 2


@pytest.mark.parametrize(
    ("rows", "gpus", "tries", "right", "minutes"),
    [
        (8192, 8, 4, True, 31),
        (8192, 8, 4, False, 62),
        (8192, 1, 4, True, 245),
        (38870, 8, 4, True, 146),
        (38870, 8, 4, False, 291),
        (1, 8, 1, True, 2),
        (128, 1, 5, True, 5),
    ],
)
def test_minutes_of_sampling(rows, gpus, tries, right, minutes):
    respond = RespondConfig(tries=tries, max_new_tokens=1024)
    assert sampling_minutes(rows, gpus, respond, right=right) == minutes


# --------------------------------------------------------------------------------------------------------------- plan
TRAINED = (
    "--steps 500 --batch-size 2 --accumulation 4 --learning-rate 0.0001 --warmup-steps 50 --lora-rank 64 "
    "--lora-alpha 128 --dtype bfloat16 --attention sdpa --checkpointing --max-tokens 8192"
)


def test_the_commands_of_the_7b_job(job):
    out = f"{os.devnull}/o"
    lines = plan(job, "train_files=t.parquet", "val_file=v.parquet")
    assert lines["1."] == (
        f"{ALL} respond {BASE} --rows t.parquet --out {out}/rows.parquet --max-new-tokens 1024 --max-rows 8192"
    )
    assert lines["2."] == f"{ALL} train {BASE} --rows {out}/rows.parquet --out {out}/policy {TRAINED}"
    assert lines["3."] == (
        f"python3 -m sayo_verl.focus report {BASE} --after {out}/policy --rows v.parquet --out {out} "
        "--dtype bfloat16 --attention sdpa --max-rows 256"
    )
    train = shlex.split(plan(job, "train.lora_rank=0")["2."])
    assert "--lora-rank" not in train
    assert "--lora-alpha" not in train
    assert "--dtype" not in train, "float32 is the default"
    assert yaml.safe_load(train[train.index("--trainer-args") + 1]) == {
        "bf16": True,
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer"]},
    }
    assert "--max-rows" not in plan(job, "respond.max_rows=null")["1."]
    lines = plan(job, "sample=false", "train_files=[a,b]", "val_file=v", "train.layers=[14,18]")
    assert "3." not in lines
    assert f"train {BASE} --rows a b --out {out}/policy --layers 14 18 " in lines["1."]
    assert "--layers 14 18" in lines["2."]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], ["31 min for 8192 rows", "62 min if none", "64 rows, 500 steps", "32000 rows seen: 3.9 passes"]),
        (["gpus=1"], ["4.1 h for 8192 rows", "64 rows", "--nproc_per_node=1 ", "--accumulation 32"]),
        (["gpus=null"], ["64 rows", "--accumulation 32", "python3 -m sayo_verl.focus train"]),
        (["gpus=6"], ["60 rows", "30000 rows seen"]),
        (["gpus=64", "train.batch_size=4"], ["256 rows"]),
        (["train.accumulation=3"], ["48 rows", "--accumulation 3"]),
        (["respond.max_rows=38870"], ["2.4 h for 38870 rows", "4.9 h if none"]),
        (["respond.max_rows=null"], ["for every 10000 rows", "32000 rows seen; time not estimated"]),
        (["sample=false"], ["32000 rows seen; time not estimated"]),
        (["train.lora_rank=0"], ["all of the decoder", "lr 1e-05"]),
    ],
    ids=str,
)
def test_the_plan_estimates_sampling_and_keeps_64_rows_a_step(job, settings, told):
    lines = plan(job, *settings)
    assert [text for text in told if not any(text in line for line in lines.values())] == []
    assert ("sampling" in lines) == (settings not in (["sample=false"], ["gpus=null"]))


def test_the_plan_counts_the_rows_that_exist(job, scenes):
    lines = plan(job, f"data={scenes}", "train.steps=10")
    assert lines["rows"] == f"{scenes}/train-00000.parquet: 4 rows"
    assert lines["held"] == f"out   {scenes}/val-00000.parquet: 2 rows"
    assert lines["sampling"].startswith("4 min for 4 rows")
    assert "640 rows seen: 160.0 passes if all 4 sampled rows are kept" in lines["training"]
    assert "for 3 rows" in plan(job, f"data={scenes}", "respond.max_rows=3")["sampling"]
    assert "32000 rows seen: 8000.0 passes; time" in plan(job, f"data={scenes}", "sample=false")["training"]


def test_the_plan_says_of_a_model_whether_it_is_there(job, scenes, tmp_path, monkeypatch):
    lines = plan(job, f"data={scenes}", f"base={tmp_path}/absent")
    assert lines["model"] == f"{tmp_path}/absent - NOT THERE YET, needed before the run"
    assert lines["last"].endswith("; nothing was started; still missing: model")
    assert plan(job, f"data={scenes}", "base=owner/absent")["model"] == (
        "owner/absent - the hub cannot be reached from here"
    )
    code, _, err = job(f"data={scenes}", f"base={tmp_path}", "--dry-run")
    assert (code, err.split(" | ")[:2]) == (2, ["SAYO-L17: the model folder has no config.json", "at base"])
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    lines = plan(job, f"data={scenes}", f"base=~/{tmp_path.name}")
    assert lines["model"] == str(tmp_path)
    assert lines["last"].endswith("; nothing was started")


def parsed(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return parser.parse_args(arguments)


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "weight": st.sampled_from([0.0, 0.5, 1e-7]),
            "alpha": st.sampled_from([0.0, 0.25]),
            "layers": st.sampled_from([(0,), (-1,), (0, -2)]),
            "steps": st.integers(11, 19),
            "warmup_steps": st.integers(0, 10),
            "clip": st.sampled_from([0.0, 2.0]),
            "lora_rank": st.integers(0, 4),
            "lora_alpha": st.integers(1, 9),
            "attention": st.sampled_from(["sdpa", ""]),
            "checkpointing": st.booleans(),
            "max_tokens": st.integers(0, 9),
            "trainer_args": st.sampled_from([{}, {"logging_steps": 5, "fsdp_config": {"version": 2}}]),
        },
    ),
    sampled=st.fixed_dictionaries(
        {}, optional={"max_rows": st.integers(1, 9), "seed": st.integers(0, 2), "temperature": st.floats(0.1, 2)}
    ),
)
def test_a_step_gets_the_settings_of_the_job(values, sampled):
    settings = FocusConfig(**values)
    report = ReportStep(settings.alpha, settings.layers, settings.dtype, settings.attention, sampled.get("max_rows"))
    job = FocusJob("m", "d", ["t"], "v", respond=RespondConfig(**sampled), train=settings, report=report)
    steps = steps_of(job, Path("o"))
    got = command._config(parsed(steps.train))
    unused = {} if settings.lora_rank else {"lora_alpha": settings.lora_alpha}
    assert dataclasses.replace(got, **unused) == settings
    assert command._respond_config(parsed(steps.respond or [])) == job.respond
    arguments = parsed(steps.report)
    compared = command._config(arguments)
    assert (compared.alpha, compared.layers) == (settings.alpha, settings.layers)
    assert (compared.attention, arguments.max_rows) == (settings.attention, report.max_rows)


# ---------------------------------------------------------------------------------------------------------- variables
@pytest.mark.parametrize("name", UNREAD)
def test_a_variable_of_an_earlier_version_is_refused(name):
    with pytest.raises(SayoError, match=f"L67: .* at {name} .* got 7 .* fix: use "):
        refuse_variables({name: "7", BY_SCRIPT: "RESUME=..."})
    refuse_variables({name: "7"})


@pytest.mark.parametrize("wrong", [{"METHOD": "dual"}, {"NNODES": "2"}], ids=str)
def test_another_method_or_several_machines_are_refused(wrong):
    with pytest.raises(SayoError, match=f"F28: .* at {next(iter(wrong))} "):
        refuse_variables({BY_SCRIPT: "RESUME=...", **wrong})
    refuse_variables({BY_SCRIPT: "RESUME=...", "METHOD": "faithful", "NNODES": "1"})


# ------------------------------------------------------------------------------------------------------------ running
@pytest.fixture
def started(monkeypatch):
    """Commands that a job starts; ``codes`` are what they return."""
    lines: list[list[str]] = []
    codes: dict[str, int] = {}

    def start(words: list[str], **_: Any) -> SimpleNamespace:
        step = words[words.index("sayo_verl.focus") + 1]
        lines.append(words)
        if step == "train" and not codes.get(step):
            Path(words[words.index("--out") + 1]).mkdir()
        return SimpleNamespace(returncode=codes.get(step, 0))

    monkeypatch.setattr(run.subprocess, "run", start)
    return SimpleNamespace(lines=lines, codes=codes, steps=lambda: [w[w.index("sayo_verl.focus") + 1] for w in lines])


def tiny(scenes: Path, *settings: str) -> list[str]:
    """Settings of a job whose model is a folder that a step could not load, and no step is started."""
    (scenes / "config.json").write_text("{}")
    return [f"data={scenes}", f"base={scenes}", *settings]


def test_a_job_runs_its_steps_and_names_the_next_command(job, started, scenes, tmp_path):
    code, out, err = job(*tiny(scenes, f"out={tmp_path}/o"), file="configs/focus/tiny.yaml")
    assert (code, err) == (0, "")
    assert started.steps() == ["respond", "train", "report"]
    assert not any("torch.distributed.run" in words for words in started.lines)
    assert f"\npolicy     {tmp_path}/o/policy\n" in out
    assert out.splitlines()[-1] == (
        f"next       DATA={scenes} MODEL_PATH={tmp_path}/o/policy METHOD=faithful bash scripts/run_tiny.sh"
    )
    code, _, err = job(*tiny(scenes, f"out={tmp_path}/o"), file="configs/focus/tiny.yaml")
    assert code == 2
    assert re.match(r"SAYO-F16: .* at .*/o .*\(RESUME=", err)


def test_a_step_that_fails_ends_the_job_and_the_printed_command_resumes_it(job, started, scenes, tmp_path):
    started.codes["train"] = 3
    code, out, _ = job(*tiny(scenes, "train.steps=7", f"out={tmp_path}/o"), file="configs/focus/tiny.yaml")
    assert code == 3
    assert started.steps() == ["respond", "train"]
    (again,) = re.findall(r"^to resume  sayo focus run (.*)$", out, re.M)
    assert f"resume={tmp_path}/o" in again
    started.codes["report"] = 4
    del started.codes["train"]
    started.lines.clear()
    assert main(["focus", "run", *shlex.split(again)]) == 4
    assert started.steps() == ["respond", "train", "report"]
    assert "7" in started.lines[1]
    started.codes.clear()
    started.lines.clear()
    assert main(["focus", "run", *shlex.split(again), "report.max_rows=1"]) == 0
    assert started.steps() == ["report"], "the policy is there"
    code, _, err = job(*tiny(scenes, "train.steps=8", f"resume={tmp_path}/o"), file="configs/focus/tiny.yaml")
    assert code == 2
    assert re.match(r"SAYO-F31: .* got {'train.steps': 8}, wanted {'train.steps': 7}", err)


def test_a_dry_run_of_a_trained_job_says_that_the_report_is_left(job, started, scenes, tmp_path):
    assert job(*tiny(scenes, f"out={tmp_path}/o"), file="configs/focus/tiny.yaml")[0] == 0
    resumed = (f"resume={tmp_path}/o", "--dry-run")
    for inputs in (tiny(scenes), []):  # a dry run of the tiny script does not know the model and the rows yet
        code, out, err = job(*inputs, *resumed, file="configs/focus/tiny.yaml")
        assert (code, err) == (0, "")
        assert "\nthe policy is trained: the report alone is left\n" in out
    assert "SAYO-F31" in job(*tiny(scenes, "train.steps=20"), *resumed, file="configs/focus/tiny.yaml")[2]
    code, _, err = job(*tiny(scenes, f"out={tmp_path}/o", "--dry-run"), file="configs/focus/tiny.yaml")
    assert (code, err.split(":")[0]) == (2, "SAYO-F16")


def test_a_trained_job_is_the_same_on_any_number_of_gpus_that_gives_its_rows_per_step(job, started, scenes, tmp_path):
    file = "configs/focus/tiny.yaml"
    assert job(*tiny(scenes, f"out={tmp_path}/o", "train.accumulation=2"), file=file)[0] == 0
    resumed = [*tiny(scenes, f"resume={tmp_path}/o", "gpus=2"), "--dry-run"]
    resumed[0] = f"data={os.path.relpath(scenes)}"
    code, out, err = job(*resumed, "train.accumulation=1", file=file)
    assert (code, err) == (0, "")
    assert "the report alone is left" in out
    assert "got {'rows_per_step': 128}" in job(*resumed, "train.accumulation=2", file=file)[2]


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=str)
def test_nothing_to_resume_is_refused(job, started, scenes, tmp_path, flags):
    code, _, err = job(*tiny(scenes, f"resume={tmp_path}"), *flags, file="configs/focus/tiny.yaml")
    assert code == 2
    assert re.match(f"SAYO-F29: there is no job to resume .* at {tmp_path}/job.yaml", err)
    assert not started.lines


def test_a_job_on_gpus_starts_torchrun_of_this_python_where_there_are_gpus(job, started, scenes, tmp_path, monkeypatch):
    settings = tiny(scenes, f"out={tmp_path}/o", "gpus=2")
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    code, out, err = job(*settings)
    assert (code, out) == (2, "")
    assert re.match(r"SAYO-L21: no GPU .*DRY_RUN=1.*bash scripts/run_faithful_anchor_tiny\.sh", err)
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(run.shutil, "which", lambda name: name)
    assert job(*settings)[0] == 0
    assert [words[1:5] for words in started.lines] == [
        *[["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]] * 2,
        ["-m", "sayo_verl.focus", "report", "--base"],
    ]


def test_a_missing_file_of_rows_is_refused_before_the_first_step(job, started, tmp_path):
    code, _, err = job(
        "train_files=a.parquet", "val_file=b.parquet", f"out={tmp_path}/o", file="configs/focus/tiny.yaml"
    )
    assert code == 2
    assert re.match("SAYO-F20: .* got a.parquet", err)
    assert not started.lines
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("base", "told"),
    [("./absent", "L17: there is no model at this path"), ("owner/absent", "L53: the hub cannot be reached")],
)
def test_a_missing_model_is_refused_before_the_first_step(job, started, scenes, tmp_path, base, told):
    code, _, err = job(f"data={scenes}", f"base={base}", f"out={tmp_path}/o", file="configs/focus/tiny.yaml")
    assert code == 2
    assert re.match(rf"SAYO-{told}.* \| at base \| got {base}", err)
    assert not started.lines
    assert not (tmp_path / "o").exists()


def test_a_file_that_is_not_parquet_is_refused(job, tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_text("rows")
    assert job(f"train_files={file}", "val_file=v", "--dry-run")[2].startswith("SAYO-D02")
