"""The launch scripts as a user meets them on a machine without a GPU, and the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from support.launching import launch, plan
from support.public_shapes import write_config, write_qwen3_5_9b
from support.saved import save

from sayo_verl import __version__
from sayo_verl.cli import main
from sayo_verl.methods import RegionMethod
from sayo_verl.prepare import SOURCES
from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.prepared import prepare_scenes

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


JOBS = sorted(path.name for path in SCRIPTS.glob("run_*.sh") if "anchor" not in path.name)


def header(script: str) -> list[str]:
    lines = (SCRIPTS / script).read_text().partition("\nset -euo")[0].splitlines()[1:]
    return [line.removeprefix("#").removeprefix(" ") for line in lines]


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
    shown, called = header(script), re.search(r'source "\$\(.*\)/(\w+\.sh)"', (SCRIPTS / script).read_text())
    if called:  # a wrapper shows the options of the script it calls
        shown += ["", *header(called[1])]
    assert done.stdout.splitlines() == shown
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_help_fits_80_columns_and_that_of_the_launchers_one_screen(script):
    lines = header(script)
    assert [line for line in lines if len(line) > 80] == []
    assert len(lines) <= (24 if script in ("run.sh", "run_tiny.sh", "anchor.sh") else 40)


def test_gpu_job_without_a_gpu_stops_and_names_the_tiny_script(repo, environment):
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, DRY_RUN="0")
    assert done.returncode == 1
    assert re.search(r"SAYO-L21: no GPU .*DRY_RUN=1.*bash scripts/run_sayo_tiny\.sh", done.stderr)
    assert not Path(environment["OUT"]).exists(), "nothing is written before the checks have passed"


def test_dry_run_composes_checks_and_prints_the_papers_values(repo, environment, tmp_path):
    done = launch(repo, "run_sayo_qwen3vl_8b.sh", environment, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert "Disabled critic" not in done.stderr
    assert "Platform override" not in done.stderr
    for told in (
        "attn_region: " + ", ".join(f"{key} {value}" for key, value in vars(RegionMethod()).items()),
        "Qwen/Qwen3-VL-8B-Instruct",
        "24 prompts x 16, up to 110 tokens, temperature 1.0, top-p 0.9",
        "lr 5e-06, mini-batch 24 prompts, LoRA rank 16",
        "KL loss 0.001",
        "{'format_weight': 1.0, 'accuracy_weight': 0.0}",
        "data/sayo/train-*.parquet - NOT THERE YET",
        "1 x 8 cuda",
        "passes the checks; still missing: train data, val data; nothing was started",
    ):
        assert told in done.stdout
    assert not (tmp_path / "out").exists(), "a dry run leaves nothing behind"


def test_a_folder_of_drawn_scenes_is_a_jobs_data(repo, environment, tmp_path):
    assert main(["prepare", "synthetic", "--out", str(tmp_path / "made"), "--n-train=12", "--n-val=2"]) == 0
    (made,) = (tmp_path / "made").iterdir()
    batch = ["data.train_batch_size=12", "actor_rollout_ref.actor.ppo_mini_batch_size=12"]
    done = plan(repo, "run_qwen2_5vl_7b.sh", environment, *batch, DATA=str(made))
    assert done.returncode == 0, done.stderr
    assert f"{made}/train-00000.parquet: 12 rows" in done.stdout
    assert f"{made}/val-00000.parquet: 2 rows" in done.stdout
    assert "2 images of validation are not among" in done.stdout


@pytest.mark.parametrize(
    ("script", "model"), [("run_sayo_qwen3vl_8b.sh", "Qwen3-VL-8B"), ("run_qwen2_5vl_7b.sh", "Qwen2.5-VL-7B")]
)
def test_the_gpu_jobs_fit_a_card_and_serve_prompt_and_response(repo, environment, tmp_path, script, model):
    done = plan(repo, script, environment, MODEL_PATH=str(write_config(model, tmp_path)))
    assert done.returncode == 0, done.stderr
    assert f"sequences of {6500 + 110 if '8b' in script else 4096 + 2048} tokens at once" in done.stdout
    assert "TIGHT" not in done.stdout


def test_the_header_of_the_one_gpu_job_is_its_plan(repo, environment, tmp_path):
    done = plan(
        repo,
        "run_sayo_qwen3vl_4b_1gpu.sh",
        environment,
        MODEL_PATH=str(write_config("Qwen3-VL-4B", tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    assert "1 x 1 cuda" in done.stdout
    memory = [line.split("memory per GPU")[1].strip() for line in done.stdout.splitlines() if "memory per GPU" in line]
    header = (repo / "scripts" / "run_sayo_qwen3vl_4b_1gpu.sh").read_text()
    for line in memory[1:-1]:
        phase, terms = line.split(": ")
        said = re.search(rf"^#   {phase}  +(.*)$", header, re.MULTILINE)
        assert said, phase
        told = re.findall(r"([A-Za-z][A-Za-z ]*) (\d+\.\d)", re.sub(r"\(.*?\)", "", said[1]).replace("  ", " "))
        assert len(told) >= 3
        assert [term for term in told if f"{term[0].strip()} {term[1]}" not in terms] == []
    assert memory[-1] == "KV cache for 42 sequences of 6610 tokens at once; 384 responses a card: 10 waves at most"
    assert "42 sequences of 6,610 tokens" in header


def test_the_plan_of_qwen3_5_names_what_it_needs_and_guesses_no_memory(repo, environment, tmp_path):
    model = write_qwen3_5_9b(tmp_path)
    done = plan(repo, "run_qwen3_5_9b.sh", environment, MODEL_PATH=str(model))
    assert done.returncode == 0, done.stderr
    for line in (
        "(qwen3_5, probing layer index 31, the last of 32)",
        "packed rows need flash-linear-attention on the machine of the run: pip install",
        "not estimated: the text model has layers of linear_attention",
        "12 prompts x 32, up to 256 tokens, temperature 1.0, top-p 0.95",
    ):
        assert line in done.stdout
    linear = plan(repo, "run_qwen3_5_9b.sh", environment, "algorithm.attn.region.layers=[-1,0]", MODEL_PATH=str(model))
    assert linear.returncode == 1
    assert "SAYO-P11: layer 0 is not a full-attention layer" in linear.stderr
    assert "wanted one of [3, 7, 11, 15, 19, 23, 27, 31]" in linear.stderr


def test_every_node_must_see_the_paths_of_a_job(repo, environment, tmp_path):
    write_config("Qwen3-VL-8B", tmp_path)
    relative = os.path.relpath(tmp_path, repo)
    files = ["data.train_files=[a.parquet,b.parquet]", "data.val_files=c.parquet"]
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, *files, NNODES="2", MODEL_PATH=relative)
    assert done.returncode == 0, done.stderr
    (seen,) = [line for line in done.stdout.splitlines() if line.strip().startswith("every node must see ")]
    for told in (f"{repo}/a.parquet", f"{repo}/b.parquet", f"{repo}/c.parquet", f"{repo}/{relative}", "/checkpoints"):
        assert told in seen


def saved(out, step, world):
    """The run folder of an earlier attempt with a checkpoint, as far as its files are looked at."""
    save(out / "checkpoints", step, tracker=step, world=world)
    (out / "metrics.jsonl").write_text('{"step": 1, "data": {}}\n')
    (out / "run.json").write_text("{}")
    return str(out)


def test_resume_goes_on_in_the_folder_of_the_run_with_files_of_its_own(repo, environment, tmp_path):
    script = "run_sayo_qwen3vl_8b.sh"
    old = saved(tmp_path / "old run", 2, world=8)
    (tmp_path / "old run" / "run-2.json").write_text("{}")  # an attempt that logged no step
    done = plan(repo, script, environment, RESUME=old, OUT="")
    assert "SAYO-L95: this checkpoint has no fingerprint" in done.stderr
    done = plan(repo, script, environment, "sayo.resume_anyway=[fingerprint]", RESUME=old, OUT="")
    assert done.returncode == 0, done.stderr
    assert f"global_step_2 of ?, from {old}/checkpoints; not compared" in done.stdout
    assert f"{old}/metrics-3.jsonl\n" in done.stdout
    done = plan(repo, script, environment, OUT=old)
    assert re.search(r"SAYO-L15: .* got .*old run/metrics.jsonl.* fix: .*RESUME=", done.stderr)


@pytest.fixture
def faked(repo, environment, tmp_path):
    """A copy of the scripts in which nothing is installed or trained: each command says what it was given."""
    for part in ("scripts", "configs"):
        shutil.copytree(repo / part, tmp_path / "copy" / part)
    (tmp_path / "bin").mkdir()
    told = 'echo "to resume after step 2: $SAYO_RESUME_COMMAND"'
    sayo = """case "$1" in
      prepare) echo made ;;
      watch) out=$2; shift 3; "$@" | tee -a "$out/train.log"; exit "${FAKE_STATUS:-0}" ;;
      report) echo table ;;
    esac"""
    fakes = {
        "copy/scripts/setup_env.sh": f"[[ $1 != --where ]] || echo {tmp_path}",
        "bin/sayo": sayo,
        "bin/python": "",
        "bin/python3": f'[[ $1 != -m || $2 == sayo_verl.launch.names ]] || {{ echo "$@"; {told}; }}',
        "bin/nvidia-smi": "echo GPU 0",
    }
    for name, code in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path / "copy", {**environment, "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}


@pytest.mark.parametrize("script", [*JOBS, "run.sh"])
def test_variables_mean_the_same_in_every_script(faked, tmp_path, script):
    copy, env = faked
    given = {"METHOD": "dual_released", "MODEL_PATH": "m", "DATA": "d", "NNODES": "2", "NGPUS_PER_NODE": "3"}
    given |= {"JOB": "sayo_qwen3vl_8b"} if script == "run.sh" else {}
    (tmp_path / "out").mkdir()
    done = launch(copy, script, env, "trainer.save_freq=7", "a='b c'", **given)
    assert done.returncode == 0, done.stderr
    command = next(line for line in done.stdout.splitlines() if "main_ppo" in line)
    values = ["+method=dual_released", "actor_rollout_ref.model.path=m", "sayo.data=d", "trainer.nnodes=2"]
    values += ["trainer.n_gpus_per_node=3", f"sayo.out={tmp_path}/out"]
    assert [value for value in values if f" {value}" not in command] == []
    assert re.search(r"trainer.experiment_name=dual_released_(sayo_|qwen|tiny)", command)
    assert command.endswith(" trainer.save_freq=7 a='b c'"), "overrides win"
    dry = launch(copy, script, env, DRY_RUN="1", RESUME=f"{tmp_path}/old", OUT="", **given)
    for value in ("sayo.dry_run=True", f"sayo.resume={tmp_path}/old", "hydra/job_logging=none"):
        assert value in dry.stdout
    assert "sayo.out" not in dry.stdout


ANCHOR_JOBS = sorted(path.name for path in SCRIPTS.glob("run_*anchor*.sh"))


@pytest.mark.parametrize("script", [*ANCHOR_JOBS, "anchor.sh"])
def test_variables_mean_the_same_in_the_scripts_of_the_anchoring_stage(faked, tmp_path, script):
    copy, env = faked
    given = {"MODEL_PATH": "m [1]", "DATA": "d", "NGPUS_PER_NODE": "3"}
    given |= {"JOB": "tiny"} if script == "anchor.sh" else {}
    done = launch(copy, script, env, "train.steps=7", "train.layers=[1, 2]", **given)
    assert done.returncode == 0, done.stderr
    file = f"configs/focus/{'tiny' if 'tiny' in script or 'JOB' in given else 'qwen2_5vl_7b'}.yaml"
    command, resume = done.stdout.splitlines()
    assert command == (
        f"-m sayo_verl.focus run {file} base=m [1] data=d gpus=3 out={tmp_path}/out train.steps=7 train.layers=[1, 2]"
    )
    assert f" RESUME={tmp_path}/out " in resume
    assert " MODEL_PATH=m\\ \\[1\\] DATA=d NGPUS_PER_NODE=3 bash " in resume
    dry = launch(copy, script, env, DRY_RUN="1", RESUME=f"{tmp_path}/old", OUT="", **given)
    assert f"run --dry-run {file} base=" in dry.stdout
    assert f" resume={tmp_path}/old\n" in dry.stdout


def test_the_tiny_script_of_the_anchoring_stage_prepares_what_is_not_named(faked, tmp_path):
    copy, env = faked
    done = launch(copy, "run_faithful_anchor_tiny.sh", env)
    assert f"configs/focus/tiny.yaml base=made data=made out={tmp_path}/out\n" in done.stdout
    done = launch(copy, "run_faithful_anchor_tiny.sh", env, "train_files=a.parquet", "val_file=b.parquet")
    assert " data=" not in done.stdout
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\n[ "$5" = configs/focus/tiny.yaml ] || exit 9\nexit 2\n')
    (tmp_path / "bin" / "sayo").write_text(f"#!/bin/sh\ntouch {tmp_path}/prepared\n")
    assert launch(copy, "run_faithful_anchor_tiny.sh", env, "train.stepz=1").returncode == 2
    assert not (tmp_path / "prepared").exists(), "settings are checked before the policy takes its minutes"


def test_the_plan_of_the_anchoring_stage_needs_no_gpu(repo, environment, tmp_path):
    script = "run_faithful_anchor_qwen2_5vl_7b.sh"
    done = launch(repo, script, environment, DRY_RUN="1", DATA="data/a b", NGPUS_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    for told in ("--nproc_per_node=4", "--rows 'data/a b'/train-*.parquet", "NOT THERE YET", "nothing was started"):
        assert told in done.stdout
    assert not (tmp_path / "out").exists()
    done = launch(repo, script, environment, DRY_RUN="1", LORA_RANK="0")
    assert done.returncode == 2
    assert "SAYO-L67: the scripts do not read this variable | at LORA_RANK | got 0" in done.stderr
    assert "fix: use train.lora_rank=0 after the script" in done.stderr


@pytest.mark.parametrize("data", ["~/a b", "/tmp/it's", '/tmp/a"b\\', "/tmp/[1],{2}", "/tmp/\u00e9"])
def test_a_path_in_a_variable_reaches_the_launcher_as_it_is(repo, environment, data):
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, DATA=data, OUT="~/new run")
    assert done.returncode == 0, done.stderr
    assert f"{os.path.expanduser(data)}/train-*.parquet - NOT THERE YET" in done.stdout
    assert f"{os.path.expanduser('~')}/new run/checkpoints" in done.stdout


def test_each_script_has_a_method_of_its_own(faked):
    copy, env = faked
    (Path(env["OUT"])).mkdir()
    methods = {}
    for script in JOBS:
        done = launch(copy, script, env)
        (methods[script],) = re.findall(r"\+method=(\w+)", done.stdout)
        assert f"trainer.experiment_name={script[4:-3]} " in done.stdout or script[:-3] in (
            "run_qwen2_5vl_7b",
            "run_qwen3_5_9b",
            "run_tiny",
        )
    assert methods == {
        "run_atrl_qwen2_5vl_7b.sh": "anchor",
        "run_dapo_qwen2_5vl_7b.sh": "dapo",
        "run_evidence_qwen3_5_9b.sh": "evidence",
        "run_faithful_qwen2_5vl_7b.sh": "faithful",
        "run_grpo_qwen2_5vl_7b.sh": "grpo",
        "run_grpo_qwen3vl_8b.sh": "grpo",
        "run_grpo_tiny.sh": "grpo",
        "run_qwen2_5vl_7b.sh": "dual",
        "run_qwen3_5_9b.sh": "region",
        "run_sayo_internvl3_5_8b.sh": "region",
        "run_sayo_qwen3vl_4b.sh": "region",
        "run_sayo_qwen3vl_4b_1gpu.sh": "region",
        "run_sayo_qwen3vl_8b.sh": "region",
        "run_sayo_tiny.sh": "region",
        "run_tiny.sh": "region",
        "run_vgpo_qwen2_5vl_7b.sh": "dual",
        "run_vppo_qwen2_5vl_7b.sh": "sensitivity",
    }


SETTINGS = [
    ("run_grpo_tiny.sh", {}),
    ("run_tiny.sh", {"METHOD": "grpo", "MODEL_PATH": "a b"}),
    ("run_vgpo_qwen2_5vl_7b.sh", {"METHOD": "dual_released", "NGPUS_PER_NODE": "4"}),
    ("run.sh", {"JOB": "qwen2_5vl_7b", "METHOD": "anchor"}),
    ("run.sh", {"JOB": "tiny", "METHOD": "grpo", "VERL_PLATFORM": "cpu"}),
    ("anchor.sh", {"JOB": "tiny", "DATA": "d"}),
]


@pytest.mark.parametrize(("script", "settings"), SETTINGS)
def test_the_printed_command_resumes_the_same_job_from_any_folder(faked, tmp_path, script, settings):
    copy, env = faked
    (tmp_path / "out").mkdir()
    first = subprocess.run(
        ["bash", f"copy/scripts/{script}", "trainer.test_freq=7", "a='b c'"],
        env={**env, **settings},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert first.returncode == 0, first.stderr
    line = next(line for line in first.stdout.splitlines() if line.startswith("to resume after step 2: "))
    command = line.removeprefix("to resume after step 2: ")
    assert f" bash {copy}/scripts/{script} trainer.test_freq=7 " in command
    assert set(re.findall(r"(\w+)=", command.partition(" bash ")[0])) == {"RESUME", *settings}
    clean = {key: value for key, value in env.items() if key != "OUT"}
    again = subprocess.run(["bash", "-c", command], env=clean, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    before, after = (
        next(line for line in done.stdout.splitlines() if "-m sayo_verl" in line).split() for done in (first, again)
    )
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    key = "" if script == "anchor.sh" else "sayo."
    assert changed == [(f"{key}out={tmp_path}/out", f"{key}resume={tmp_path}/out")]


@pytest.mark.parametrize("script", ["run_sayo_qwen3vl_8b.sh", "run_tiny.sh"])
@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({"METHOD": "daul"}, "L30: there is no method of this name (did you mean 'dual'?)"),
        ({"STEPS": "3"}, "L67: the scripts do not read this variable | at STEPS"),
        ({"RESUME": "/nothere", "OUT": ""}, "L44: there is no checkpoint to resume | at /nothere/checkpoints"),
        ({"DATA": "/nothere"}, "D56: there is no prepared folder | at /nothere"),
    ],
)
def test_a_mistake_in_a_variable_is_refused_before_an_environment_is_built(repo, faked, script, variables, code):
    copy, env = faked
    shutil.copytree(repo / "sayo_verl", copy / "sayo_verl", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "scripts" / "setup_env.sh").write_text("echo BUILT >&2\n")
    python = Path(env["PATH"].partition(":")[0]) / "python3"  # has neither verl nor sayo-verl installed
    python.write_text(f'#!/bin/sh\ncase "$2" in *find_spec*) exit 1 ;; esac\nexec {sys.executable} "$@"\n')
    done = launch(copy, script, env, **variables)
    assert f"SAYO-{code}" in done.stderr
    assert done.returncode == 1
    assert "BUILT" not in done.stderr
    assert "BUILT" in launch(copy, script, env).stderr


@pytest.mark.parametrize("status", ["0", "3"])
def test_the_tiny_scripts_last_line_says_how_to_resume(faked, tmp_path, status):
    copy, env = faked
    out = tmp_path / "out"
    out.mkdir()
    done = launch(copy, "run_sayo_tiny.sh", env, FAKE_STATUS=status)
    assert done.returncode == int(status)
    assert done.stdout.splitlines()[-1] == f"to resume after step 2: RESUME={out} bash {copy}/scripts/run_sayo_tiny.sh"
    assert ("table" in done.stdout) == (status == "0")
    assert "+job=tiny +method=region" in done.stdout
    assert "actor_rollout_ref.model.path=made sayo.data=made" in done.stdout


@pytest.mark.parametrize(("status", "expected"), [("137", "to resume after step 4: RESUME="), ("1", "made")])
def test_the_tiny_script_says_how_to_resume_after_a_kill_that_the_launcher_did_not_see(
    faked, tmp_path, status, expected
):
    """The line of an earlier attempt is not repeated, and a refusal is not followed by the command that was refused."""
    copy, env = faked
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    (out / "train.log").write_text("to resume after step 2: an old command\n")
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\necho made\n")
    done = launch(copy, "run_sayo_tiny.sh", {**env, "OUT": str(out)}, FAKE_STATUS=status)
    assert done.returncode == int(status)
    assert done.stdout.splitlines()[-1].startswith(expected)


def test_the_tiny_script_takes_files_of_its_own_and_stops_where_nothing_could_be_prepared(faked, tmp_path):
    copy, env = faked
    (tmp_path / "out").mkdir()
    done = launch(copy, "run_tiny.sh", env, "data.train_files=a.parquet", "data.val_files=b.parquet")
    assert done.returncode == 0, done.stderr
    assert "sayo.data" not in done.stdout
    (tmp_path / "bin" / "sayo").write_text('#!/usr/bin/env bash\n[[ "$1" != prepare ]]\n')
    assert launch(copy, "run_tiny.sh", env).returncode == 1


def test_the_variable_METHOD_is_what_the_job_of_a_paper_trains(repo, environment):
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, METHOD="dual")
    assert done.returncode == 0, done.stderr
    assert re.search(r"estimator +attn_dual\n", done.stdout)
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, "algorithm.adv_estimator=rloo", METHOD="dual")
    assert re.search(r"estimator +rloo ", done.stdout), "the override at the end wins"


def test_a_variable_of_an_earlier_version_is_refused(repo, environment):
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, ADV_ESTIMATOR="grpo")
    assert done.returncode == 1
    assert "SAYO-L67: the scripts do not read this variable | at ADV_ESTIMATOR | got grpo" in done.stderr


def test_dry_run_refuses_a_misspelt_switch(repo, environment):
    done = plan(repo, "run_sayo_qwen3vl_8b.sh", environment, "algorithm.adv_estimator=attn_regoin")
    assert done.returncode != 0
    assert "SAYO-L01: unknown advantage estimator (did you mean 'attn_region'?)" in done.stderr


def test_the_baseline_differs_only_in_the_method(repo, environment):
    plans = [
        plan(repo, script, environment).stdout.splitlines()
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
    from sayo_verl.doctor import packages as doctor

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


@pytest.mark.parametrize(
    ("method", "every", "runner", "mode", "engine"),
    [
        ("grpo", 0, "TaskRunnerV1", "sync", None),
        ("grpo", 10, "SayoTaskRunner", "sayo_sync", "sayo_verl.hooks.engine"),
        ("region", 0, "SayoTaskRunner", "sayo_sync", "sayo_verl.hooks.engine"),
    ],
)
def test_grpo_starts_verls_own_code_and_a_method_or_a_recording_ours(
    repo, environment, random_policy, tmp_path, monkeypatch, method, every, runner, mode, engine
):
    monkeypatch.setattr("verl.trainer.main_ppo.run_ppo", start := mock.Mock())
    monkeypatch.setattr("atexit.register", mock.Mock())
    given = {"JOB": "tiny", "METHOD": method, "MODEL_PATH": str(random_policy), "VERL_PLATFORM": "cpu"}
    scenes = prepare_scenes(tmp_path / "scenes", SceneConfig(n_train=16, n_val=4)).path
    done = plan(repo, "run.sh", environment, f"sayo.viz_every={every}", **given, DATA=str(scenes), DRY_RUN="0")
    assert done.returncode == 0, done.stderr
    ((config,), keywords) = start.call_args
    assert keywords["task_runner_class"]._cls.__ray_metadata__.modified_class.__name__ == runner
    assert (config.trainer.v1.trainer_mode, config.actor_rollout_ref.model.external_lib) == (mode, engine)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["estimator"] == config.algorithm.adv_estimator


NO_SUCH_VERSION = "[[ $* != *install* ]] || { echo no such version; exit 1; }; echo /base"


@pytest.mark.parametrize(
    ("arguments", "python", "refused"),
    [
        ([], "echo /base", "X07: wrong arguments"),
        (["0.9.0", "--write"], "echo /base", "X07: wrong arguments"),
        (["0.9.0"], "exit 1", "X07: python has no verl .* fix: source .venv/bin/activate"),
        (["main"], "echo /base", "X08: verl's main branch is not reachable .* fix: name a clone instead"),
        (["0.0.7"], NO_SUCH_VERSION, "X08: pip did not install verl==0.0.7 .* lines of that file: no such version"),
    ],
    ids=["none", "another option", "no verl", "no network", "no such version"],
)
def test_the_contract_script_says_what_stops_it(faked, tmp_path, arguments, python, refused):
    copy, env = faked
    fakes = {"python": python.replace("/base", str(tmp_path)), "git": "exit 128"}
    for name, code in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    installed = copy / ".contract" / "0.0.7" / "bin"
    installed.mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "python", installed / "python")
    command = ["bash", str(copy / "scripts" / "contract.sh"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.search(f"SAYO-{refused}", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("clone", "clone"),
        ("clone/sub/..", "clone"),
        ("link", "clone"),
        ("..", "not a clone"),
        (".", "not a clone"),
        ("/", "not a clone"),
        ("copy", "not a clone"),
        ("no/folder", "no folder and no version"),
        ("", "no folder and no version"),
    ],
)
def test_the_contract_script_empties_only_its_folder_of_a_clone(faked, tmp_path, folder, name):
    copy, env = faked
    caller = tmp_path / "caller"
    (caller / "clone" / "sub").mkdir(parents=True)
    (caller / "link").symlink_to("clone")
    (caller / "clone" / "pyproject.toml").write_text('[project]\nname = "verl"\n')
    (caller / "copy").mkdir()
    (caller / "copy" / "pyproject.toml").write_text('[project]\nname = "sayo-verl"\n')
    code = f'printf "%s|" "$@" >>{tmp_path}/called; [[ $* != *install* ]] || exit 1; echo {tmp_path}'
    installed = copy / ".contract" / "clone" / "bin"
    installed.mkdir(parents=True)
    for python in (tmp_path / "bin" / "python", installed / "python"):
        python.write_text(f"#!/usr/bin/env bash\n{code}\n")
        python.chmod(0o755)
    command = ["bash", str(copy / "scripts" / "contract.sh"), folder]
    done = subprocess.run(command, env=env, cwd=caller, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    if name == "clone":
        called = (tmp_path / "called").read_text()
        assert f"--clear|{copy}/.contract/clone|" in called
        assert f"--no-compile|{caller}/clone|" in called
    else:
        assert re.search(f"SAYO-X07: .*{name}", done.stderr), done.stderr
        assert not (tmp_path / "called").exists()
