"""One run at a time in a folder.

The kernel holds the lock (``flock``) for this process, and releases it when the process ends, by ``kill -9`` too. On
NFS the kernel passes it to the server, so it holds between machines, unless the folder was mounted with ``nolock`` or
``local_lock``. A file system without locks is a message, and the run starts.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from sayo_verl.errors import SayoError
from sayo_verl.launch.run_card import CLOCK, metrics_of_run
from sayo_verl.report.causes import one_line

NAME = ".sayo.lock"
_held: list[int] = []  # open for the life of the process; children of Python do not inherit them


def hold_folders(config: DictConfig) -> None:
    """Lock the folders into which this run writes metrics and checkpoints, until this process ends.

    Raises:
        SayoError: X20 if another process holds one.
    """
    metrics = metrics_of_run(config)
    folders = [] if metrics is None else [metrics.absolute().parent]
    if int(config.trainer.save_freq) > 0:
        folders.append(Path(str(config.trainer.default_local_dir)).absolute())
    for folder in dict.fromkeys(folders):
        hold(folder)


def hold(folder: Path) -> None:
    """Lock one folder, which is made if it does not exist.

    Raises:
        SayoError: X20 if another process holds it; it is named as the file says. L98 if this user cannot open the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / NAME
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError as error:
        raise SayoError(
            "L98",
            "the lock of the folder belongs to another user",
            where=str(file),
            got=one_line(error),
            fix="choose another folder (OUT=... or sayo.out=...); or, if no run writes there, remove the file",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            print(f"{folder} is not locked: {error.strerror}; start no second run in it", file=sys.stderr)
            return
        raise SayoError(
            "X20",
            "another run writes into this folder",
            where=str(folder),
            got=_holder(file),
            fix="wait until it ends or stop it, or choose a new output folder (OUT=...)",
        ) from error
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime(CLOCK)}
    os.truncate(handle, 0)
    os.write(handle, json.dumps(holder).encode())
    _held.append(handle)


def _holder(file: Path) -> str:
    try:
        holder = json.loads(file.read_text())
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has locked the file and not written it yet
        return "a process that starts at this moment"
