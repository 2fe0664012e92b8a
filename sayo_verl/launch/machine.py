"""What a machine offers to a run on GPUs, found without using a card: cards, driver, compiler, shared memory."""

import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# CUDA major version of torch -> oldest driver branch that runs it on Linux: "CUDA minor version compatibility" in
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes. Newer drivers run older CUDA.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Ray (ray/_private/utils.py) gives its object store 30 % of memory, cut to what /dev/shm has free, but not below this.
# Where less is free it goes to the disk of /tmp, with a warning. NCCL and vLLM use /dev/shm as well.
RAY_STORE, RAY_STORE_LEAST = 0.3, 10e9


@dataclass(frozen=True)
class Card:
    """A GPU as nvidia-smi lists it. Memory in MiB, None where the card shares the host's (``[N/A]``)."""

    name: str
    driver: str
    total: int | None
    used: int | None
    index: str = "0"
    uuid: str = ""


def cards() -> list[Card]:
    """The GPUs of this machine; empty without nvidia-smi.

    Raises:
        OSError: nvidia-smi fails; the message has its output.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "name,driver_version,memory.total,memory.used,index,uuid"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError("nvidia-smi does not answer") from error
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    if done.returncode or not all(len(row) == 6 and all(n.isdigit() or n == "[N/A]" for n in row[2:4]) for row in rows):
        raise OSError(f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())[:160]}")
    return [Card(name, driver, _mib(total), _mib(used), index, uuid) for name, driver, total, used, index, uuid in rows]


def _mib(shown: str) -> int | None:
    return int(shown) if shown.isdigit() else None


def visible(listed: list[Card]) -> list[Card]:
    """The cards that CUDA_VISIBLE_DEVICES selects, up to its first entry that is no card (a MIG part, say), as in CUDA.

    Indices are nvidia-smi's; CUDA's are the same for cards of one kind, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return listed
    chosen = []
    for name in names.split(","):
        found = [
            card
            for card in listed
            if name.strip() == card.index or (name.strip().startswith("GPU-") and card.uuid.startswith(name.strip()))
        ]
        if len(found) != 1:
            break
        chosen += found
    return chosen


def run_cards(n: int) -> list[Card]:
    """The ``n`` visible cards with the most memory, which a run uses; empty without nvidia-smi.

    Raises:
        OSError: as ``cards``; also if no card is visible, or the memory of one is unknown.
    """
    listed = cards()
    seen = visible(listed)
    if listed and not seen:
        raise OSError("CUDA_VISIBLE_DEVICES names no card that nvidia-smi lists")
    if any(card.total is None for card in seen):
        raise OSError("nvidia-smi shows no memory")
    return sorted(seen, key=lambda card: -(card.total or 0))[:n]


def why_no_card(driver: str, cuda: str) -> tuple[str, str, str] | None:
    """(problem, requirement, fix) if this driver does not run torch's CUDA version; None if it does."""
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if oldest is None or int(driver.partition(".")[0]) >= oldest:
        return None
    return (
        f"driver {driver} is too old for torch's CUDA {cuda}",
        f"driver {oldest} or newer",
        f"update the driver to {oldest} or newer; or install a torch for an older CUDA, with its vLLM",
    )


def missing_to_compile() -> list[str]:
    """What is missing of the C compiler and the Python headers that Triton and torch.compile build with."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does, for Debian
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    compiler = os.environ.get("CC") or "gcc"
    found = shutil.which(compiler) or ("CC" not in os.environ and shutil.which("clang"))
    return [*([] if found else ["a C compiler (gcc, clang or CC)"]), *([] if header.is_file() else [str(header)])]


def find_nvcc() -> str | None:
    """The CUDA compiler, looked for in the places of torch's build tools and scripts/setup_env.sh."""
    home = os.environ.get("CUDA_HOME")
    places = [*([f"{home}/bin/nvcc"] if home else []), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def shared_memory() -> tuple[float, float]:
    """(free bytes of /dev/shm, bytes that Ray's object store needs in it)."""
    room = os.statvfs("/dev/shm")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(room.f_bavail * room.f_frsize), min(RAY_STORE * memory, RAY_STORE_LEAST)
