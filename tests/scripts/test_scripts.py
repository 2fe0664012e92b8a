"""The launch scripts as a user meets them on a machine without a GPU, and the command line."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.launching import launch
from support.public_shapes import write_config

from sayo_verl import __version__
from sayo_verl.cli import SOURCES, main
from sayo_verl.methods import RegionMethod

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.parametrize("script", sorted({path.name for path in SCRIPTS.glob("*.sh")} - {"lib.sh"}))
@pytest.mark.parametrize("arguments", [["--help"], ["trainer.test_freq=1", "-h"]], ids=str)
def test_help_prints_the_header_and_starts_nothing(repo, environment, tmp_path, script, arguments):
    for name in ("python3", "python3.11", "nvidia-smi", "sayo", "flock"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", os.path.relpath(SCRIPTS / script, tmp_path), *arguments]  # a relative name, from another folder
    done = subprocess.run(
        command,
        env={**environment, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    called = re.search(r"^exec bash .*/(\w+\.sh)", (SCRIPTS / script).read_text(), re.MULTILINE)
    while called:  # a wrapper shows the options of the script it calls
        script = called[1]
        called = re.search(r"^exec bash .*/(\w+\.sh)", (SCRIPTS / script).read_text(), re.MULTILINE)
    header = (SCRIPTS / script).read_text().partition("\nset -euo")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in header]
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_grpo_qwen3vl_8b.sh", "run_sayo_qwen3vl_4b_1gpu.sh"])
def test_gpu_job_without_a_gpu_stops_at_once_and_names_the_tiny_script(repo, environment, script):
    start = time.monotonic()
    done = launch(repo, script, environment)
    assert time.monotonic() - start < 10
    assert done.returncode == 1
    assert re.search(r"SAYO-L21: no GPU .*DRY_RUN=1.*bash scripts/run_sayo_tiny\.sh", done.stderr)


def test_dry_run_composes_checks_and_prints_the_papers_values(repo, environment, tmp_path):
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert "Disabled critic" not in done.stderr
    assert "Platform override" not in done.stderr
    for told in (
        "attn_region: " + ", ".join(f"{key} {value}" for key, value in vars(RegionMethod()).items()),
        "Qwen/Qwen3-VL-8B-Instruct",
        "24 prompts x 16, up to 110 tokens, temperature 1.0, top-p 0.9",
        "lr 5e-06, mini-batch 24 prompts, KL loss 0.001, LoRA rank 16",
        "{'format_weight': 1.0, 'accuracy_weight': 0.0}",
        "data/sayo/train-*.parquet - NOT THERE YET",
        "1 x 8 cuda",
        "nothing was started",
    ):
        assert told in done.stdout
    assert not (tmp_path / "out").exists(), "a dry run leaves nothing behind"


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_qwen2_5vl_7b.sh"])
def test_a_folder_of_rows_is_all_its_shards(repo, environment, tmp_path, script):
    for n, seed in enumerate("123"):
        assert (
            main(["prepare", "synthetic", "--out", str(tmp_path / seed), "--n-train=4", "--n-val=2", f"--seed={seed}"])
            == 0
        )
        (made,) = (tmp_path / seed).iterdir()
        (tmp_path / "data").mkdir(exist_ok=True)
        (made / "train.parquet").rename(tmp_path / "data" / f"train-{n:05d}.parquet")
        (made / "val.parquet").rename(tmp_path / "data" / f"val-{n:05d}.parquet")
    done = launch(repo, script, environment, DRY_RUN="1", DATA=str(tmp_path / "data"), TRAIN_BATCH_SIZE="12")
    assert done.returncode == 0, done.stderr
    for name in [
        f"{split}-{n:05d}.parquet: {rows} rows" for split, rows in (("train", 4), ("val", 2)) for n in range(3)
    ]:
        assert name in done.stdout
    assert "6 images of validation are not among" in done.stdout


@pytest.mark.parametrize(
    ("script", "model"), [("run_sayo_qwen3vl_8b.sh", "Qwen3-VL-8B"), ("run_qwen2_5vl_7b.sh", "Qwen2.5-VL-7B")]
)
def test_the_gpu_jobs_fit_a_card_and_serve_prompt_and_response(repo, environment, tmp_path, script, model):
    done = launch(repo, script, environment, DRY_RUN="1", MODEL_PATH=str(write_config(model, tmp_path)))
    assert done.returncode == 0, done.stderr
    assert f"sequences of {6500 + 110 if '8b' in script else 4096 + 2048} tokens at once" in done.stdout
    assert "TIGHT" not in done.stdout


def test_the_header_of_the_one_gpu_job_is_its_plan(repo, environment, tmp_path):
    done = launch(
        repo,
        "run_sayo_qwen3vl_4b_1gpu.sh",
        environment,
        DRY_RUN="1",
        MODEL_PATH=str(write_config("Qwen3-VL-4B", tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "1 x 1 cuda" in done.stdout
    plan = [line.split("memory per GPU")[1].strip() for line in done.stdout.splitlines() if "memory per GPU" in line]
    header = (repo / "scripts" / "run_sayo_qwen3vl_4b_1gpu.sh").read_text()
    for line in plan[1:-1]:
        phase, terms = line.split(": ")
        said = re.search(rf"^#   {phase}  +(.*)$", header, re.MULTILINE)
        assert said, phase
        told = re.findall(r"([A-Za-z][A-Za-z ]*) (\d+\.\d)", re.sub(r"\(.*?\)", "", said[1]).replace("  ", " "))
        assert len(told) >= 3
        assert [term for term in told if f"{term[0].strip()} {term[1]}" not in terms] == []
    assert plan[-1] == "KV cache for 42 sequences of 6610 tokens at once; 384 responses a card: 10 waves at most"
    assert "42 sequences of 6,610 tokens" in header


def test_paths_of_data_and_model_become_absolute(repo, environment, tmp_path):
    def made(value):
        code = f'ROOT=/r; source {repo}/scripts/lib.sh; absolute "$1"'
        done = subprocess.run(["bash", "-c", code, "_", value], capture_output=True, text=True, check=True, cwd=repo)
        return done.stdout

    for value, wanted in {
        "a.parquet": "/r/a.parquet",
        "/b/c.parquet": "/b/c.parquet",
        "": "",
        "hdfs://a/b": "hdfs://a/b",
        "~/x": "~/x",
        "with space/*.parquet": "/r/with space/*.parquet",
        "['q','/r']": "['q','/r']",
        "[scripts/*.sh, b/c.parquet,/d]": "[/r/scripts/*.sh,/r/b/c.parquet,/d]",
    }.items():
        assert made(value) == wanted
    write_config("Qwen3-VL-8B", tmp_path)
    relative = os.path.relpath(tmp_path, repo)
    done = launch(
        repo,
        "run_sayo_qwen3vl_8b.sh",
        environment,
        DRY_RUN="1",
        NNODES="2",
        MODEL_PATH=relative,
        TRAIN_FILE="[a.parquet,b.parquet]",
        VAL_FILE="c.parquet",
    )
    assert done.returncode == 0, done.stderr
    (seen,) = [line for line in done.stdout.splitlines() if line.strip().startswith("every node must see ")]
    for told in (f"{repo}/a.parquet", f"{repo}/b.parquet", f"{repo}/c.parquet", f"{repo}/{relative}", "/checkpoints"):
        assert told in seen
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, "data.val_files=c.parquet", DRY_RUN="1", NNODES="2")
    assert "SAYO-L59: " in done.stderr


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_vgpo_qwen2_5vl_7b.sh"])
def test_L55_several_nodes_without_a_cluster(faked, script):
    copy, env = faked
    done = launch(copy, script, env, NNODES="2")
    assert done.returncode == 2
    assert re.fullmatch(
        r"SAYO-L55: .* \| at NNODES \| got 2 \| fix: .*RAY_ADDRESS=auto NNODES=2 bash .*\n", done.stderr
    )
    assert "main_ppo" not in done.stdout
    assert "main_ppo" in launch(copy, script, env, NNODES="2", RAY_ADDRESS="auto").stdout
    assert "main_ppo" in launch(copy, script, env, "+ray_kwargs.ray_init.address=auto", NNODES="2").stdout


def saved(out, step, world):
    """The run folder of an earlier attempt with a checkpoint, as far as its files are looked at."""
    actor = out / "checkpoints" / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True)
    for name in [
        f"{state}_world_size_{world}_rank_{rank}.pt"
        for state in ("model", "optim", "extra_state")
        for rank in range(world)
    ]:
        (actor / name).write_bytes(b"saved")
    (actor.parent / "data.pt").write_bytes(b"saved")
    (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    (out / "metrics.jsonl").write_text('{"step": 1, "data": {}}\n')
    (out / "run.json").write_text("{}")
    return str(out)


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_qwen2_5vl_7b.sh"])
def test_resume_goes_on_in_the_folder_of_the_run_with_files_of_its_own(repo, environment, tmp_path, script):
    old = saved(tmp_path / "old run", 2, world=8)
    (tmp_path / "old run" / "run-2.json").write_text("{}")  # an attempt that logged no step
    done = launch(repo, script, environment, DRY_RUN="1", RESUME=old)
    assert done.returncode == 0, done.stderr
    assert f"global_step_2 of ?, from {old}/checkpoints\n" in done.stdout
    assert f"{old}/metrics-3.jsonl\n" in done.stdout
    done = launch(repo, script, environment, DRY_RUN="1", OUT=old)
    assert re.search(r"SAYO-L15: .* fix: .*RESUME=.*old run", done.stderr)


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_qwen2_5vl_7b.sh", "run_tiny.sh"])
def test_L44_nothing_to_resume(repo, environment, tmp_path, script):
    done = launch(repo, script, environment, DRY_RUN="1", RESUME=str(tmp_path / "old"))
    assert done.returncode == 2
    assert f"SAYO-L44: there is no checkpoint to resume | at {tmp_path}/old/checkpoints" in done.stderr


@pytest.fixture
def faked(repo, environment, tmp_path):
    """A copy of the scripts in which nothing is installed or trained: each command says what it was given."""
    for part in ("scripts", "configs"):
        shutil.copytree(repo / part, tmp_path / "copy" / part)
    (tmp_path / "bin").mkdir()
    told = 'echo "to resume after step 2: $SAYO_RESUME_COMMAND"; echo "metrics $VERL_FILE_LOGGER_PATH"'
    sayo = f"""case "$1" in
      prepare) echo made ;;
      watch) {{ {told}; }} >>"$2/train.log"; echo "$@"; exit "${{FAKE_STATUS:-0}}" ;;
      report) echo table ;;
    esac"""
    fakes = {
        "copy/scripts/setup_env.sh": f"[[ $1 != --where ]] || echo {tmp_path}",
        "bin/sayo": sayo,
        "bin/python3": f'[[ $1 != -m ]] || {{ echo "$@"; {told}; }}',
        "bin/nvidia-smi": "echo GPU 0",
    }
    for name, code in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "copy", {**environment, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("script", "settings"), [("run_grpo_tiny.sh", {"STEPS": "4"}), ("run_vgpo_qwen2_5vl_7b.sh", {"LR": "1e-6"})]
)
def test_the_printed_command_resumes_the_same_job(faked, tmp_path, script, settings):
    copy, env = faked
    old = saved(tmp_path / "old run", 2, world=1)
    (tmp_path / "old run" / "metrics.jsonl").unlink()
    first = launch(copy, script, env, "trainer.test_freq=7", "a='b c'", OUT=old, **settings)
    assert first.returncode == 0, first.stderr
    line = next(line for line in first.stdout.splitlines() if line.startswith("to resume after step 2: "))
    command = line.removeprefix("to resume after step 2: ")
    assert set(re.findall(r"(\w+)=", command.partition(" bash ")[0])) == {"RESUME", "METHOD", "NAME", *settings}
    clean = {key: value for key, value in env.items() if key != "OUT"}
    again = subprocess.run(["bash", "-c", command], env=clean, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    text = again.stdout + (tmp_path / "old run" / "train.log").read_text() if "tiny" in script else again.stdout
    assert f"metrics {old}/metrics-2.jsonl" in text
    assert f"hydra.run.dir={old}/hydra-2" in again.stdout
    assert f"trainer.default_local_dir={old}/checkpoints" in again.stdout
    assert "trainer.resume_mode=disable" not in again.stdout
    assert "trainer.test_freq=7 a='b c'" in again.stdout


@pytest.mark.parametrize(
    ("script", "settings"),
    [("run_tiny.sh", {"METHOD": "grpo", "LR": "1e-4", "SEED": "7"}), ("run_vgpo_qwen2_5vl_7b.sh", {"LR": "1e-6"})],
)
def test_the_printed_command_keeps_the_settings_of_a_script_started_from_another_folder(
    faked, tmp_path, script, settings
):
    copy, env = faked
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["bash", f"copy/scripts/{script}", "a=1"],
        env={**env, **settings},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "grep" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("to resume after step 2: ")]
    assert f" bash {copy}/scripts/run_" in line
    expected = settings if script == "run_tiny.sh" else {"METHOD": "dual", **settings}
    assert [name for name, value in expected.items() if f" {name}={value} " not in line] == [], line


def test_a_script_whose_settings_cannot_be_read_stops(faked):
    copy, env = faked
    (copy / "scripts" / "bare.sh").write_text(
        f"set -e\nROOT={copy}\nsource {copy}/scripts/lib.sh\nGIVEN=$(given_settings)\necho went on\n"
    )
    done = launch(copy, "bare.sh", env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot read the settings of" in done.stderr


@pytest.mark.parametrize("status", ["0", "3"])
def test_the_tiny_scripts_last_line_says_how_to_resume(faked, tmp_path, status):
    copy, env = faked
    out = tmp_path / "out"
    out.mkdir()
    done = launch(copy, "run_tiny.sh", env, FAKE_STATUS=status)
    assert done.returncode == int(status)
    assert done.stdout.splitlines()[-1] == (f"to resume after step 2: RESUME={out} bash {copy}/scripts/run_tiny.sh")
    assert ("table" in done.stdout) == (status == "0")
    for needed in ("save_contents=[model,optimizer,extra,hf_model]", "trainer.resume_mode=disable"):
        assert needed in done.stdout


def test_dry_run_refuses_a_misspelt_switch(repo, environment):
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, "algorithm.adv_estimator=attn_regoin", DRY_RUN="1")
    assert done.returncode != 0
    assert "SAYO-L01: unknown advantage estimator (did you mean 'attn_region'?)" in done.stderr


def test_the_baseline_differs_only_in_the_method(repo, environment):
    plans = [
        launch(repo, script, environment, DRY_RUN="1").stdout.splitlines()
        for script in ("run_sayo_qwen3vl_8b.sh", "run_grpo_qwen3vl_8b.sh")
    ]
    different = [a.split()[0] for a, b in zip(*plans, strict=True) if a != b]
    assert different == ["estimator", "method", "reward"], plans


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out
    prepared = [f"prepare {name}" for name in (*SOURCES, "mix", "synthetic", "policy")]
    for command in ("", "doctor", *prepared, "inspect", "watch", "report", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out


def test_prepare_synthetic_takes_sizes_and_reuses(tmp_path, capsys):
    command = [
        "prepare",
        "synthetic",
        "--out",
        str(tmp_path),
        "--n-train=6",
        "--n-val=3",
        "--image-size=128",
        "--grid=4",
    ]
    assert main(command) == 0
    first = capsys.readouterr()
    assert main(command) == 0
    second = capsys.readouterr()
    assert first.out == second.out
    assert "made" in first.err
    assert "reused" in second.err


def test_doctor_finds_this_installation_right():
    env = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "COLUMNS": "160"}
    done = subprocess.run(["sayo", "doctor"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"ok\W+plug-in in a Ray worker\W+{re.escape(__version__)}: attn_region", done.stdout)


def test_doctor_says_what_is_wrong(monkeypatch):
    from sayo_verl import doctor

    monkeypatch.setattr(doctor, "version", lambda name: "0.0.1")
    findings = doctor.check_versions("cpu")
    assert findings
    assert not any(f.right for f in findings if f.wanted != "any")
    assert all("pip install" in f.fix for f in findings)
    wrong = doctor.check_plugin("a Ray worker", {"version": "0.0.1", "estimators": ""})
    assert not wrong.right
    assert "same sayo-verl" in wrong.fix


def test_report_of_a_folder_without_metrics_is_a_clear_refusal(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert re.search(r"SAYO-R02: .* \| at .* \| .*fix: ", capsys.readouterr().err)
