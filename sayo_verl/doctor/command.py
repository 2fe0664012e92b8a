"""``sayo doctor``: flags, the checks in their order, and the report as text or JSON.

Nothing is repaired here; every line about a problem says how to fix it.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
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
    """Print the report; 0 without a problem, else 1."""
    began = time.monotonic()
    if not args.json:
        job = f", a dry run of {' '.join(args.job)}" if args.job else ""
        print(f"checking versions, machine, plug-in, Ray{job}: some 15 seconds", file=sys.stderr, flush=True)
    findings = examine(args.stack, args.job, model=args.model, run=args.run_folder, address=args.address)
    wrong = [finding for finding in findings if not finding.right]
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
        print("\n".join(lines(findings, seconds)))
    return 1 if wrong else 0


def lines(findings: Sequence[Finding], seconds: float) -> list[str]:
    """The report as text: a line per finding, by group; under a problem its fix; the result last."""
    shown = [f"sayo-verl {__version__}"]
    width = 2 + max(len(finding.name) for finding in findings)
    for group, title in GROUPS.items():
        of_group = [finding for finding in findings if finding.group == group]
        shown += [title] if of_group else []
        for finding in sorted(of_group, key=lambda finding: finding.right):
            wanted = "" if finding.right or not finding.wanted else f" - WANTED {finding.wanted}"
            shown.append(f"  {'ok' if finding.right else 'NO'}  {finding.name.ljust(width)}{finding.found}{wanted}")
            shown += [] if finding.right else [f"      fix: {finding.fix}"]
    wrong = [finding.name for finding in findings if not finding.right]
    said = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}: {', '.join(wrong)}" if wrong else "no problem"
    return [*shown, f"{len(findings)} checks in {seconds:.0f} s, {said}"]


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
) -> list[Finding]:
    """Every finding, in the order of the report.

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
            of_gpu = [computer.check_flash_attn(), *computer.check_nvcc()] if stack == "gpu" else []
            found = [
                *packages.check_versions(stack),
                *computer.check_device(stack),
                *of_gpu,
                computer.check_build(needed=stack == "gpu"),
                computer.check_shared_memory(needed=stack == "gpu"),
                computer.check_memory(),
                *computer.check_disks(run or Path(os.environ.get("OUT") or "outputs")),
                computer.check_ports(),
                packages.check_probe(),
                packages.check_plugin("this process", packages.plugin_state()),
                *packages.check_registries(),
                metis.result(),
                *(of_job.result() if of_job else []),
                *([jobs.check_processor(model)] if model else []),
                *(jobs.check_run(run) if run else []),
            ]
        return [*found, *ray_child.findings(child, address)]
    finally:
        if child.poll() is None:  # an error here must not leave a Ray
            child.terminate()
            child.communicate(timeout=30)
