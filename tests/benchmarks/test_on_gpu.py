"""The measurement on a card, rehearsed on the CPU: stages, their limits and ends, going on, what stands in for what."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REHEARSED = ("machine", "kernels", "engine-qwen3", "neighbours")


@pytest.fixture(autouse=True)
def parts(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))


@pytest.fixture
def on_gpu(parts):
    return importlib.import_module("on_gpu")


def call(repo: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "benchmarks" / "on_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- the whole command
@pytest.fixture(scope="module")
def rehearsal(repo, tmp_path_factory):
    out = tmp_path_factory.mktemp("on_gpu")
    done = call(repo, "--tiny", "--out", out, "--stages", *REHEARSED)
    logs = "".join(log.read_text()[-2000:] for log in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return out, done.stdout


def test_every_finding_of_a_rehearsal_is_right_and_says_what_stood_in(rehearsal):
    out, said = rehearsal
    lines = lines_of(out)
    findings = [line for line in lines if "finding" in line]
    assert {line["stage"] for line in findings} == set(REHEARSED)
    assert not [line for line in findings if "error" in line or line.get("wrong")]
    assert all(line["stood_in"]["tiny"] and line["card"] == "CPU rehearsal" for line in findings)
    by_name = {(line["stage"], line["finding"]): line for line in findings}
    passed = by_name["engine-qwen3", "pass: attn_region, last layer"]
    assert passed["stood_in"]["weights"] == "random"
    assert "flash-attn" in passed["stood_in"]
    assert passed["same_bits"] == {"log_probs": True, "entropy": True}
    assert passed["mass_error_against_float64"] < 1e-5
    assert passed["rows_compared"] == 3
    exact = by_name["kernels", "float64: tiny, torch.bfloat16"]
    assert set(exact["errors"]) == {"mass", "lse", "profile", "mass, lse given"}
    assert all(0 <= error < 1e-5 for error in exact["errors"].values())
    assert [line["status"] for line in lines if "status" in line] == ["done"] * len(REHEARSED)
    judged = [line for line in findings if "wrong" in line]
    assert len(said.splitlines()) == len(REHEARSED) + len(judged) + 2, "stages, verdicts, the report, what is next"
    assert said.splitlines()[-1] == "next: the same on a card; figures of a rehearsal have no meaning"
    assert "ok    kernels            float64: tiny, torch.bfloat16: errors " in said
    assert "WRONG" not in said


def test_figures_of_a_rehearsal_are_marked(rehearsal):
    out, _ = rehearsal
    figures = json.loads((out / "cuda.json").read_text())["figures"]
    assert len(figures) > 5
    assert all("tiny" in figure["stood_in"] for figure in figures.values())


def test_a_second_call_goes_on_and_begins_nothing_that_it_has_no_time_for(repo, rehearsal):
    out, _ = rehearsal
    before = len(lines_of(out))
    done = call(repo, "--tiny", "--out", out, "--limit", 5)
    assert done.returncode == 1
    for stage in REHEARSED:
        assert f"{stage}: done in an earlier call" in done.stdout
    new = lines_of(out)[before:]
    assert all(line["status"].startswith("not started") for line in new)
    assert "not done: passes-qwen3" in done.stdout


def test_without_a_card_it_says_so_and_leaves_nothing(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = call(repo, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "torch finds no GPU" in done.stderr
    assert "--tiny" in done.stderr
    assert not list(tmp_path.iterdir())


def test_verdicts_are_those_of_the_last_call_on_this_card(on_gpu, tmp_path):
    report = tmp_path / "report.jsonl"
    lines = [
        {"stage": "kernels", "finding": "exact", "card": "H100", "errors": {"mass": 0.25, "lse": 0.5}, "wrong": True},
        {"stage": "kernels", "finding": "exact", "card": "H200", "errors": {"mass": 9.0}, "wrong": True},
        {"stage": "kernels", "finding": "exact", "card": "H100", "errors": {"mass": 1e-6, "lse": 2e-6}, "wrong": False},
        {"stage": "kernels", "finding": "times", "card": "H100", "ms": 3.0},
        {
            "stage": "engine-qwen3",
            "finding": "pass",
            "card": "H100",
            "same_bits": {"a": True, "b": False},
            "wrong": True,
        },
        {"stage": "tests", "finding": "pytest", "card": "H100", "error": "RuntimeError: needs pytest"},
        {"stage": "focus", "finding": "steps", "card": "H100", "wrong": False},
    ]
    report.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert on_gpu.verdicts(report, "H100", ["kernels", "engine-qwen3", "tests"]) == [
        "ok    kernels            exact: errors 2e-06 at most",
        "WRONG engine-qwen3       pass: same_bits False",
        "WRONG tests              pytest: RuntimeError: needs pytest",
    ]


def test_only_training_a_model_of_the_hub_may_reach_the_hub(on_gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def offline(stage, *arguments):
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--train", *map(str, arguments)])
        return "HF_HUB_OFFLINE" in on_gpu.environment_of(on_gpu.parse(), stage)

    assert not offline("train", "--model", "Qwen/Qwen3-VL-4B-Instruct")
    assert offline("train", "--model", tmp_path)
    assert offline("train")
    assert offline("kernels", "--model", "Qwen/Qwen3-VL-4B-Instruct")


def test_without_pytest_the_stage_of_tests_says_what_to_install(tmp_path, monkeypatch):
    from gpu import project_tests
    from gpu.report import Stage

    monkeypatch.setattr(project_tests.importlib.util, "find_spec", lambda name: None)
    project_tests.run(Stage("tests", tmp_path, 60, True, "a card"))
    (line,) = lines_of(tmp_path)
    assert line["error"].endswith("the stage 'tests' needs pytest: pip install '.[gpu,dev]'")


def test_help_and_list_say_that_a_second_call_does_the_rest(repo):
    assert "some 850 s on an H100; a second call continues" in call(repo, "--help").stdout
    said = call(repo, "--list").stdout
    assert "only with --train" in said
    assert "start it again for the rest" in said


def test_help_and_list_fit_a_screen(repo):
    for flag in ("--help", "--list"):
        done = call(repo, flag)
        assert done.returncode == 0
        assert len(done.stdout.splitlines()) < 40


# ------------------------------------------------------------------------------------------------ a stage and its limit
def test_a_stage_over_its_limit_is_ended_with_what_it_started(on_gpu, tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start, log = time.monotonic(), tmp_path / "log"
    assert on_gpu.supervise([sys.executable, "-c", parent], log, 3, dict(os.environ)) == "over its limit"
    assert time.monotonic() - start < 20
    pid = int(log.read_text())
    while alive(pid) and time.monotonic() - start < 20:
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("status", "said"), [(0, "done"), (1, "failed"), (3, "stopped for lack of time"), (139, "failed")]
)
def test_how_a_stage_ended_is_read_from_its_exit_status(on_gpu, tmp_path, status, said):
    command = [sys.executable, "-c", f"import os; os._exit({status})"]
    assert on_gpu.supervise(command, tmp_path / "log", 30, dict(os.environ)) == said


def test_a_failing_stage_costs_itself_alone_and_is_run_again(on_gpu, tmp_path, monkeypatch, capsys):
    ends = {"machine": "raise SystemExit('no such card')", "kernels": "print('fine')"}
    ran = []

    def command(args, name, limit, card):
        ran.append(name)
        return [sys.executable, "-c", ends[name]]

    monkeypatch.setattr(on_gpu, "stage_command", command)
    monkeypatch.setattr(on_gpu, "STAGES", {name: on_gpu.STAGES[name] for name in ends})
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--tiny", "--out", str(tmp_path)])
    assert on_gpu.main() == 1
    assert "machine: " in (said := capsys.readouterr().out)
    assert "failed after" in said
    assert "done after" in said
    first, second = lines_of(tmp_path)
    assert (first["status"], second["status"]) == ("failed", "done")
    assert first["last_of_log"] == ["no such card"]
    ends["machine"] = ""
    assert on_gpu.main() == 0
    assert ran == ["machine", "kernels", "machine"]


def test_a_stage_done_on_another_card_is_not_done_here(on_gpu, tmp_path):
    report = tmp_path / "report.jsonl"
    ends = [("a", "done", "H100"), ("b", "done", "H100"), ("b", "failed", "H100"), ("c", "done", "H200")]
    report.write_text(
        "".join(json.dumps({"stage": s, "status": e, "card": c}) + "\n" for s, e, c in ends) + '{"stage": "d"'
    )
    assert on_gpu.finished(report, "H100") == {"a"}


# ---------------------------------------------------------------------------------------------------------- one finding
def test_an_error_costs_its_finding_alone_and_a_wrong_result_is_remembered(tmp_path):
    from gpu.report import NoTimeLeftError, Stage

    stage = Stage("kernels", tmp_path, 60, True, "a card")
    assert stage.run("broken", lambda: {}["absent"]) is None
    assert stage.run("wrong", lambda: {"wrong": True, "error_of": 2}) == {"wrong": True, "error_of": 2}
    assert stage.run("right", lambda a, b: {"sum": a + b}, 1, 2) == {"sum": 3}
    assert stage.wrong == ["broken", "wrong"]
    broken, wrong, right = lines_of(tmp_path)
    assert broken["error"] == "KeyError: 'absent'"
    assert wrong["wrong"] is True
    assert (right["sum"], right["card"], right["stage"]) == (3, "a card", "kernels")
    with pytest.raises(NoTimeLeftError):
        stage.run("late", dict, needs=61)


def test_a_stage_that_had_no_time_left_is_not_done(on_gpu, tmp_path, monkeypatch):
    import gpu.machine

    argv = ["on_gpu.py", "--tiny", "--run-stage", "machine", "--out", str(tmp_path), "--limit", "1"]
    monkeypatch.setattr(sys, "argv", argv)
    assert on_gpu.main() == on_gpu.STOPPED
    assert lines_of(tmp_path)[-1]["finding"] == "no time left"
    monkeypatch.setattr(gpu.machine, "_versions", lambda: {"wrong": True})
    monkeypatch.setattr(sys, "argv", [*argv[:-1], "60"])
    assert on_gpu.main() == 1


# ------------------------------------------------------------------------------------------------------------ stand-ins
@pytest.mark.parametrize("causal", [True, False])
def test_the_stand_in_for_flash_attn_is_attention_of_each_sequence(causal):
    from gpu.stand_ins import _dense, _packed

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    out, lse, _ = _packed(q, k, v, starts, starts, 7, 7, causal=causal, return_attn_probs=True)
    for a, b in ((0, 5), (5, 12)):
        part = [x[a:b].transpose(0, 1)[None].double() for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*part, is_causal=causal, enable_gqa=True)
        assert torch.allclose(out[a:b].double(), wanted[0].transpose(0, 1), atol=1e-6)
        logits = part[0][0] @ part[1][0].repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5
        if causal:
            logits = logits.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf"))
        assert torch.allclose(lse[:, a:b].double(), logits.logsumexp(-1), atol=1e-6)
    assert torch.equal(_packed(q, k, v, starts, starts, 7, 7, causal=causal), out)
    rows, lse_rows, _ = _dense(*(x.unflatten(0, (2, 6)) for x in (q, k, v)), causal=causal, return_attn_probs=True)
    even = torch.tensor([0, 6, 12], dtype=torch.int32)
    out, lse, _ = _packed(q, k, v, even, even, 6, 6, causal=causal, return_attn_probs=True)
    assert torch.equal(rows, out.unflatten(0, (2, 6)))
    assert torch.equal(lse_rows[1], lse[:, 6:])
    with pytest.raises(NotImplementedError):
        _packed(q, k, v, starts, starts, 7, 7, softcap=2.0)


def test_an_absent_package_can_be_imported_and_not_called(monkeypatch):
    from gpu.stand_ins import absent_packages

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    assert absent_packages("json", "no_such_package") == ["no_such_package"]
    package = importlib.import_module("no_such_package")
    part = importlib.import_module("no_such_package.util.part")

    @package.remote
    class Decorated(part.Base):
        def takes(self, ref: "package.Ref | None") -> None: ...

    assert Decorated.__mro__[1].__name__ == "Base"
    assert package.is_initialized() is False
    with pytest.raises(RuntimeError, match="not installed"):
        package.get_actor("name")
    for name in [name for name in sys.modules if name.startswith("no_such_package")]:
        del sys.modules[name]  # monkeypatch would put it back
