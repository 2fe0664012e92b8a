"""What `sayo doctor` finds on machines of other kinds: nvidia-smi, compiler and shared memory are stood in for."""

import json
import os
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.launch_config import composed
from support.saved import save
from triton.runtime import build

from sayo_verl import __version__
from sayo_verl.cli import build_parser, main
from sayo_verl.doctor import command, computer, packages, ray_child
from sayo_verl.doctor import job as job_module
from sayo_verl.doctor.finding import Finding
from sayo_verl.errors import SayoError
from sayo_verl.launch import machine
from sayo_verl.launch.attention_check import INSTALL_FLASH_ATTN
from sayo_verl.launch.preflight import preflight, show
from sayo_verl.methods import METHODS
from sayo_verl.probe import selfcheck


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """``nvidia_smi(*lines, status=0)``: what the command prints, on a PATH with nothing else but bash."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def install(*lines, status=0):
        file = tmp_path / "bin" / "nvidia-smi"
        text = "\n".join(lines)
        file.write_text(f"#!/bin/bash\n[[ \"$*\" == *--query-gpu=* ]] || exit 9\necho '{text}'\nexit {status}\n")
        file.chmod(0o755)

    return install


H100 = "NVIDIA H100 80GB HBM3, {}, 81559, 412, 0, GPU-1a2b"


def torch_of(monkeypatch, cuda, sees=False):
    monkeypatch.setattr(torch, "__version__", f"2.11.0+cu{cuda.replace('.', '')}" if cuda else "2.11.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)


@pytest.mark.parametrize(
    ("driver", "cuda", "oldest"), [("570.133.20", "13.0", 580), ("510.47.03", "12.8", 525), ("418.226", "11.8", 450)]
)
def test_a_driver_too_old_for_torchs_cuda_is_named(nvidia_smi, monkeypatch, driver, cuda, oldest):
    nvidia_smi(H100.format(driver), H100.format(driver))
    torch_of(monkeypatch, cuda)
    device, memory = computer.check_device("gpu")
    assert not device.right
    assert f"2 x NVIDIA H100 80GB HBM3, of which torch 2.11.0+cu{cuda.replace('.', '')} sees none" in device.found
    assert f"driver {driver} is too old for torch's CUDA {cuda}" in device.found
    assert device.wanted == f"driver {oldest} or newer"
    assert f"update the driver to {oldest}" in device.fix
    assert memory.found == "0: 79.6 GiB, 0.4 in use; 1: 79.6 GiB, 0.4 in use"


def test_cards_that_torch_does_not_see_although_the_driver_is_new_enough(nvidia_smi, monkeypatch):
    nvidia_smi(H100.format("580.95.05"))
    torch_of(monkeypatch, "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")

    def init():
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", init)
    device, _ = computer.check_device("gpu")
    assert not device.right
    assert "No CUDA GPUs are available (driver 580.95.05, CUDA 13.0, CUDA_VISIBLE_DEVICES 7)" in device.found


@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_a_build_of_torch_for_cpus_beside_cards_is_wrong_for_the_gpu_stack_only(nvidia_smi, monkeypatch, stack):
    nvidia_smi(H100.format("580.95.05"))
    torch_of(monkeypatch, None)
    device, _ = computer.check_device(stack)
    assert "it is a build for CPUs" in device.found
    assert device.right == (stack == "cpu")


def test_cards_that_torch_sees_are_shown_with_their_memory(nvidia_smi, monkeypatch):
    nvidia_smi(H100.format("580.95.05"), "NVIDIA H200, 580.95.05, 143771, 0, 1, GPU-3c4d")
    torch_of(monkeypatch, "13.0", sees=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "NVIDIA H100 80GB HBM3")
    device, driver, memory = computer.check_device("gpu")
    assert device.right
    assert (driver.right, driver.found) == (True, "580.95.05, for torch's CUDA 13.0")
    assert device.found == "2 x NVIDIA H100 80GB HBM3"
    assert memory.found == "0: 79.6 GiB, 0.4 in use; 1: 140.4 GiB, 0.0 in use"


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."], 9),
        (["NVIDIA H100, 580.95.05, much, 0, 0, GPU-1"], 0),
    ],
    ids=["fails", "no numbers"],
)
def test_an_nvidia_smi_that_does_not_list_cards_is_reported(nvidia_smi, lines, status):
    nvidia_smi(*lines, status=status)
    (device,) = computer.check_device("gpu")
    assert not device.right
    assert f"nvidia-smi fails: {lines[0]}" in device.found
    assert computer.check_device("cpu")[0].right  # which does not use them


def test_a_card_without_memory_of_its_own_has_no_memory_line(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA GB10, 580.95.05, [N/A], [N/A], 0, GPU-5e")
    torch_of(monkeypatch, "13.0", sees=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda n: "NVIDIA GB10")
    device, driver = computer.check_device("gpu")
    assert device.right
    assert driver.right
    assert device.found == "1 x NVIDIA GB10"


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.parametrize("stack", ["cpu", "gpu"])
def test_without_an_accelerator_only_the_cpu_stack_is_right(stack):
    (device,) = computer.check_device(stack)
    assert device.found.startswith("no accelerator")
    assert device.right == (stack == "cpu")


# ------------------------------------------------------------ compiler, flash-attn, shared memory


@pytest.mark.usefixtures("nvidia_smi")
def test_no_compiler_and_no_headers(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    found = computer.check_build()
    assert not found.right
    assert found.found == f"missing: a C compiler (gcc, clang or CC), {tmp_path / 'Python.h'}"
    (tmp_path / "Python.h").touch()
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / "bin" / name).symlink_to("/bin/bash")
        if name == "mycc":
            monkeypatch.setenv("CC", "mycc")
        assert computer.check_build().right
        (tmp_path / "bin" / name).unlink()
        assert not computer.check_build().right


def unbuildable(cause):
    def masses(*args, **kwargs):
        raise cause

    return SimpleNamespace(__name__="sayo_verl.probe.fast", attention_masses=masses)


@pytest.mark.usefixtures("nvidia_smi")
def test_what_triton_raises_without_a_compiler_is_one_line(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as tritons:
        build._find_compiler.__wrapped__("c")
    headers = subprocess.CalledProcessError(1, ["gcc", "main.c"])
    for cause in (tritons.value, headers, FileNotFoundError("ptxas")):
        monkeypatch.setattr(selfcheck, "kernels", lambda path, device, cause=cause: unbuildable(cause))
        found = packages.check_probe()
        assert not found.right
        assert "SAYO-P29: the probe's kernels cannot be built or started on this machine" in found.found
        assert f"got {type(cause).__name__}: " in found.found
        assert "sayo.probe_path=reference" in found.fix


def test_out_of_memory_in_the_comparison_is_no_build_that_failed(monkeypatch):
    monkeypatch.setattr(selfcheck, "kernels", lambda path, device: unbuildable(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.check_path("auto", heads=2, key_heads=2, head_dim=16, device=torch.device("cpu"))


def test_flash_attn_is_wanted_in_verls_version(monkeypatch):
    found = computer.check_flash_attn()
    assert not found.right
    assert (found.found, found.wanted) == ("flash-attn is not installed", "==2.8.3")
    assert INSTALL_FLASH_ATTN in found.fix
    assert "attn_implementation=sdpa" in found.fix
    monkeypatch.setattr("sayo_verl.launch.attention_check.flash_attn_problem", lambda: None)
    for there, right in (("2.8.3", True), ("2.8.3+cu13torch2.11", True), ("2.7.4", False)):
        monkeypatch.setattr(computer, "version", lambda name, there=there: there)
        assert computer.check_flash_attn().right == right
    monkeypatch.setattr(
        "sayo_verl.launch.attention_check.flash_attn_problem", lambda: "flash-attn 2.8.3 does not import (why)"
    )
    found = computer.check_flash_attn()
    assert not found.right
    assert "does not import (why)" in found.found


@pytest.mark.parametrize(
    ("free", "memory", "right", "wanted"),
    [(64e6, 1e12, False, "10 GB"), (11e9, 1e12, True, "10 GB"), (4e9, 12e9, True, "4 GB"), (3e9, 12e9, False, "4 GB")],
)
def test_shared_memory_must_hold_rays_object_store(monkeypatch, free, memory, right, wanted):
    monkeypatch.setattr(machine.os, "statvfs", lambda path: SimpleNamespace(f_bavail=int(free // 4096), f_frsize=4096))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else int(memory))
    found = computer.check_shared_memory()
    assert found.right == right
    assert found.wanted.startswith(f"at least {wanted}")
    assert "--shm-size" in found.fix


def test_the_threshold_is_rays():
    from ray._private import ray_constants

    assert ray_constants.REQUIRE_SHM_SIZE_THRESHOLD == machine.RAY_STORE_LEAST
    assert ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION == machine.RAY_STORE


# ------------------------------------------------------------ a job

PLAN = """  machines        1 x 8 cuda; Ray needs 34 CPUs (not checked here)
  memory per GPU  by arithmetic, in GiB of 79.6 (nvidia-smi)
  memory per GPU  update 74.1: weights 30.1 - TIGHT, 93% of the card
"""


def job(tmp_path, text, status=0):
    script = tmp_path / "job.sh"
    script.write_text(f"[[ $DRY_RUN == 1 ]] || exit 7\ncat <<'EOF'\n{text}\nEOF\nexit {status}\n")
    return str(script)


def test_a_job_is_looked_at_with_its_memory_and_its_cards(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "cards", lambda: [machine.Card("H100", "580.1", 81559, 0)] * 4)
    passed, machines, *memory, cards = job_module.check_job(job(tmp_path, PLAN))
    assert passed.right
    assert (machines.right, machines.id) == (None, "job.machines")
    assert [line.found for line in memory] == [
        "by arithmetic, in GiB of 79.6 (nvidia-smi)",
        "update 74.1: weights 30.1 - TIGHT, 93% of the card",
    ]
    assert (cards.found, cards.right) == ("needs 8 GPUs on each node, found 4", False)
    monkeypatch.setattr(job_module, "cards", lambda: [machine.Card("H100", "580.1", 81559, 0)] * 8)
    assert job_module.check_job(job(tmp_path, PLAN))[-1].right


@pytest.mark.parametrize("words", job_module.UNCHECKED.pattern.split("|"))
def test_the_plan_still_says_unchecked_in_the_words_that_the_doctor_reads(repo, words):
    assert any(words in file.read_text() for file in (repo / "sayo_verl" / "launch").glob("*.py"))


def test_what_the_plan_did_not_check_is_neither_right_nor_wrong(tmp_path):
    plan = """  train data      data/train-*.parquet - NOT THERE YET, needed before the run
  reward gives    not checked: no row can be tried
  template        ends the prompt with "<think>"
  memory per GPU  not estimated: the model is not on this machine
  disk            70.0 GiB free at /data; the size of a checkpoint is unknown
"""
    found = {finding.id: finding.right for finding in job_module.check_job(job(tmp_path, plan))}
    assert found == {
        "job.plan": True,
        "job.train_data": None,
        "job.reward_gives": None,
        "job.memory": None,
        "job.disk": None,
    }


def test_a_job_that_is_refused_is_reported_with_its_fix(tmp_path):
    said = SayoError("L60", "update needs more memory than a GPU has", where="there", fix="use more GPUs")
    (found,) = job_module.check_job(job(tmp_path, f"{said}\nanother line", status=1))
    assert not found.right
    assert (found.found, found.fix) == (str(said), "use more GPUs")
    (absent,) = job_module.check_job(str(tmp_path / "absent.sh"))
    assert "No such file" in absent.found


def test_a_job_gets_the_overrides_after_its_script_and_the_variables_in_front(tmp_path, monkeypatch):
    script = tmp_path / "job.sh"
    script.write_text('echo "  machines  1 x $NGPUS_PER_NODE cuda"\necho "  memory per GPU  $*"\n')
    monkeypatch.setattr(job_module, "cards", lambda: [])
    monkeypatch.setenv("NGPUS_PER_NODE", "1")
    args = build_parser().parse_args(["doctor", "--job", str(script), "sayo.gpu_memory_gib=24", "a.b=1"])
    findings = job_module.check_job(*args.job)
    assert [line.found for line in findings[1:]] == [
        "sayo.gpu_memory_gib=24 a.b=1",
        "needs 1 GPU on each node, found 0",
    ]


def test_help_of_doctor_shows_a_job_with_variables_in_front(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["doctor", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "METHOD=grpo NGPUS_PER_NODE=4 \\ sayo doctor --job scripts/run_sayo_qwen3vl_8b.sh sayo." in shown


LONG = Finding("job.plan", "job", "x " * 200 + "end", "y " * 200, False, "z " * 200)
FINE = Finding("version.torch", "torch", "2.13.0", "==2.13.0", True, "never shown")


OPEN = Finding("job.disk", "job, disk", "the size of a checkpoint is unknown", "", None, "never shown")


def test_the_report_has_a_line_per_finding_and_ends_with_the_result(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", lambda *args, **kwargs: [FINE, LONG, OPEN])
    assert main(["doctor", "--job", "some.sh"]) == 1
    said = capsys.readouterr()
    assert "dry run of some.sh" in said.err
    shown = said.out.splitlines()
    assert [line for line in shown if line.startswith("  NO  job ") and "end" in line and "y y" in line]
    assert [line for line in shown if line.startswith("  --  job, disk ")]
    assert [line for line in shown if line in ("versions", "job")] == ["versions", "job"]
    assert "never shown" not in said.out
    assert shown[-2] == "problems: job"
    assert re.fullmatch(r"2 checks in \d+ s: 1 problem, 1 not checked", shown[-1])
    monkeypatch.setattr(command, "examine", lambda *args, **kwargs: [FINE])
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("s: no problem\n")


def test_a_finding_is_printed_before_the_next_one_is_known(monkeypatch, capsys):
    seen = []

    def examine(*args, **kwargs):
        yield FINE
        seen.append(capsys.readouterr().out)
        yield LONG

    monkeypatch.setattr(command, "examine", examine)
    assert main(["doctor"]) == 1
    assert "2.13.0" in seen[0]


@pytest.mark.parametrize(("address", "seconds"), [(None, True), ("10.0.0.1:6379", False)])
def test_some_seconds_are_announced_only_where_a_ray_is_started(address, seconds):
    said = command.announcement((), address)
    assert ("15 seconds" in said) == seconds
    assert (address or "a small Ray") in said


def test_json_is_one_object_with_stable_ids(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", lambda *args, **kwargs: [FINE, LONG, OPEN])
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["ok"]) == (1, False)
    assert [finding["id"] for finding in report["findings"]] == ["version.torch", "job.plan", "job.disk"]
    assert [finding["right"] for finding in report["findings"]] == [True, False, None]
    monkeypatch.setattr(command, "examine", lambda *args, **kwargs: [FINE, OPEN])
    assert main(["doctor", "--json"]) == 0, "what was not checked is no problem"
    capsys.readouterr()
    monkeypatch.setattr(command, "examine", lambda *args, **kwargs: [FINE, LONG])
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["findings"][1].keys() == {"id", "group", "name", "found", "wanted", "right", "fix"}


def test_help_fits_a_small_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["doctor", "--help"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 24
    assert max(map(len, shown)) <= 80


# ------------------------------------------------------------ memory, disks, ports


def test_memory_disks_and_folders_that_cannot_take_a_run_are_named(monkeypatch, tmp_path):
    assert computer.check_memory().found.endswith("GiB available")
    usage = SimpleNamespace(total=100 * 2**30, free=4 * 2**30)
    monkeypatch.setattr(computer.shutil, "disk_usage", lambda place: usage)
    assert [finding.right for finding in computer.check_disks(tmp_path / "a" / "b")] == [False, False]
    usage.free *= 2
    out, tmp = computer.check_disks(tmp_path / "a" / "b")
    assert (out.right, tmp.right, out.found) == (True, True, "8.0 of 100.0 GiB free")
    monkeypatch.setattr(computer.os, "access", lambda place, mode: False)
    assert f"{tmp_path} cannot be written" in computer.check_disks(tmp_path / "a")[0].found


def test_the_memory_limit_of_a_container_and_rays_own_folder_count(monkeypatch, tmp_path):
    monkeypatch.setattr(computer, "CGROUPS", tmp_path)
    for name, text in (("memory.max", "1000000000\n"), ("memory.current", "950000000\n"), ("memory.stat", "anon 5\n")):
        (tmp_path / name).write_text(text)
    found = computer.check_memory()
    assert (found.found, found.right) == ("0.0 of 0.9 GiB available", False)
    (tmp_path / "memory.stat").write_text("inactive_file 900000000\n")
    assert computer.check_memory().right
    (tmp_path / "memory.max").write_text("max\n")
    assert computer._container_memory() is None
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert computer.check_disks(tmp_path)[1].name == f"disk of {tmp_path}, for Ray"


def test_a_line_that_is_right_has_no_fix_in_json():
    fixes = [computer.Finding("a.b", "n", "f", "w", right, "do").as_dict()["fix"] for right in (True, False)]
    assert fixes == ["", "do"]


def test_a_port_that_another_program_holds_is_named_and_a_rays_is_right(monkeypatch):
    monkeypatch.setattr(computer, "_ray_here", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(computer, "PORTS", {port: "Ray's head"})
        found = computer.check_ports()
        assert (found.right, found.found) == (False, f"{port} (Ray's head) taken")
        monkeypatch.setattr(computer, "_ray_here", lambda: "10.0.0.1:6379")
        assert computer.check_ports().right
    assert "free" in computer.check_ports().found


# ------------------------------------------------------------ Ray, METIS, processors, run folders


def test_what_ray_listens_on_is_right_with_a_token_only():
    state = {"version": __version__, "estimators": ", ".join(METHODS)}  # other tests may have left methods of their own
    nodes = [["a Ray worker", state]]
    heard = {"raylet": ["::"], "agent": ["10.0.0.1", "127.0.0.1"]}
    for token in (True, False):
        worker, found = ray_child.of_result({"nodes": nodes, "listening": heard, "token": token})
        assert worker.right
        assert found.right == token
        assert found.found.startswith(
            "on all addresses: raylet; on one: agent on 10.0.0.1; token authentication o"
            if token
            else "on all addresses: raylet; on one: agent on 10.0.0.1; token authentication O"
        )


def test_a_node_with_other_versions_or_without_the_plug_in_is_named():
    broken = {"version": "0.0.9", "estimators": "ImportError: no", "different": "torch 2.1, here 2.13.0"}
    versions, plugin = ray_child.of_result({"nodes": [["host (10.0.0.2)", broken]]})
    assert (versions.right, versions.id, versions.found) == (False, "ray.versions_1", "torch 2.1, here 2.13.0")
    assert not plugin.right
    assert "host (10.0.0.2)" in plugin.name


def test_a_ray_that_does_not_start_is_a_finding(monkeypatch):
    dead = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.exit('no Ray here')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    (found,) = ray_child.findings(dead, None)
    assert (found.right, found.found) == (False, "no Ray here")


def test_a_cluster_that_does_not_answer_is_a_finding():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    (found,) = ray_child.of_result(ray_child.joined(address))
    assert not found.right
    assert "SAYO-L79: no Ray cluster answers at this address | at --address" in found.found


@pytest.mark.parametrize(
    ("given", "variable", "used"),
    [
        (None, None, None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("local", "10.0.0.1:6379", None),
        ("auto", None, "auto"),
    ],
)
def test_the_cluster_is_that_of_the_option_or_the_variable(monkeypatch, given, variable, used):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert command.cluster_address(given) == used


def test_metis_is_tried_and_its_absence_is_not_a_problem(monkeypatch):
    assert packages.check_metis().right
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    found = packages.check_metis()
    assert found.right is None
    assert "only attn_anchor needs METIS" in found.found


def test_a_model_without_its_processor_is_named(tmp_path):
    found = job_module.check_processor(str(tmp_path))
    assert not found.right
    assert found.found.startswith("SAYO-L17")


def test_the_checkpoints_of_a_run_are_judged(tmp_path):
    run = tmp_path / "run"
    assert job_module.check_run(run)[0].found == "no such folder"
    save(run / "checkpoints", 2, 4, tracker=4)
    *each, resume = job_module.check_run(run)
    assert all(finding.right for finding in each)
    assert resume.right
    (run / "metrics.jsonl").write_text('{"step": 5, "data": {"critic/score/mean": 1.0}}\n')
    assert "1 of 5 steps would be trained again" in job_module.check_run(run)[-1].found
    (run / "checkpoints" / "global_step_4" / "data.pt").unlink()
    two, four, resume = job_module.check_run(run)
    assert (two.right, four.right, four.id) == (True, False, "run.global_step_4")
    assert not resume.right
    assert resume.fix.startswith("echo -n 2 > ")


# ------------------------------------------------------------ versions


def wanted_of(stack):
    return {name: str(requirement.specifier) for name, requirement in packages.pinned(stack).items()}


def test_the_gpu_stack_is_compared_with_the_constraints_of_the_clone(repo):
    wanted = wanted_of("gpu")
    lines = (repo / "configs" / "constraints-gpu.txt").read_text().splitlines()
    for name in packages.SHOWN:
        assert f"{name}{wanted[name.lower()]}" in lines


def test_without_a_clone_the_gpu_stack_has_the_pins_of_the_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "CONSTRAINTS", tmp_path / "none.txt")
    wanted = wanted_of("gpu")
    assert wanted["verl"] == "==0.9.1"
    assert wanted["torch"] == "==2.11.0"
    assert wanted["transferqueue"].startswith(">=")
    assert all(name.lower() in wanted for name in packages.SHOWN)


def test_nvcc_must_be_of_torchs_cuda_and_is_looked_for_only_where_flash_attn_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(computer, "find_nvcc", lambda: None)
    torch_of(monkeypatch, "13.0")
    (found,) = computer.check_nvcc()
    assert (found.right, found.found) == (False, "not found")
    monkeypatch.undo()
    torch_of(monkeypatch, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    for release, right in (("13.2", True), ("12.8", False)):
        nvcc.write_text(f"#!/bin/bash\necho 'Cuda compilation tools, release {release}, V{release}.86'\n")
        nvcc.chmod(0o755)
        (found,) = computer.check_nvcc()
        assert (found.right, found.found) == (right, f"{nvcc}, CUDA {release}")
        assert found.wanted.startswith("nvcc of CUDA 13")
    monkeypatch.setattr("sayo_verl.launch.attention_check.flash_attn_problem", lambda: None)
    assert computer.check_nvcc() == []


def test_the_plan_of_a_shipped_job_is_read(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:/usr/bin:/bin")
    lines: list[str] = []
    show(preflight(composed(repo, "+job=sayo_qwen3vl_8b", "+method=region"), dry_run=True), lines.append)
    findings = job_module.check_job(job(tmp_path, "\n".join(lines)))
    by_id = {finding.id: finding.right for finding in findings}
    assert by_id["job.plan"] is True
    assert by_id.keys() >= {"job.memory", "job.disk", "job.train_data", "job.cards"}
    assert findings[-1].found == "needs 8 GPUs on each node, found 0"
