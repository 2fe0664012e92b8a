"""The project's own tests that need a GPU or compile the kernels for one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.report import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
CHOSEN = ("tests/probe/test_probe_fast_tiles.py", "-k", "on_cuda or for_hopper")


def run(stage: Stage) -> None:
    stage.run("pytest", _pytest, stage, needs=20)


def _pytest(stage: Stage) -> dict[str, Any]:
    """Run pytest without Triton's interpreter, which the rehearsal sets."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("the stage 'tests' needs pytest: pip install '.[gpu,dev]'")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # in parallel processes, because most of the tests' time is compilation
    parallel = ["-n", "5", "--dist", "load"]
    command = [sys.executable, "-m", "pytest", "-q", *parallel, "-p", "no:cacheprovider", *CHOSEN]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=stage.left(), check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    skipped = "skipped" in lines[-1] and not stage.tiny  # on a GPU all must run
    return {
        "command": " ".join(command[1:]),
        "last_line": lines[-1],
        "tail": lines[-40:],
        "wrong": done.returncode != 0 or skipped,
    }
