"""The machine: versions, requirements of Triton's compiler, and the two rates behind the floors."""

import shutil
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cost.meter import copy_rate, matmul_rate

from gpu.report import Stage

PACKAGES = ("torch", "triton", "transformers", "verl", "vllm", "ray", "flash-attn", "tensordict", "peft", "numpy")


def run(stage: Stage) -> None:
    stage.run("versions", _versions)
    stage.run("what Triton's compiler needs", _compiler, stage)
    stage.run("rates", _rates, stage)


def _versions() -> dict[str, Any]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {"python": sys.version.split()[0], "cuda": torch.version.cuda, "packages": found}


def _compiler(stage: Stage) -> dict[str, Any]:
    """Find the C compiler and Python headers with which Triton builds the code that launches a kernel."""
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    incomplete = compiler is None or not headers
    return {"compiler": compiler, "python_headers": headers, "wrong": incomplete and not stage.tiny}


def _rates(stage: Stage) -> dict[str, Any]:
    side, n_bytes = (64, 2**16) if stage.tiny else (8192, 2**31)
    products = matmul_rate(stage.meter, side, stage.device, stage.dtype)
    moved = copy_rate(stage.meter, n_bytes, stage.device)
    stage.figure("square matrix product", f"{products / 1e12:.0f} TFLOP/s")
    stage.figure("copy, bytes read and written", f"{moved / 1e12:.2f} TB/s")
    facts: dict[str, Any] = {"matmul_operations_per_s": products, "copy_bytes_per_s": moved}
    if stage.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"memory_gib": round(card.total_memory / 2**30, 1), "multiprocessors": card.multi_processor_count}
    return facts
