"""A build that was interrupted goes on to the same bytes, in a folder that is its own."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import pytest
from support.builds import (
    LENIENT,
    SMALL,
    Killed,
    Made,
    interrupted,
    killing,
    mixed,
    sums,
)
from support.refusals import refusal

from sayo_verl.data.boxes import BoxRules
from sayo_verl.data.building import pipeline
from sayo_verl.data.building.build import build
from sayo_verl.data.image_files import read_image

# ------------------------------------------------------------------------------------------------- the same bytes again


def test_the_number_of_workers_decides_nothing(tmp_path):
    folders = [build(mixed(), tmp_path / str(n), dataclasses.replace(LENIENT, workers=n)).folder for n in (1, 2, 3)]
    assert len(list(folders[0].glob("train-*"))) > 3
    assert sums(folders[0]) == sums(folders[1]) == sums(folders[2])


def test_a_worker_imports_no_torch_and_leaves_ctrl_c_to_the_main_process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), pipeline._begin_worker) as pool:
        assert pool.submit(pipeline._make_all, [], None).result() == []
        assert pool.submit(eval, "'sayo_verl.data.building.pipeline' in __import__('sys').modules").result()
        assert pool.submit(signal.getsignal, signal.SIGINT).result() is signal.SIG_IGN
        assert not pool.submit(eval, "{'torch', 'verl'} & set(__import__('sys').modules)").result()
    code = "import sys, sayo_verl.data.building.mix; print({'torch', 'verl'} & set(sys.modules))"  # which imports build
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(("name", "at"), [("fsync", 1), ("fsync", 9), ("replace", 4), ("replace", 10)])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, monkeypatch, name, at):
    source, options = Made(mixed().things[:30]), dataclasses.replace(SMALL, shard_rows=7, max_drop=0.2)
    whole = sums(build(source, tmp_path / "whole", options).folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, killing(getattr(os, name), at))
        with pytest.raises(Killed):
            build(source, tmp_path / "out", options)
    assert not (tmp_path / "out" / "manifest.json").exists()  # it is written last
    assert sums(build(source, tmp_path / "out", options).folder) == whole


def test_interrupted_again_and_again_while_reading_images(tmp_path, monkeypatch):
    whole = sums(build(mixed(), tmp_path / "whole", LENIENT).folder)
    read, times = 0, 0
    monkeypatch.setattr(pipeline, "read_image", lambda ref: count() or read_image(ref))

    def count() -> None:
        nonlocal read
        read += 1
        if read % 23 == 0:
            raise Killed

    while True:
        try:
            build(mixed(), tmp_path / "out", LENIENT)
            break
        except Killed:
            times += 1
    assert sums(tmp_path / "out") == whole
    assert times >= 3
    # at most the rows of two open shards are made again each time
    assert read <= 57 + times * (2 * SMALL.shard_rows + 5)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_stopped_leaves_no_process_and_goes_on(tmp_path, how):
    script = textwrap.dedent("""
        import os, sys, time
        import dataclasses
        from pathlib import Path
        if __name__ == "__main__":
            import support.builds as t
            from sayo_verl.data.building.build import build
            class Slow(t.Made):
                def examples(self):
                    for n, thing in enumerate(super().examples()):
                        if n == 45:
                            print("here", flush=True)
                            time.sleep(60)
                        yield thing
            source = Slow(t.mixed().things)
            build(source, Path(sys.argv[1]), dataclasses.replace(t.LENIENT, workers=2))
    """)
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that a script runs in the background inherit an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    with refusal("D53", "another process"):
        build(mixed(), tmp_path / "out", LENIENT)
    if how is signal.SIGKILL:
        process.kill()  # its workers have to notice
    else:
        os.killpg(process.pid, how)  # as a terminal does at Ctrl-C
    _, told = process.communicate(timeout=20)
    assert ("the same command resumes" in told) == (how is signal.SIGINT)
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert (tmp_path / "out" / "progress.json").exists()
    whole = build(mixed(), tmp_path / "whole", LENIENT)
    assert sums(build(mixed(), tmp_path / "out", LENIENT).folder) == sums(whole.folder)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped() -> Iterator[Any]:
        yield from mixed().things[:40]
        raise KeyboardInterrupt

    source = mixed()
    monkeypatch.setattr(source, "examples", stopped)
    for workers in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / str(workers), dataclasses.replace(LENIENT, workers=workers))
        assert "the same command resumes" in capsys.readouterr().err
    assert json.loads((tmp_path / "1" / "progress.json").read_text())["state"]["shards"]
    whole = build(mixed(), tmp_path / "whole", LENIENT)
    for workers in (1, 2):
        assert sums(build(mixed(), tmp_path / str(workers), LENIENT).folder) == sums(whole.folder)


def test_a_finished_folder_is_taken_as_it_is(tmp_path, monkeypatch, capsys):
    made = build(mixed(), tmp_path / "out", LENIENT)
    before = sums(made.folder)
    monkeypatch.setattr(pipeline, "read_image", None)  # nothing may be read
    again = build(mixed(), tmp_path / "out", dataclasses.replace(LENIENT, workers=2, max_drop=0))
    assert again.reused
    assert not made.reused
    assert again._replace(reused=False) == made
    assert "reused" in capsys.readouterr().err
    assert sums(made.folder) == before


# ----------------------------------------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize("begun", ["interrupted", "finished"])
def test_other_facts_or_options_are_refused_and_named(tmp_path, begun):
    out = tmp_path / "out"
    if begun == "finished":
        build(mixed(), out, LENIENT)
    else:
        interrupted(out)
    with refusal("D53", "something else.*options.seed: 0 there, 5 now.*--overwrite"):
        build(mixed(), out, dataclasses.replace(LENIENT, seed=5))
    with refusal("D53", "source.facts.told: None there, 'new' now"):
        build(Made(mixed().things, told="new"), out, LENIENT)
    with refusal("D53", "options.box_rules.max_area: 0.6 there, 0.5 now"):
        build(mixed(), out, dataclasses.replace(LENIENT, box_rules=BoxRules(max_area=0.5)))
    fresh = build(mixed(), tmp_path / "fresh", dataclasses.replace(LENIENT, seed=5))
    over = build(mixed(), out, dataclasses.replace(LENIENT, seed=5, overwrite=True))
    assert sums(over.folder) == sums(fresh.folder)


def test_a_folder_in_which_nothing_was_made_yet_is_anybodys(tmp_path):
    with refusal("D55", "no row"):
        build(Made([]), tmp_path / "out", SMALL)
    assert build(mixed(), tmp_path / "out", LENIENT).rows["train"] > 30


def test_files_of_others_are_never_touched(tmp_path):
    for n, name in enumerate(("notes.txt", "train.parquet", "train-00000.parquet", "left_out.jsonl")):
        out = tmp_path / str(n)
        out.mkdir()
        (out / name).write_text("mine")
        for overwrite in (False, True):
            with refusal("D53", f"other files.*{name}"):
                build(mixed(), out, dataclasses.replace(LENIENT, overwrite=overwrite))
        assert (out / name).read_text() == "mine"


def test_the_source_must_yield_what_it_did(tmp_path):
    for n, change in enumerate(("gone", "renamed", "renamed", "renamed", "renamed", "renamed", "renamed", "short")):
        out = tmp_path / str(n)
        interrupted(out)
        things = mixed().things
        if change == "gone":
            del things[2]
        elif change == "renamed":
            things[n] = dataclasses.replace(things[n], id="new")
        else:
            things = things[:20]
        with refusal("D53", "other records"):
            build(Made(things), out, LENIENT)


def test_an_image_that_changed_under_an_open_shard_is_noticed(tmp_path):
    interrupted(tmp_path / "out")
    pending = json.loads((tmp_path / "out" / "progress.json").read_text())["state"]["pending"]
    assert pending
    source = mixed()
    (n, _), *_ = pending
    ref = source.things[n].images[0]
    source.things[n] = dataclasses.replace(source.things[n], images=(dataclasses.replace(ref, data=b"x"),))
    with refusal("D53", "changed"):
        build(source, tmp_path / "out", LENIENT)
