"""The machine: accelerators, memory, disks, ports, and what Triton, torch.compile and flash-attn are built with."""

import errno
import os
import platform
import re
import shutil
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

from sayo_verl.doctor.finding import Finding
from sayo_verl.launch.machine import Card, cards, find_nvcc, missing_to_compile, shared_memory, why_no_card

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
# Ray stores nothing on a disk that is fuller than this (RAY_local_fs_capacity_threshold).
FULLEST = 0.95
# Ports that only a cluster of `ray start --head` uses; a run on one machine takes free ones.
PORTS = {6379: "Ray's head", 8265: "the dashboard", 10001: "Ray Client"}


def check_device(stack: str) -> list[Finding]:
    """The accelerators with their memory, or why torch sees none; without one, the CPUs."""
    import torch

    try:
        listed = cards()
    except OSError as error:
        fix = "repair the driver (in a container: its NVIDIA runtime), or remove nvidia-smi from PATH"
        return [Finding("machine.device", "device", str(error), "nvidia-smi that answers", stack == "cpu", fix)]
    if torch.cuda.is_available():
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        return [Finding("machine.device", "device", found, "", True), *_driver(listed), *_memory(listed)]
    if listed:
        return [_unseen(listed, stack), *_memory(listed)]
    cpu = ", VERL_PLATFORM=cpu" if os.environ.get("VERL_PLATFORM") == "cpu" else ""
    return [
        Finding(
            "machine.device",
            "device",
            f"no accelerator ({os.cpu_count()} CPUs, {platform.machine()}){cpu}",
            "" if stack == "cpu" else "a GPU, with its driver",
            stack == "cpu",
            "install the driver (in a container: start it with --gpus all), or go to a node with GPUs; on CPUs: "
            "bash scripts/setup_env.sh cpu, then bash scripts/run_sayo_tiny.sh",
        )
    ]


def _unseen(listed: list[Card], stack: str) -> Finding:
    import torch

    found = f"{len(listed)} x {listed[0].name}, of which torch {torch.__version__} sees none"
    cuda = torch.version.cuda
    if cuda is None:
        return Finding(
            "machine.device",
            "device",
            f"{found}: it is a build for CPUs",
            "",
            stack == "cpu",
            "bash scripts/setup_env.sh gpu",
        )
    if wrong := why_no_card(listed[0].driver, cuda):
        return Finding("machine.device", "device", f"{found}: {wrong[0]}", wrong[1], False, wrong[2])
    try:
        torch.cuda.init()
        said = "no reason given"
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:160]
    said += f" (driver {listed[0].driver}, CUDA {cuda}, CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES')})"
    return Finding(
        "machine.device",
        "device",
        f"{found}: {said}",
        "cards that torch sees",
        False,
        "unset CUDA_VISIBLE_DEVICES, or look at the driver",
    )


def _driver(listed: list[Card]) -> list[Finding]:
    import torch

    if not listed or torch.version.cuda is None:
        return []
    problem, wanted, fix = why_no_card(listed[0].driver, torch.version.cuda) or ("", "", "")
    found = problem or f"{listed[0].driver}, for torch's CUDA {torch.version.cuda}"
    return [Finding("machine.driver", "GPU driver", found, wanted, not problem, fix)]


def _memory(listed: list[Card]) -> list[Finding]:
    """A line for the memory of the cards that have their own."""
    lines = "; ".join(
        f"{n}: {card.total / 1024:.1f} GiB, {card.used / 1024:.1f} in use"
        for n, card in enumerate(listed)
        if card.total is not None and card.used is not None
    )
    return [Finding("machine.gpu_memory", "GPU memory", lines, "", True)] if lines else []


def check_build(*, needed: bool = True) -> Finding:
    """What Triton and torch.compile build with; runs on CPUs do without (``needed``)."""
    absent = missing_to_compile()
    return Finding(
        "machine.compiler",
        "C compiler",
        f"missing: {', '.join(absent)}" if absent else "found, with Python.h",
        "a C compiler and Python.h, for Triton and torch.compile",
        not absent or not needed,
        "install gcc and python3.11-dev (of conda: gcc_linux-64), or name a compiler in CC",
    )


def check_flash_attn() -> Finding:
    """flash-attn, which verl's default attention and its fast log-probs need."""
    from sayo_verl.launch.attention_check import (
        ATTENTION,
        DENSE_MASK,
        INSTALL_FLASH_ATTN,
        SLOW_LOG_PROBS,
        flash_attn_problem,
    )

    problem, wanted = flash_attn_problem(), INSTALL_FLASH_ATTN.rpartition("==")[2]
    found = problem or version("flash-attn")
    return Finding(
        "machine.flash_attn",
        "flash-attn",
        found,
        f"=={wanted}",
        found.partition("+")[0] == wanted,
        f"bash scripts/setup_env.sh gpu, or {INSTALL_FLASH_ATTN}; or train with ++{ATTENTION}=sdpa, not "
        f"Qwen2.5-VL packed ({DENSE_MASK}; {SLOW_LOG_PROBS})",
    )


def check_nvcc() -> list[Finding]:
    """The compiler of torch's CUDA version, which builds flash-attn; empty if flash-attn is installed."""
    import torch

    from sayo_verl.launch.attention_check import flash_attn_problem

    if flash_attn_problem() is None:
        return []
    nvcc, major = find_nvcc(), (torch.version.cuda or "").partition(".")[0]
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", said)
    found = f"{nvcc}, CUDA {release[1] if release else 'unknown'}" if nvcc else "not found"
    right = bool(nvcc) and (not major or (release is not None and release[1].partition(".")[0] == major))
    fix = "install that CUDA toolkit and set CUDA_HOME, or go without flash-attn: SAYO_FLASH_ATTN=0"
    return [
        Finding(
            "machine.nvcc",
            "nvcc",
            found,
            f"nvcc of CUDA {major or 'as torch has it'}, which builds flash-attn",
            right,
            fix,
        )
    ]


def check_shared_memory(*, needed: bool = True) -> Finding:
    """/dev/shm, which holds Ray's object store; the tiny runs have a small one (``needed``)."""
    free, wanted = shared_memory()
    return Finding(
        "machine.shared_memory",
        "/dev/shm",
        f"{free / 1e9:.1f} GB free",
        f"at least {wanted / 1e9:.0f} GB: for Ray's object store, which is slow on disk otherwise, and for NCCL",
        free >= wanted or not needed,
        "start the container with --shm-size=64g or --ipc=host, or mount a larger tmpfs there",
    )


def check_memory() -> Finding:
    """Memory of the host, of which Ray's store, offloaded states and images take a part."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) * 1024
    total = sizes["MemTotal"]
    free = sizes.get("MemAvailable", sizes["MemFree"])
    if (limit := _container_memory()) and limit[1] < total:
        free, total = min(free, limit[0]), limit[1]
    # Ray kills workers of a node that uses more than 95 % (RAY_memory_usage_threshold)
    return Finding(
        "machine.memory",
        "memory",
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB available",
        "at least 10 % available: Ray ends workers at 5 %",
        free >= 0.1 * total,
        "end other processes, or use a machine with more memory",
    )


def _container_memory() -> tuple[int, int] | None:
    """Bytes (available, limit) of this container's memory; None without a limit. Files that can be dropped are free."""
    for folder, limit, used, files in (
        (CGROUPS, "memory.max", "memory.current", "inactive_file"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / limit).exists() and (total := (folder / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(stat.get(files, 0))
            return max(int(total) - taken, 0), int(total)
    return None


def check_disks(out: Path) -> list[Finding]:
    """The disks of the run folders and of Ray's temporary folder.

    Args:
        out: the folder of runs; it may not exist yet.
    """
    found = []
    ray = Path(os.environ.get("RAY_TMPDIR") or "/tmp")
    for key, name, folder in (("out", f"disk of {out}", out), ("tmp", f"disk of {ray}, for Ray", ray)):
        place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        usage = shutil.disk_usage(place)
        right = usage.free >= (1 - FULLEST) * usage.total and os.access(place, os.W_OK)
        found.append(
            Finding(
                f"machine.disk_{key}",
                name,
                f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
                + ("" if os.access(place, os.W_OK) else f", and {place} cannot be written"),
                "a folder that can be written, on a disk less than 95 % full: Ray's limit",
                right,
                "free space, or name another disk (OUT=..., RAY_TMPDIR=... for /tmp)",
            )
        )
    return found


def check_ports() -> Finding:
    """The ports of a cluster's head. That a Ray listens there is right; another program is in its way."""
    taken = [port for port in PORTS if not _is_free(port)]
    up = _ray_here()
    state = "; ".join(f"{port} ({what}) {'taken' if port in taken else 'free'}" for port, what in PORTS.items())
    return Finding(
        "machine.ports",
        "ports",
        state + (f"; a Ray cluster is up at {up}: runs join it unless RAY_ADDRESS=local" if up else ""),
        "free for `ray start --head`; a run on one machine takes other ports",
        not taken or up is not None,
        "needed for several nodes only: end the program that listens (ss -ltnp), or start Ray with --port",
    )


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection is not in the way
        try:
            tried.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def _ray_here() -> str | None:
    """The address of a Ray that `ray start` started on this machine."""
    from ray._private.services import find_bootstrap_address

    return find_bootstrap_address(None)
