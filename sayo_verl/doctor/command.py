"""``sayo doctor``: flags, the checks in their order, and the report as text or JSON.

Nothing is repaired here; every line about a problem says how to fix it.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sayo_verl import __version__
from sayo_verl.doctor.finding import SCHEMA, Finding

EXAMPLE = """a job, with variables in front and overrides after the script, as when it runs:
  METHOD=grpo NGPUS_PER_NODE=4 \\
    sayo doctor --job scripts/run_sayo_qwen3vl_8b.sh sayo.gpu_memory_gib=48
"""
GROUPS = {
    "version": "versions",
    "machine": "machine",
    "plugin": "this process",
    "ray": "Ray",
    "job": "job",
    "run": "run folder",
}
MARKS = {True: "ok", False: "NO", None: "--"}  # the last: not checked
NAMES = 24  # columns of the names; a longer one pushes its line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "--stack", choices=("cpu", "gpu"), help="whose pinned versions to check (default: of the installed torch)"
    )
    parser.add_argument(
        "--job",
        nargs="+",
        default=[],
        metavar=("SCRIPT", "OVERRIDE"),
        help="a script of a job: its dry run, memory, disk, processor",
    )
    parser.add_argument("--model", metavar="M", help="a model: its processor")
    parser.add_argument("--run", dest="run_folder", type=Path, metavar="R", help="a run folder: its checkpoints")
    parser.add_argument("--address", metavar="A", help="of a Ray cluster: every node (default: RAY_ADDRESS)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")


def run(args: argparse.Namespace) -> int:
    """Print each finding as it comes, then the result; 0 without a problem, else 1. With ``--json`` all at the end."""
    began, findings, group = time.monotonic(), list[Finding](), ""
    if not args.json:
        print(announcement(args.job, cluster_address(args.address)), file=sys.stderr, flush=True)
        print(f"sayo-verl {__version__}", flush=True)
    for finding in examine(args.stack, args.job, model=args.model, run=args.run_folder, address=args.address):
        findings.append(finding)
        if not args.json:
            title = [] if finding.group == group else [GROUPS[finding.group]]
            group = finding.group
            print("\n".join([*title, *lines(finding)]), flush=True)
    wrong = [finding.name for finding in findings if finding.right is False]
    seconds = time.monotonic() - began
    if args.json:
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "sayo_verl": __version__,
            "seconds": round(seconds, 1),
            "ok": not wrong,
            "findings": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(result(findings, seconds)))
    return 1 if wrong else 0


def announcement(job: Sequence[str], address: str | None) -> str:
    """What will be looked at, before the first finding."""
    ray = f"the Ray cluster at {address}" if address else "a small Ray that is started for it (some 15 seconds)"
    return f"checking versions, machine, plug-in, {ray}" + (f", a dry run of {' '.join(job)}" if job else "")


def lines(finding: Finding) -> list[str]:
    """A finding as text; under a problem its fix."""
    wrong = finding.right is False
    wanted = f" - WANTED {finding.wanted}" if wrong and finding.wanted else ""
    shown = f"  {MARKS[finding.right]}  {finding.name.ljust(NAMES)}  {finding.found}{wanted}"
    return [shown, *([f"      fix: {finding.fix}"] if wrong else [])]


def result(findings: Sequence[Finding], seconds: float) -> list[str]:
    """The last lines: the names of the problems, and the counts."""
    wrong = [finding.name for finding in findings if finding.right is False]
    unknown = sum(finding.right is None for finding in findings)
    counts = f"{len(wrong) or 'no'} problem{'s' * (len(wrong) > 1)}" + (f", {unknown} not checked" if unknown else "")
    named = [f"problems: {'; '.join(wrong)}"] if wrong else []
    return [*named, f"{len(findings) - unknown} checks in {seconds:.0f} s: {counts}"]


def cluster_address(given: str | None) -> str | None:
    """The cluster to look at: ``--address``, else RAY_ADDRESS; None for a small Ray of the doctor's own."""
    address = (given or os.environ.get("RAY_ADDRESS") or "").strip()
    return None if address in ("", "local") else address


def examine(
    stack: str | None = None,
    job: Sequence[str] = (),
    *,
    model: str | None = None,
    run: Path | None = None,
    address: str | None = None,
) -> Iterator[Finding]:
    """Every finding, in the order of the report, each as soon as it and those before it are known.

    Args:
        stack: whose pins are checked, ``"cpu"`` or ``"gpu"``; None: what torch was built for.
        job: a launch script to look at as well, and its arguments.
        model: a model whose processor is checked.
        run: a run folder whose checkpoints are judged.
        address: of a Ray cluster.
    """
    from sayo_verl.doctor import computer, packages, ray_child
    from sayo_verl.doctor import job as jobs

    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")  # read when verl is imported
    warnings.simplefilter("ignore")  # of engines that are not installed
    address = cluster_address(address)
    child = ray_child.start(address)  # first: it takes longest
    try:
        with ThreadPoolExecutor() as pool:
            of_job = pool.submit(jobs.check_job, *job) if job else None
            metis = pool.submit(packages.check_metis)
            import torch

            stack = stack or ("gpu" if torch.version.cuda or torch.version.hip else "cpu")
            yield from packages.check_versions(stack)
            yield from computer.check_device(stack)
            if stack == "gpu":
                yield computer.check_flash_attn()
                yield from computer.check_nvcc()
            yield computer.check_build(needed=stack == "gpu")
            yield computer.check_shared_memory(needed=stack == "gpu")
            yield computer.check_memory()
            yield from computer.check_disks(run or Path(os.environ.get("OUT") or "outputs"))
            yield computer.check_ports()
            yield packages.check_probe()
            yield packages.check_plugin("this process", packages.plugin_state())
            yield from packages.check_registries()
            yield metis.result()
            yield from of_job.result() if of_job else []
            yield from [jobs.check_processor(model)] if model else []
            yield from jobs.check_run(run) if run else []
        yield from ray_child.findings(child, address)
    finally:
        if child.poll() is None:  # an error here must not leave a Ray
            child.terminate()
            child.communicate(timeout=30)
