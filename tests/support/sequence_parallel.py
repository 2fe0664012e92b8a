"""Two ranks of verl's engine on one machine: what each runs, and how a test starts them and reads what they saw.

The processes talk over gloo, and the exchanges are verl's own; only flash-attn is a stand-in, because verl's Ulysses
exchange lies in the flash path alone. A test describes cases, ``run_on_two_ranks`` runs them all in one pair of
processes, whose start costs more than a case.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (sets the environment that verl reads when it is imported)
import torch

TIMEOUT_S = 240


@dataclass(frozen=True)
class Case:
    """A worker on both ranks and some passes of it over the same rows.

    Attributes:
        name: with a pass's, ``name/pass``, the key of an outcome.
        model: folder.
        rows: as ``engine_rows.make_rows`` gives them.
        passes: name -> the probe's request, or None.
        ulysses: both ranks share every sequence; else each rank has its own half of the rows.
        attention, fused, dynamic, micro_batch, adapter, strategy, bucket: see ``engine_rows``.
    """

    name: str
    model: Path
    rows: list[dict[str, Any]]
    passes: dict[str, dict[str, Any] | None]
    ulysses: bool = True
    attention: str = "flash_attention_2"
    fused: bool = False
    dynamic: bool = True
    micro_batch: int = 2
    adapter: Path | None = None
    strategy: str = "fsdp2"
    bucket: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came back.

    Attributes:
        values: for each key of the output one tensor per row, in the order of the case's rows; empty after an error.
        error: ``type: message`` of each rank that raised, else empty.
        flash_calls: how often rank 0 called the flash kernel on packed sequences.
    """

    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    error: list[str] = field(default_factory=list)
    flash_calls: int = 0


def run_on_two_ranks(cases: Sequence[Case], folder: Path, port: int) -> dict[str, Outcome]:
    """Run every pass of every case in one pair of processes.

    Raises:
        RuntimeError: a process died or hung; the message ends with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(list(cases), folder / "cases.pt")
    ranks = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with open(folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, __file__, str(folder)]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=TIMEOUT_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [-1, -1]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))
        raise RuntimeError(f"ranks ended with {codes}:\n{logs}")
    parts = [torch.load(folder / f"out{rank}.pt", weights_only=False) for rank in range(2)]
    return {key: _merge(case, [part[key] for part in parts]) for case in cases for key in _keys(case)}


def _keys(case: Case) -> list[str]:
    return [f"{case.name}/{name}" for name in case.passes]


def _merge(case: Case, parts: list[Outcome]) -> Outcome:
    errors = [error for part in parts for error in part.error]
    if errors:
        return Outcome(error=errors)
    if case.ulysses:
        assert not parts[1].values, "only the first rank of a sequence hands out values"
        return parts[0]
    half = len(case.rows) // 2
    keys = parts[0].values.keys()
    assert keys == parts[1].values.keys()
    assert all(len(part.values[key]) == half for part in parts for key in keys)
    return Outcome({key: parts[0].values[key] + parts[1].values[key] for key in keys}, [], parts[0].flash_calls)


def _run(case: Case, rank: int) -> dict[str, Outcome]:
    from support.engine_rows import fsdp1_on_cpu, log_prob_pass, model_config, worker
    from support.flash_stand_in import flash_attention_on_cpu, linear_attention_of_packed_rows

    half = len(case.rows) // 2
    rows = case.rows if case.ulysses else case.rows[rank * half : (rank + 1) * half]
    config = model_config(
        case.model,
        packed=True,
        attention=case.attention,
        fused=case.fused,
        adapter=case.adapter,
        lora_rank=4 if case.adapter else 0,
    )
    outcomes = {}
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(flash_attention_on_cpu())
        stack.enter_context(linear_attention_of_packed_rows())
        if case.strategy == "fsdp":
            stack.enter_context(fsdp1_on_cpu())
        built = worker(
            config,
            dynamic=case.dynamic,
            micro_batch=case.micro_batch,
            strategy=case.strategy,
            bucket=case.bucket,
            sequence_parallel=2 if case.ulysses else 1,
        )
        for key, request in zip(_keys(case), case.passes.values(), strict=True):
            calls.varlen.clear()
            try:
                output = log_prob_pass(built, rows, request)
            except Exception as error:  # noqa: BLE001  (a test asserts which one; the traceback is in the log)
                traceback.print_exc()
                outcomes[key] = Outcome(error=[f"{type(error).__name__}: {error}"])
                continue
            values = {} if output is None else _nested(output)  # verl collects from the first rank of a sequence
            outcomes[key] = Outcome(values, [], len(calls.varlen))
    return outcomes


def _nested(output: Any) -> dict[str, list[torch.Tensor]]:
    return {
        key: [value.clone() for value in output[key].unbind()]
        for key in output.keys()
        if isinstance(output[key], torch.Tensor) and output[key].is_nested
    }


def main(folder: Path) -> None:
    """The body of one rank."""
    from support.family_models import patches_undone

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    outcomes: dict[str, Outcome] = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        with patches_undone():
            outcomes |= _run(case, rank)
    torch.save(outcomes, folder / f"out{rank}.pt")


if __name__ == "__main__":
    # cases are pickled under the name by which tests import this module
    from support import sequence_parallel

    sequence_parallel.main(Path(sys.argv[1]))
