"""Compiled code of the probe's kernels for an H100: registers, spills, instructions of each main loop.

    python benchmarks/kernel_code.py [--sets 2] [--head-dim 128] [--group 4]          no GPU needed

A multiprocessor issues one instruction a cycle in each of its four parts. It multiplies a tile of 128 x 64 by a head of
128 dimensions in 512 cycles, and needs as many for the tile's 8,192 exponentials. A main loop of four warps should
therefore issue not many more than 512 instructions per tile. A block is the code between two branches. The first blocks
run for every tile, those with FSEL only if a set has some of a tile's keys.
"""

import argparse
import collections
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sayo_verl.probe import fast, kernels
from sayo_verl.probe.reference import Span

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SMALL_BLOCK = 12  # instructions; shorter ones are branches and counters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2, help="of keys (default: 2, the image and its region)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads of a key head (default: 4)")
    args = parser.parse_args()
    # with a driver that names a GPU, Triton compiles for it without one
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    names = ("members_kernel", "masses_kernel", "profile_kernel")
    stand_in = SimpleNamespace(INTERPRETED=False, **{name: _Compiled(getattr(kernels, name)) for name in names})
    fast._kernels = lambda query: stand_in
    heads = 8 * args.group
    query = torch.empty(1, 999, heads, args.head_dim, dtype=torch.bfloat16).transpose(1, 2)
    span, sets, lse = Span(0, 100, 300, 100, 0, 0, 400), torch.zeros(1, 999, dtype=torch.int32), torch.zeros(300, heads)
    fast.attention_masses(query, query[:, :8], [span], sets, args.sets, scale=0.1)
    print("\n--- with a given log-sum-exp")
    fast.attention_masses(query, query[:, :8], [span], sets, args.sets, scale=0.1, lse=lse)
    fast.attention_profile(query, query[:, :8], span, lse, torch.arange(77), scale=0.1)


class _Compiled:
    """A replacement for a kernel; its launch compiles the kernel and prints a summary of the code."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any):
        def launch(*arguments: Any, **constants: Any) -> None:
            built = self._kernel.run(*arguments, grid=grid, warmup=True, **constants)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                usage = _tool("-res-usage", file.name)
                code = _tool("-sass", file.name)
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
            print(
                f"{built.metadata.name}: {registers} registers, {stack} bytes of stack, {built.metadata.num_warps} "
                f"warps, {built.metadata.shared / 1024:.0f} KiB shared"
            )
            for blocks in main_loops(code):
                print(f"  main loop, {sum(map(len, blocks))} instructions")
                for block in (b for b in blocks if len(b) >= SMALL_BLOCK):
                    kinds = collections.Counter(instruction.split(".")[0] for instruction in block)
                    print(f"    {len(block):4d}  " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(7)))

        return launch


def _tool(flag: str, file: str) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main_loops(code: str) -> list[list[list[str]]]:
    """Find the innermost loops with exponentials of a disassembled kernel, each as blocks of instructions."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    at = {int(address, 16): i for i, (address, _) in enumerate(found)}
    lines = [re.sub(r"^@!?U?P\w+\s+", "", line) for _, line in found]
    targets = {
        i: at[int(m[1], 16)]
        for i, line in enumerate(lines)
        if (m := re.search(r"^BRA.*0x([0-9a-f]+)", line)) and int(m[1], 16) in at
    }
    loops = [(target, i) for i, target in targets.items() if target < i]
    out = []
    for first, last in loops:
        inner = any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
        if inner or sum("MUFU.EX2" in line for line in lines[first : last + 1]) < 16:
            continue
        inside = {first, *(t for i, t in targets.items() if first <= i <= last), *(i + 1 for i in targets)}
        heads = [*sorted(h for h in inside if first <= h <= last), last + 1]
        out.append([[line.split()[0] for line in lines[a:b]] for a, b in itertools.pairwise(heads)])
    return out


if __name__ == "__main__":
    main()
