"""The launch scripts as a user meets them on a machine without a GPU, and the command line."""

import os
import re
import subprocess
import sys
import time

import pytest

from sayo_verl import __version__
from sayo_verl.cli import SOURCES, main


@pytest.fixture
def environment(tmp_path):
    """The running interpreter's commands first; a machine whose nvidia-smi is absent."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "VERL_FILE_LOGGER_PATH", "VERL_PLATFORM")}
    return {**clean, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin", "OUT": str(tmp_path / "out")}


def launch(repo, script, environment, *overrides, **variables):
    return subprocess.run(
        ["bash", str(repo / "scripts" / script), *overrides], env={**environment, **variables}, capture_output=True,
        text=True, check=False, cwd=repo,
    )  # fmt: skip


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_grpo_qwen3vl_8b.sh"])
def test_gpu_job_without_a_gpu_stops_at_once_and_names_the_tiny_script(repo, environment, script):
    start = time.monotonic()
    done = launch(repo, script, environment)
    assert time.monotonic() - start < 10
    assert done.returncode == 1
    assert re.search(r"SAYO-L21: no GPU .*DRY_RUN=1.*bash scripts/run_sayo_tiny\.sh", done.stderr)


def test_dry_run_composes_checks_and_prints_the_papers_values(repo, environment, tmp_path):
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    for told in (
        "attn_region: weight 1.0, entropy_fraction 0.3, layers (-1,)",
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


def test_dry_run_refuses_a_misspelt_switch(repo, environment):
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, "algorithm.adv_estimator=attn_regoin", DRY_RUN="1")
    assert done.returncode != 0
    assert "SAYO-L01: unknown advantage estimator (did you mean 'attn_region'?)" in done.stderr


def test_the_baseline_differs_only_in_the_method(repo, environment):
    plans = [launch(repo, script, environment, DRY_RUN="1").stdout.splitlines()
             for script in ("run_sayo_qwen3vl_8b.sh", "run_grpo_qwen3vl_8b.sh")]  # fmt: skip
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
