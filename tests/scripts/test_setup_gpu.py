"""Set-up and resolution of the GPU environment: the scripts run in a copy of the repository, pip and nvcc are fake."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest
from support.setup_fakes import Copy, constraints

GPU = constraints("gpu")
NVCC = "#!/bin/bash\necho 'Cuda compilation tools, release {}, V13.0.88'\n"


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture
def with_nvcc(copy: Copy) -> Copy:
    copy.command("nvcc", NVCC.format("13.0"))
    copy.venv = copy.root / ".venv-gpu"
    return copy


def test_the_gpu_stack_is_built_under_its_constraints_and_flash_attn_after_torch(with_nvcc: Copy) -> None:
    output = with_nvcc.built("gpu")
    for part in (
        "[1/4]",
        "[3/4]",
        "trying all imports",
        "[4/4]",
        "flash-attn==2.8.3 (built for torch",
        "flash-attn 2.8.3",
    ):
        assert part in output
    base, packages, flash = with_nvcc.calls
    assert base.endswith(f"--no-deps pip=={GPU['pip']} setuptools=={GPU['setuptools']}")
    assert packages.endswith("--no-build-isolation --constraint configs/constraints-gpu.txt --editable .[gpu,dev]")
    assert flash.endswith("--no-build-isolation --constraint configs/constraints-gpu.txt flash-attn==2.8.3")
    assert "reused .venv-gpu" in with_nvcc.built("gpu")
    assert len(with_nvcc.calls) == 3


@pytest.mark.parametrize("release", ["12.4", None])
def test_without_nvcc_nothing_is_downloaded(copy: Copy, release: str | None) -> None:
    copy.command("nvcc", NVCC.format("13.0"))  # CUDA_HOME goes before PATH, as in torch
    home = copy.root / "toolkit"
    (home / "bin").mkdir(parents=True)
    if release:
        (home / "bin" / "nvcc").write_text(NVCC.format(release))
        (home / "bin" / "nvcc").chmod(0o755)
    status, output = copy.run("gpu", CUDA_HOME=str(home))
    assert status == 1
    assert output.count("\n") == 1
    assert f"SAYO-X96: flash-attn cannot be built here without nvcc of CUDA 13 (found: {release or 'none'})" in output
    for told in ("CUDA_HOME", "MAX_JOBS", "SAYO_FLASH_ATTN=0", "Qwen2.5-VL does not train packed", "about 3 times"):
        assert told in output.partition("fix:")[2]
    assert not copy.calls
    assert not (copy.root / ".venv-gpu").exists()


def test_without_flash_attn_the_gpu_stack_needs_no_nvcc_and_gets_it_later(copy: Copy) -> None:
    copy.venv = copy.root / ".venv-gpu"
    output = copy.built("gpu", SAYO_FLASH_ATTN="0")
    assert "[4/4]" in output
    assert "without flash-attn (SAYO_FLASH_ATTN=0)" in output
    assert "reused" in copy.built("gpu", SAYO_FLASH_ATTN="0")
    copy.command("nvcc", NVCC.format("13.1"))
    assert "up to date (flash-attn is missing)" in copy.built("gpu")
    assert "reused" in copy.built("gpu")


def test_flash_attn_that_is_installed_needs_no_nvcc_after_a_change_of_the_project(with_nvcc: Copy) -> None:
    with_nvcc.built("gpu")
    (with_nvcc.bin / "nvcc").unlink()
    with (with_nvcc.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    nowhere = str(with_nvcc.root / "no toolkit")
    output = with_nvcc.built("gpu", CUDA_HOME=nowhere)
    assert "up to date (pyproject.toml" in output
    assert [call for call in with_nvcc.calls if "flash-attn==" in call] == with_nvcc.calls[2:3]
    shutil.rmtree(next(with_nvcc.venv.glob("lib/python3*/site-packages")) / "flash_attn" / "ops")  # does not import
    with (with_nvcc.root / "pyproject.toml").open("a") as file:
        file.write("# again\n")
    status, output = with_nvcc.run("gpu", CUDA_HOME=nowhere)
    assert status == 1
    assert "SAYO-X96" in output


def test_a_wheel_of_flash_attn_needs_no_nvcc(copy: Copy) -> None:
    copy.venv = copy.root / ".venv-gpu"
    wheel = "/wheels/flash_attn-2.8.3+cu13torch2.11-cp311-cp311-linux_x86_64.whl"
    assert "flash-attn 2.8.3" in copy.built("gpu", SAYO_FLASH_ATTN=wheel)
    assert copy.calls[-1].endswith(f"--constraint configs/constraints-gpu.txt {wheel}")


def test_a_failed_build_of_flash_attn_does_not_cost_the_rest(with_nvcc: Copy) -> None:
    status, output = with_nvcc.run("gpu", FAKE_PIP="flash-attn-fails")
    assert status == 1
    assert "SAYO-X92: flash-attn could not be built" in output.splitlines()[-1]
    assert "MAX_JOBS=4" in output.splitlines()[-1]
    (with_nvcc.venv / "mark").touch()
    assert "up to date (flash-attn is missing)" in with_nvcc.built("gpu")
    assert (with_nvcc.venv / "mark").exists()


def test_a_flash_attn_that_does_not_import_stops_the_set_up(with_nvcc: Copy) -> None:
    status, output = with_nvcc.run("gpu", FAKE_FLASH_ATTN="raise ImportError('undefined symbol: _ZN3c10')")
    assert status == 1
    assert "undefined symbol: _ZN3c10" in output
    assert "SAYO-X92: flash-attn is installed but does not import" in output.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ the resolution of gpu

RESOLVED = """#!/bin/bash
case "$*" in
  *--report*) [[ -z "${FAKE_RESOLVER_FAILS-}" ]] || { echo "ERROR: ResolutionImpossible"; exit 1; }
    while [[ "$1" != --report ]]; do shift; done
    cp "$FAKE_REPORT" "$2"
    echo "  Downloading torch-2.11.0-cp311.whl.metadata (29 kB)"
    echo "  Downloading antlr4-python3-runtime-4.9.3.tar.gz (1.5 MB)" ;;
  *--target*) ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def resolution(copy: Copy, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """``resolution(*arguments, **packages)``: the script, with a resolution of these versions."""
    copy.command("python3.11", RESOLVED)
    for name in ("cp", "grep", "mktemp", "rm", "uname"):
        if not (copy.bin / name).exists():
            (copy.bin / name).symlink_to(shutil.which(name))

    def run(*arguments: str, fails: str = "", **packages: str | None) -> tuple[int, str]:
        found = {name: version for name, version in GPU.items() if name not in ("pip", "flash-attn")} | packages
        found["sayo_verl"] = "1"
        metadata = [{"metadata": {"name": name, "version": version}} for name, version in found.items() if version]
        (tmp_path / "report").write_text(json.dumps({"install": metadata}))
        env = {"FAKE_REPORT": str(tmp_path / "report"), "FAKE_RESOLVER_FAILS": fails}
        return copy.run(*arguments, script="scripts/resolve_gpu_env.sh", **env)

    return run


def test_the_resolution_is_counted_and_compared_with_the_constraints(
    resolution: Callable[..., tuple[int, str]],
) -> None:
    status, output = resolution()
    assert status == 0
    assert f"resolved {len(GPU) - 2} packages" in output
    assert "downloaded whole: 1 archives, 1.5 MB" in output
    assert "every one equals its line in configs/constraints-gpu.txt; not compared: flash-attn==2.8.3" in output


@pytest.mark.parametrize(
    ("packages", "told"),
    [
        ({"torch": "2.12.0"}, "torch==2.12.0 (constrained to torch==2.11.0)"),
        ({"new": "1.0"}, "constrained to nothing"),
        ({"vllm": None}, "nothing (the file has vllm==0.24.0)"),
    ],
    ids=str,
)
def test_another_set_than_the_constraints_is_reported(
    resolution: Callable[..., tuple[int, str]], packages: dict[str, str | None], told: str
) -> None:
    status, output = resolution(**packages)
    assert status == 1
    assert "SAYO-X98" in output
    assert told in output


def test_renew_writes_what_was_resolved(copy: Copy, resolution: Callable[..., tuple[int, str]]) -> None:
    status, output = resolution("--renew", torch="2.12.0+cu130", vllm=None)
    assert status == 0
    assert "1 of them new" in output
    text = (copy.root / "configs/constraints-gpu.txt").read_text()
    assert text.startswith("# Every version")
    assert "\ntorch==2.12.0\n" in text
    assert "\nvllm==" not in text
    assert "\nflash-attn==2.8.3\n" in text


def test_an_unknown_argument_does_not_start_the_resolution(resolution: Callable[..., tuple[int, str]]) -> None:
    status, output = resolution("--renw")
    assert status == 1
    assert output == (
        "SAYO-X97: unknown argument '--renw' | at scripts/resolve_gpu_env.sh | fix: give --renew or nothing\n"
    )


@pytest.mark.parametrize("arguments", [["cpu", "--force"], ["--wher", "gpu"], ["cpu", "gpu"]], ids=str)
def test_an_unknown_argument_does_not_start_the_set_up(copy: Copy, arguments: list[str]) -> None:
    status, output = copy.run(*arguments)
    assert status == 1
    assert re.fullmatch(r"SAYO-X93: unknown argument '\S+' \| at .* \| fix: .*\n", output)
    assert not copy.calls
    assert not copy.venv.exists()


def test_a_resolution_that_fails_is_reported(resolution: Callable[..., tuple[int, str]]) -> None:
    status, output = resolution(fails="1")
    assert status == 1
    assert "ResolutionImpossible" in output
    assert "SAYO-X97: pip finds no set of packages" in output.splitlines()[-1]


def test_the_gpu_constraints_hold_what_verl_was_released_with() -> None:
    normal = {name.lower().replace("_", "-"): version for name, version in GPU.items()}
    assert len(normal) > 250
    assert not [version for version in normal.values() if "+" in version]
    wanted = [line for line in requires("verl") or [] if "extra == " in line and "==" in line.partition(";")[0]]
    pins = {
        name: version
        for line in wanted
        for name, _, version in [line.partition(";")[0].strip().partition("==")]
        if re.search(r'extra == "(vllm|flash-attn-cu130torch211)"', line)
    }
    assert {"torch", "vllm", "transformers", "flash-attn"} <= set(pins)
    assert {name: normal[name] for name in pins} == pins
