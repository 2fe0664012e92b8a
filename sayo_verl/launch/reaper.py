"""Ends the processes of a run on this machine, by the token that all of them have in their environment.

``kill -9`` of the launcher leaves Ray's agents, and a stopped worker survives its raylet. So the launcher starts this
file as a process of its own, which waits for the launcher's end. It uses the standard
library only, so that it is small and starts at once.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 5.0  # from SIGTERM to SIGKILL
ORDERLY_S = 30.0  # for what is left of a run that ended by itself; verl's task runner takes some seconds
# They end the processes that they started. Ended first, they make others abort with a stack of C++.
LAST = ("raylet", "gcs_server")
LOOK_S = 5.0  # between two looks of the reaper at the processes of a run
_OPEN: list[int] = []  # write ends of the pipes of reapers
_FOUND: dict[str, dict[int, int]] = {}  # mark -> process id -> start time, as last found


def processes_with(mark: str, spared: tuple[int, ...] = ()) -> dict[int, str]:
    """Process id -> name of the processes of this user whose environment has ``mark`` (``NAME=value``), and of theirs.

    A process that sets its title, as Ray's agents do, overwrites its environment in /proc. So the children of those
    with the mark count too, and whatever an earlier call found is remembered: a child of a raylet that died has no
    parent that tells.
    """
    names, began, parents, found = {}, {}, {}, set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) in (os.getpid(), *spared):
            continue
        with contextlib.suppress(OSError):  # it ended
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                before, _, after = file.read().rpartition(")")
            fields, pid = after.split(), int(entry)
            if fields[0] == "Z":
                continue
            names[pid], parents[pid], began[pid] = before.partition("(")[2], int(fields[1]), int(fields[19])
        with contextlib.suppress(OSError), open(f"/proc/{entry}/environ", "rb") as environment:  # of another user
            if mark.encode() in environment.read().split(b"\0"):
                found.add(int(entry))
    known = _FOUND.setdefault(mark, {})
    found = {pid for pid in names if pid in found or began[pid] == known.get(pid)}
    while more := {pid for pid in names if parents[pid] in found} - found:
        found |= more
    _FOUND[mark] = {pid: began[pid] for pid in found}
    return {pid: names[pid] for pid in found}


def end_processes(mark: str, grace_s: float = GRACE_S, spared: tuple[int, ...] = ()) -> dict[int, str]:
    """SIGTERM, then SIGKILL for those that are left after ``grace_s`` seconds; returns those that it found first."""
    first = processes_with(mark, spared)
    for pid, name in first.items():
        if name not in LAST:
            _signal(pid, signal.SIGTERM)
    end = time.monotonic() + grace_s
    while time.monotonic() < end and any(name not in LAST for name in processes_with(mark, spared).values()):
        time.sleep(0.1)
    seen_none = 0
    for _ in range(30):
        left = processes_with(mark, spared)
        seen_none = 0 if left else seen_none + 1
        if seen_none == 3:  # once is not enough: a raylet that dies may be starting an agent
            break
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    return first


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def start_reaper(name: str, value: str) -> int:
    """Start the process that ends what has ``name=value`` in its environment when this process has ended.

    Returns:
        Its process id. It has neither the variable nor this process's group, so that no signal to the run ends it.
    """
    read_end, write_end = os.pipe()  # only this process has the write end: it closes when this process ends
    environment = {key: text for key, text in os.environ.items() if key != name}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(read_end), f"{name}={value}"],
        pass_fds=(read_end,),
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    os.close(read_end)
    _OPEN.append(write_end)
    return process.pid


def announce_end() -> None:
    """Tell the reapers that this process ends by itself, so that its processes get the time that they need."""
    for write_end in _OPEN:
        os.write(write_end, b"1")


def main(read_end: int, mark: str) -> None:
    """Wait until the launcher has ended, give its processes a moment to end by themselves, and end the rest."""
    while not select.select([read_end], [], [], LOOK_S)[0]:
        processes_with(mark)  # remembers them
    announced = os.read(read_end, 1)
    while os.read(read_end, 1):
        pass
    end = time.monotonic() + (ORDERLY_S if announced else GRACE_S)
    while time.monotonic() < end and processes_with(mark):
        time.sleep(0.2)
    if processes_with(mark) and (found := end_processes(mark, grace_s=1.0)):
        names = ", ".join(f"{name} ({pid})" for pid, name in found.items())
        with contextlib.suppress(OSError):  # nobody may read standard error any more
            print(f"sayo-verl: ended {len(found)} processes that the run left: {names}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
