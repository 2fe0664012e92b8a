"""One run at a time in a folder: the lock is the kernel's, so a killed run leaves none."""

import fcntl
import multiprocessing
import os
import signal
import socket

import pytest

from sayo_verl.errors import SayoError
from sayo_verl.launch import folder_lock
from sayo_verl.launch.folder_lock import NAME, hold, hold_folders


@pytest.fixture(autouse=True)
def _released(monkeypatch):
    held = []
    monkeypatch.setattr(folder_lock, "_held", held)
    yield
    for handle in held:
        os.close(handle)


def run_of(folder, ready):
    hold(folder)
    ready.set()
    signal.pause()


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the folder."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=run_of, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_the_first_is_named(tmp_path, other_run):
    with pytest.raises(SayoError) as caught:
        hold(tmp_path)
    error = caught.value
    assert (error.code, error.where) == ("X20", str(tmp_path))
    assert error.got.startswith(f"process {other_run.pid} on {socket.gethostname()}, started 20")


def test_kill_9_releases_the_folder(tmp_path, other_run):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.join()
    hold(tmp_path)
    assert str(os.getpid()) in (tmp_path / NAME).read_text()


def test_metrics_and_checkpoints_in_two_folders_are_both_held(make, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "run" / "metrics.jsonl"))
    hold_folders(make(**{"trainer.save_freq": 2}))
    assert {file.parent.name for file in tmp_path.glob(f"*/{NAME}")} == {"run", "checkpoints"}


def test_a_file_system_without_locks_is_a_message_and_the_run_starts(tmp_path, monkeypatch, capsys):
    def unsupported(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    hold(tmp_path)
    assert f"{tmp_path} is not locked: Operation not supported" in capsys.readouterr().err


def test_a_lock_of_another_user_is_refused(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_lock.os, "open", denied)  # the tests may run as root
    with pytest.raises(SayoError) as caught:
        hold(tmp_path)
    assert (caught.value.code, caught.value.where) == ("L98", str(tmp_path / NAME))
