"""Speed and memory of ``sayo prepare`` on images of the size of GQA's.

    python benchmarks/prepare_speed.py            # about two minutes on an idle machine
    python benchmarks/prepare_speed.py --quick    # self-check of every code path, at sizes without meaning

The images are a few hundred JPEGs of 500 x 375 pixels and about 60 kB, drawn from a seed. Their gradients, blobs and
filtered noise compress about as well as a photo. Rows use them in turn, and none is encoded again. Each case runs in a
separate process that may use one or two cores. Time is that of ``build``, without imports, with the start of workers.
CPU time is that of the main process and its workers, which other work on the machine disturbs less. Memory is the
largest sum of anonymous memory of the main process and its workers, sampled 20 times a second. Tables that are mapped
from disk are not in it, because the system takes their memory back when it needs it.

Numbers go to ``benchmarks/results/prepare.json``.
"""

import argparse
import dataclasses
import importlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.rows import Example, ImageRef, Source

ROOT = Path(__file__).resolve().parent.parent
SIZE = (500, 375)
TARGET = 300  # rows per second and core


def photo(seed: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG with the large and small structure of a photo."""
    generator = np.random.default_rng(seed)
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    picture = np.zeros((height, width, 3))
    for channel in range(3):
        a, b, c = generator.uniform(-80, 80, 3)
        picture[..., channel] = 128 + a * x + b * y + c * x * y
    for _ in range(12):
        cx, cy, radius = generator.uniform(0, 1), generator.uniform(0, 1), generator.uniform(0.05, 0.3)
        blob = ((x - cx) ** 2 + (y - cy) ** 2 < radius**2)[..., None]
        picture += blob * generator.uniform(-70, 70, 3)
    noise = Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))
    picture += 0.8 * (np.asarray(noise.filter(ImageFilter.GaussianBlur(0.8)), dtype=float) - 127)
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, format="JPEG", quality=78)
    return out.getvalue()


@dataclasses.dataclass
class Photos(Source):
    """Rows over a folder of images."""

    folder: Path
    images: int
    rows: int
    size: tuple[int, int]
    name: str = "photos"

    def facts(self) -> dict[str, Any]:
        return {"images": self.images, "rows": self.rows}

    def examples(self) -> Iterator[Example]:
        width, height = self.size
        for n in range(self.rows):
            k = n % self.images
            box = (0.1 * width, 0.2 * height, 0.5 * width, 0.7 * height)
            yield Example(
                f"{n}",
                (ImageRef(f"{k}", path=self.folder / f"{k}.jpg"),),
                f"question {n}?",
                "answer",
                ((box,),),
                (("thing",),),
                "xyxy",
                "made",
                "sayo/photos",
                (self.size,),
            )


def work(folder: Path, images: int, rows: int, size: tuple[int, int], workers: int, out: Path) -> None:
    """Run one case in this process and print its figures."""
    os.sched_setaffinity(0, set(list(os.sched_getaffinity(0))[:workers]))
    options = BuildOptions(val_share=0.02)
    for name in ("pandas", "datasets"):
        importlib.import_module(name)
    before, start = cpu_seconds(), time.perf_counter()
    made = build(Photos(folder, images, rows, size), out, options)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    assert sum(made.rows.values()) == rows
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def measure(folder: Path, images: int, rows: int, size: tuple[int, int], workers: int) -> dict[str, Any]:
    """Run one case in a separate process and watch its memory."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        case = [str(v) for v in (folder, images, rows, *size, workers, Path(out) / "out")]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        process = subprocess.Popen(
            [sys.executable, __file__, "--case", *case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, anonymous(watched))
            time.sleep(0.05)
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the case {case} failed with {process.returncode}: {errors[-2000:]}")
        size_on_disk = sum(p.stat().st_size for p in (Path(out) / "out").glob("*.parquet"))
    figures = json.loads(output)
    return {
        "rows": rows,
        "cores": workers,
        **figures,
        "rows_per_s_and_core": rows / figures["seconds"] / workers,
        "rows_per_cpu_s": rows / figures["cpu_seconds"],
        "peak_anonymous_mb": peak / 2**20,
        "parquet_mb": size_on_disk / 2**20,
    }


def anonymous(process: psutil.Process) -> int:
    """Bytes of anonymous memory of a process and its children."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{each.pid}/status").read_text()
            total += 1024 * int(status.partition("RssAnon:")[2].split()[0])
    except (psutil.NoSuchProcess, OSError, IndexError):  # one ended during the loop; the next sample follows soon
        return 0
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="self-check; writes below outputs/benchmarks")
    parser.add_argument("--raw", type=Path, help="the file of numbers (default: benchmarks/results/prepare.json)")
    parser.add_argument("--scratch", type=Path, help="folder for images and rows, 5 GB (default: the system's)")
    parser.add_argument("--case", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        folder, images, rows, width, height, workers, out = args.case
        work(Path(folder), int(images), int(rows), (int(width), int(height)), int(workers), Path(out))
        return
    images, size, sizes = (4, (80, 60), (16, 48)) if args.quick else (300, SIZE, (500, 2000, 8000, 32000))
    raw = args.raw or (ROOT / ("outputs/benchmarks" if args.quick else "benchmarks/results") / "prepare.json")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        lengths = []
        for n in range(images):
            data = photo(n, size)
            lengths.append(len(data))
            (folder / f"{n}.jpg").write_bytes(data)
        cases = [measure(folder, images, rows, size, workers) for workers in (1, 2) for rows in sizes]
    results = {
        "images": images,
        "size_wh": size,
        "mean_bytes": round(float(np.mean(lengths))),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "cases": cases,
    }
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps(results, indent=1) + "\n")
    show(results, raw)


def show(results: dict[str, Any], raw: Path) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"{results['images']} JPEGs of {results['size_wh'][0]} x {results['size_wh'][1]}, "
        f"{results['mean_bytes'] / 1000:.0f} kB",
        title_justify="left",
    )
    columns = ("cores", "rows", "s", "rows/s per core", "rows per CPU s", "peak MB", "parquet MB")
    for column in columns:
        table.add_column(column, justify="right")
    for case in results["cases"]:
        table.add_row(
            f"{case['cores']}",
            f"{case['rows']:,}",
            f"{case['seconds']:.1f}",
            f"{case['rows_per_s_and_core']:.0f}",
            f"{case['rows_per_cpu_s']:.0f}",
            f"{case['peak_anonymous_mb']:.0f}",
            f"{case['parquet_mb']:.0f}",
        )
    console = Console()
    console.print(table)
    best = max(case["rows_per_cpu_s"] for case in results["cases"])
    console.print(
        f"target: {TARGET} rows per core and second; best {best:.0f} per CPU second; numbers in {raw}",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
