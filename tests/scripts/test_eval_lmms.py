"""scripts/eval_lmms.sh: what it plans, refuses, runs and reports. The harness, its environment and verl are fakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.refusals import refusal

from sayo_verl.evaluation import run as evaluation
from sayo_verl.evaluation.model import find_model
from sayo_verl.evaluation.plan import Plan, make_plan
from sayo_verl.evaluation.sets import read_set

KNOWN = ["mmstar_reasoning", "chartqa", "sayo_rows", "ai2d"]
# Stands in for the Python of the harness's environment: lists tasks, or writes a result as lmms-eval does.
FAKE_HARNESS = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
if sys.argv[1] == "-c":
    print("a warning\\nNAMES" + json.dumps({{"known": {KNOWN}, "sets": dict.fromkeys(sys.argv[4:], "owner/name")}}))
    raise SystemExit
given = dict(zip(sys.argv[4::2], sys.argv[5::2]))
Path(os.environ["CALLS"]).open("a").write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("FAKE") == "fails":
    sys.exit("CUDA out of memory")
scores = json.loads(os.environ.get("SCORES", "{{}}"))
seed = int(sys.argv[sys.argv.index("--seed") + 1])
tasks = sys.argv[sys.argv.index("--tasks") + 1].split(",")
folder = Path(sys.argv[sys.argv.index("--output_path") + 1], "some__model")
if os.environ.get("FAKE") != "silent":
    folder.mkdir(parents=True)
    (folder / "20260101_000000_results.json").write_text(json.dumps({{
        "results": {{t: {{"alias": t, "accuracy,none": 0.5 + seed / 4, "accuracy_stderr,none": 0.1, "format,none": 1.0}}
                    for t in tasks}} | scores,
        "n-samples": {{t: {{"original": 9, "effective": 8}} for t in tasks}},
    }}))
"""


def folder_of(path: Path, **files: object) -> Path:
    """A folder with JSON files, ``__`` in a name for the dot."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"image_processor": {"size": {"shortest_edge": 1024, "longest_edge": 65536}}}
    return folder_of(tmp_path / "model", config__json={"model_type": "qwen3_vl"}, processor_config__json=sizes)


@pytest.fixture
def checkpoint(tmp_path: Path, model: Path) -> Path:
    """A checkpoint of two ranks, as verl writes it."""
    actor = folder_of(tmp_path / "global_step_7" / "actor", fsdp_config__json={"world_size": 2})
    for rank in range(2):
        (actor / f"model_world_size_2_rank_{rank}.pt").touch()
    model.rename(actor / "huggingface")
    return actor


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "val-00000.parquet").touch()
    return tmp_path / "val-00000.parquet"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


def planned(*argv: object, **environment: str) -> Plan:
    return make_plan([str(a) for a in argv], environment)


def script(*argv: object, tmp_path: Path, **environment: str) -> tuple[int, str]:
    """The script for real, with a ready environment whose Python is the fake."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "python").write_text(FAKE_HARNESS)
    (venv / "bin" / "python").chmod(0o755)
    (venv / ".sayo-eval").write_text(evaluation.key_of("cpu"))
    variables = {"SAYO_EVAL_VENV": str(venv), "CALLS": str(tmp_path / "calls"), "HF_HOME": str(tmp_path)}
    path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    command = [
        "bash",
        str(evaluation.ROOT / "scripts" / "eval_lmms.sh"),
        *map(str, argv),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        env={"PATH": path, "HOME": str(tmp_path), **variables, **environment},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def calls(tmp_path: Path) -> list[list[str]]:
    file = tmp_path / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ------------------------------------------------------------------------------------------------ plan


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path, checkpoint):
    status, output = script("global_step_7", "sayo", "--no-judged", tmp_path=tmp_path, DRY_RUN="1")
    assert status == 0, output
    for part in (
        f"merge: python3 -m verl.model_merger merge --backend fsdp --local_dir {checkpoint} --target_dir",
        "mmstar_reasoning acc_score (reasoning, judged by a rule)",
        "left out: lmms-eval 0.7.3 has no M3CoT",
        "attn_implementation=sdpa,min_pixels=1024,max_pixels=65536",
        "--gen_kwargs temperature=0,do_sample=False",
        "CharXiv, reasoning questions left out: needs an LLM judge",
    ):
        assert part in output
    assert calls(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_gpus_get_vllm_with_one_kernel_and_a_seed_for_each_sample(model, monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plan = planned("Qwen/Qwen3-VL-8B-Instruct", "mmstar", "--sampled", 3, "--gpus", 2)
    assert [command[command.index("--gen_kwargs") + 1] for command in map(plan.harness, range(3))] == [
        f"temperature=1.0,top_p=1.0,do_sample=True,seed={seed}" for seed in range(3)
    ]
    assert "model=Qwen/Qwen3-VL-8B-Instruct,tensor_parallel_size=2,dtype=bfloat16,attention_backend=FLASH_ATTN" in (
        plan.harness()
    )
    with refusal("E08", "vLLM has no such attention kernel"):
        planned(model, "mmstar", "--attention", "sdpa")
    assert "attn_implementation=sdpa" in " ".join(
        planned(model, "mmstar", "--attention", "sdpa", "--model-class", "qwen3_vl").harness()
    )


@pytest.mark.parametrize("prompt", ["reasoning", "direct"])
@pytest.mark.parametrize("name", ["sayo", "vgpo", "scenes"])
def test_every_benchmark_of_a_set_has_a_task_or_a_reason(name, prompt):
    found = read_set(name, prompt=prompt, judged=True)
    for benchmark in found.benchmarks:
        assert bool(benchmark.tasks) != bool(benchmark.left_out), benchmark
        assert len(benchmark.numbers) == len(found.columns) or not benchmark.numbers
        assert not benchmark.tasks or (benchmark.metric and benchmark.scale in (1, 100))
    assert not any(b.judge for b in read_set(name, prompt=prompt, judged=False).benchmarks if not b.left_out)


# ------------------------------------------------------------------------------------------------ refusals


def test_models_that_are_not_there_or_not_complete(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("Qwen/Qwen3-VL-8B-Instruct").source is None
    assert find_model(str(checkpoint.parent)).shards == checkpoint
    for name in ("global_step_7/absent", "/absent", "absent"):
        with refusal("E01", "no such folder"):
            find_model(name)
    with refusal("E01", "neither a config.json nor the shards"):
        find_model(str(folder_of(tmp_path / "empty")))
    (checkpoint / "model_world_size_2_rank_1.pt").unlink()
    with refusal("E02", "missing: model_world_size_2_rank_1.pt"):
        find_model(str(checkpoint))
    (checkpoint / "fsdp_config.json").write_text("{")
    with refusal("E02", "not valid JSON"):
        find_model(str(checkpoint))


@pytest.mark.parametrize("file", ["lora_train_meta.json", "adapter_config.json", "lora_adapter/adapter_config.json"])
def test_an_adapter_that_is_not_merged_is_refused(model, file):
    folder_of((model / file).parent, **{Path(file).name.replace(".", "__"): {}})
    with refusal("E03", "merge the adapter into the model with peft"):
        find_model(str(model))


def test_options_that_do_not_fit(model, rows, no_gpu, tmp_path):
    with refusal("E04", "did you mean 'sayo'"):
        planned(model, "sayoo")
    with refusal("E06", "nvidia-smi lists none"):
        planned(model, "mmstar", "--model-class", "vllm")
    with refusal("E07", "a name of the hub"):
        planned("Qwen/Qwen3-VL-8B-Instruct", "mmstar")
    with refusal("E07", "model_type kimi_vl"):
        planned(folder_of(tmp_path / "kimi", config__json={"model_type": "kimi_vl"}), "mmstar")
    with refusal("E08", "FlashAttention needs a GPU"):
        planned(model, "mmstar", "--attention", "flash_attention_2")
    for argv in (["scenes"], ["mmstar", "--data", rows]):
        with refusal("E08", "belong together"):
            planned(model, *argv)
    with refusal("E08", "no such parquet file"):
        planned(model, "scenes", "--data", tmp_path / "absent.parquet")
    for argv in (["--sampled", -1], ["--limit", 0], ["--max-new-tokens", 0], ["--gpus", 0], ["--temperature", 0]):
        with refusal("E08", "a number is out of range"):
            planned(model, "mmstar", *argv)
    with refusal("E11", "not set: OPENAI_BASE_URL, MODEL_VERSION"):
        planned(model, "sayo", OPENAI_API_KEY="key")
    with refusal("E11", "MathVerse-V"):
        planned(model, "vgpo")


# ------------------------------------------------------------------------------------------------ runs


def test_rows_go_through_the_harness_and_samples_are_averaged(tmp_path, model, rows):
    status, output = script(model, "scenes", "--data", rows.parent, "--sampled", 2, tmp_path=tmp_path)
    assert status == 0, output
    assert "rows of --data  62.50       8" in output
    assert [call[call.index("--seed") + 1] for call in calls(tmp_path)] == ["0", "1"]
    out = tmp_path / "out"
    assert f'test: ["{rows}"]' in (out / "tasks" / "sayo_rows.yaml").read_text()
    result = json.loads((out / "results.json").read_text())
    (row,) = result["benchmarks"]
    assert row["score"] == 62.5
    assert row["samples"] == [[0.5], [0.75]]
    assert result["facts"]["attention kernel"] == "sdpa"
    assert result["facts"]["sampling"] == "avg@2, temperature 1.0"
    page = (out / "results.md").read_text()
    assert "| rows of --data | 62.50 | 8 | sayo_rows | accuracy | direct |" in page
    assert "| harness | lmms-eval==0.7.3, class qwen3_vl, on cpu |" in page


def test_scores_stand_beside_the_papers_numbers(tmp_path, model, monkeypatch, capsys):
    found = read_set("sayo", prompt="reasoning", judged=False)
    results = {b.tasks[0]: {f"{b.metric},none": 50 / b.scale} for b in found.benchmarks if b.tasks}
    folder = folder_of(tmp_path / "harness" / "0")
    content = {"results": results, "n-samples": {task: {"effective": 3} for task in results}}
    (folder / "1_results.json").write_text(json.dumps(content))
    evaluation.report(found, {}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("AI2D")] == [
        ["AI2D", "50.00", "3", "75.16", "80.51", "75.55", "83.06", "73.22", "76.88"]
    ]
    assert any(line.split()[:4] == ["M3CoT", "left", "out", "-"] for line in lines)
    del content["results"]["ai2d_reasoning"]
    (folder / "2_results.json").write_text(json.dumps(content))
    with refusal("E10", "no score for AI2D"):
        evaluation.report(found, {}, tmp_path)


def test_a_task_named_by_hand_shows_all_its_scores(tmp_path, model):
    status, output = script(model, "chartqa,ai2d", tmp_path=tmp_path)
    assert status == 0, output
    assert "chartqa accuracy (as the harness gives it)  0.50" in output
    assert "ai2d format (as the harness gives it)       1.00" in output


def test_a_name_that_the_harness_lacks_is_refused_before_a_model_is_loaded(tmp_path, model):
    status, output = script(model, "chartqa,ai2dd", tmp_path=tmp_path)
    assert status == 2
    assert "SAYO-E05" in output
    assert "did you mean 'ai2d'" in output
    assert calls(tmp_path) == []


def test_a_data_set_that_is_not_here_is_refused_while_the_hub_is_off(tmp_path, model):
    status, output = script(model, "chartqa", tmp_path=tmp_path, HF_HUB_OFFLINE="1")
    assert status == 2
    assert "SAYO-E12" in output
    assert calls(tmp_path) == []
    (tmp_path / "hub" / "datasets--owner--name").mkdir(parents=True)
    assert script(model, "chartqa", tmp_path=tmp_path, HF_HUB_OFFLINE="1")[0] == 0


@pytest.mark.parametrize(("fake", "code"), [("fails", "E09"), ("silent", "E10")])
def test_a_harness_that_fails_is_not_taken_for_a_result(tmp_path, model, fake, code):
    status, output = script(model, "chartqa", tmp_path=tmp_path, FAKE=fake)
    assert status == 2
    assert f"SAYO-{code}" in output
    assert ("CUDA out of memory" in output) == (fake == "fails")
    assert not (tmp_path / "out" / "results.md").exists()


def test_the_environment_is_built_with_pinned_versions_and_rebuilt_when_they_change(
    tmp_path, model, no_gpu, monkeypatch
):
    monkeypatch.setenv("SAYO_EVAL_VENV", str(tmp_path / "venv"))
    plan, ran = planned(model, "mmstar"), []
    monkeypatch.setattr(evaluation, "step", lambda plan, name, command: ran.append(command) or folder_of(plan.venv))
    monkeypatch.setattr(evaluation.sys, "version_info", (3, 11, 7))
    evaluation.build(plan)
    venv, torch, harness, fixups = ran
    assert venv[1:3] == ["-m", "venv"]
    assert next(part for part in torch if part.startswith("torch==")).endswith("+cpu")
    assert harness[-4:] == ["--constraint", str(evaluation.constraints("cpu")), "lmms-eval==0.7.3", "decord"]
    assert fixups[-1] == str(evaluation.FIXUPS)
    evaluation.build(plan)
    assert len(ran) == 4
    (plan.venv / ".sayo-eval").write_text("other versions")
    evaluation.build(plan)
    assert len(ran) == 8
    (plan.venv / ".sayo-eval").unlink()
    monkeypatch.setattr(evaluation.sys, "version_info", (3, 12, 0))
    with refusal("E09", "pinned for Python 3.11"):
        evaluation.build(plan)


def test_another_checkpoint_or_an_interrupted_merge_is_merged_again(tmp_path, checkpoint, no_gpu, monkeypatch):
    plan, merged = planned(checkpoint, "mmstar", "--out", tmp_path / "out"), []

    def step(plan, name, command, **environment):
        target = Path(command[command.index("--target_dir") + 1])
        folder_of(target, config__json={})
        if "interrupted" in merged:
            raise KeyboardInterrupt
        merged.append(command[command.index("--local_dir") + 1])

    monkeypatch.setattr(evaluation, "step", step)
    evaluation.merge(plan)
    evaluation.merge(plan)
    assert merged == [str(checkpoint)]
    other = shutil.copytree(checkpoint, tmp_path / "global_step_8" / "actor")
    plan = planned(other, "mmstar", "--out", tmp_path / "out")
    merged.append("interrupted")
    with pytest.raises(KeyboardInterrupt):
        evaluation.merge(plan)
    merged.remove("interrupted")
    evaluation.merge(plan)
    assert merged == [str(checkpoint), str(other)]
    (other / "model_world_size_2_rank_1.pt").write_text("trained further")
    evaluation.merge(plan)
    assert merged[2:] == [str(other)]
    assert not plan.merging.exists()
    folder_of(tmp_path / "mine" / "model")
    with refusal("E09", "not made by this script"):
        evaluation.merge(planned(checkpoint, "mmstar", "--out", tmp_path / "mine"))


def test_a_foreign_folder_is_not_made_an_environment(tmp_path, model):
    (tmp_path / "mine").mkdir()
    status, output = script(model, "chartqa", tmp_path=tmp_path, SAYO_EVAL_VENV=str(tmp_path / "mine"))
    assert status == 2
    assert "SAYO-E09: the folder was not made by this script" in output


def test_the_task_of_the_harness_scores_as_the_reward_does(monkeypatch):
    monkeypatch.syspath_prepend(str(evaluation.ROOT / "configs" / "eval" / "scenes"))
    import utils as task
    from support.inspected import row

    made = row(1, answer="red")
    assert [picture.size for picture in task.doc_to_visual(made)] == [(96, 64)]
    assert task.doc_to_text(made).startswith("What colour is number 1?")
    assert task.process_results(made, ["<think> a </think> <answer> red </answer>"]) == {"accuracy": 1.0, "format": 1.0}
    assert task.process_results(made, ["<answer> blue </answer>"]) == {"accuracy": 0.0, "format": 0.0}
