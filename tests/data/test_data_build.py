"""Folders of rows: the same bytes however they come about, nothing repeated, nothing lost without a reason."""

import argparse
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.data.boxes import BoxRules
from sayo_verl.data.building import build as build_module
from sayo_verl.data.building import pipeline
from sayo_verl.data.building.build import BuildOptions, add_flags, build, check_folder, options_from
from sayo_verl.data.building.folder import verl_flags
from sayo_verl.data.building.options import LOSSES
from sayo_verl.data.building.shards import Hashes, hash64, read_rows
from sayo_verl.data.check import check_leakage, check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.image_files import read_image
from sayo_verl.data.images import ImageRules
from sayo_verl.data.rows import INSTRUCTION, REASONS, RELEASED_SYSTEM, ROW_SCHEMA, Example, ImageRef, LeftOut
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SMALL = BuildOptions(workers=1, shard_rows=10, row_group_rows=4, val_share=0.2)


@cache
def picture(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(out, format="PNG")
    return out.getvalue()


def example(n: int, image: int | bytes | None = None, **values: Any) -> Example:
    """The n-th example: of picture ``image``, two rows to a picture by default."""
    image = n // 2 if image is None else image
    data = image if isinstance(image, bytes) else picture(image)
    key = hashlib.sha256(data).hexdigest()[:8] if isinstance(image, bytes) else f"p{image}"
    return Example(
        **{
            "id": f"e{n}",
            "images": (ImageRef(key, data=data),),
            "question": f"what is {n}?",
            "answer": f"a{n}",
            "boxes": (((n % 20, 3, n % 20 + 30, 33),),),
            "box_names": (("thing",),),
            "box_format": "xyxy",
            "box_source": "made",
            "data_source": "sayo/made",
            "sizes": ((60, 40),),
            "kind": "query",
        }
        | values
    )


@dataclasses.dataclass
class Made:
    """A source of what it is given."""

    things: list[Example | LeftOut]
    told: Any = None
    name: str = "made"

    def facts(self) -> dict[str, Any]:
        return {"told": self.told}

    def examples(self) -> Iterator[Example | LeftOut]:
        yield from self.things


def mixed() -> Made:
    """Rows, and some of most things that are left out."""
    things: list[Example | LeftOut] = [example(n) for n in range(60)]
    things[7] = LeftOut("e7", "no_object", "-")
    things[11] = example(11, question="what <image> is it?")
    things[13] = example(13, answer=" ")
    things[20] = dataclasses.replace(example(20), question="what is 21?")  # as e21, whose picture it has
    things[23] = example(23, picture(99)[:-40])
    things[31] = example(31, boxes=(((3, 3, 3, 9),),))
    for n in (5, 26, 36):
        things[n] = example(n, boxes=(((3, 3, 20, 30), (5, 5, 50, 30), (5, 5, 50, 5)),), box_names=(("a", "b", "c"),))
    things[41] = dataclasses.replace(example(41), images=(ImageRef("other name", data=picture(0)),))
    return Made(things)


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def rows(folder: Path, split: str = "*") -> list[dict[str, Any]]:
    return list(read_rows(folder, [p.name for p in sorted(folder.glob(f"{split}-*.parquet"))]))


def left_out(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["reason"] for line in lines}


LENIENT = dataclasses.replace(SMALL, max_drop=0.1)

# ------------------------------------------------------------------------------------------------------ what is built


def test_the_released_prompt_is_a_system_turn_that_every_reader_takes(tmp_path, random_policy, capsys):
    from omegaconf import OmegaConf
    from transformers import AutoProcessor
    from verl.utils.dataset.rl_dataset import RLHFDataset

    made = build(Made([example(n) for n in range(8)]), tmp_path / "out", dataclasses.replace(SMALL, prompt="released"))
    found = rows(made.folder)
    for row in found:
        system, user = row["prompt"]
        assert system == {"role": "system", "content": RELEASED_SYSTEM}
        assert user == {"role": "user", "content": f"<image>{row['extra_info']['question']}"}
    files = sorted(map(str, made.folder.glob("train-*.parquet")))
    assert main(["inspect", str(made.folder), "--model", str(random_policy)]) == 0, capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(random_policy)
    config = OmegaConf.create(
        {
            "image_key": "images",
            "filter_overlong_prompts": True,
            "max_prompt_length": 4096,
            "cache_dir": str(tmp_path),
            "filter_overlong_prompts_workers": 1,
        }
    )
    data = RLHFDataset(files, processor.tokenizer, config, processor)
    assert len(data) == made.rows["train"]
    text = processor.apply_chat_template(data[0]["raw_prompt"], add_generation_prompt=True, tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{RELEASED_SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>")


def test_rows_are_what_the_examples_say(tmp_path):
    made = build(mixed(), tmp_path / "out", LENIENT)
    assert made.left_out == Counter(left_out(made.folder).values())
    assert set(left_out(made.folder)) & {"e7", "e11", "e13", "e21", "e23", "e31"} == {
        "e7",
        "e11",
        "e13",
        "e21",
        "e23",
        "e31",
    }
    given = {thing.id: thing for thing in mixed().things if isinstance(thing, Example)}
    found = rows(made.folder)
    assert {row["extra_info"]["id"] for row in found} | set(left_out(made.folder)) == {f"e{n}" for n in range(60)}
    assert len(found) + len(left_out(made.folder)) == 60
    for row in found:
        thing, info = given[row["extra_info"]["id"]], row["extra_info"]
        assert row["prompt"] == [{"role": "user", "content": f"<image>{thing.question}\n{INSTRUCTION}"}]
        assert row["reward_model"]["ground_truth"] == info["answer"] == thing.answer
        assert row["images"] == [{"bytes": thing.images[0].data, "path": None}]
        assert info["image_size_wh"] == [[60, 40]]
        wanted = np.array(thing.boxes[0][:2]) / [60, 40, 60, 40]
        np.testing.assert_allclose(info["boxes"][0], wanted, rtol=0, atol=1e-12)
        assert info["box_names"] == [list(thing.box_names[0][:2])]
    for split in ("train", "val"):
        of_split = rows(made.folder, split)
        assert [row["extra_info"]["index"] for row in of_split] == list(range(made.rows[split]))
        assert {row["extra_info"]["split"] for row in of_split} == {split}
        numbers = [int(row["extra_info"]["id"][1:]) for row in of_split]
        assert numbers == sorted(numbers)  # the source's order
    told = json.loads((made.folder / "manifest.json").read_text())
    assert told["tally"] == {"examples": 59, "lost": 3, "boxes": len(found) + 3, "without_boxes": 0}
    assert told["boxes_left_out"] == {"box_without_area": 4}
    assert {p.name for p in made.folder.iterdir()} == {*told["files"], "manifest.json"}
    for name, facts in told["files"].items():
        data = (made.folder / name).read_bytes()
        assert (facts["size"], facts["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_folder_passes_the_checks_of_the_launcher_and_of_inspect(tmp_path):
    made = build(mixed(), tmp_path / "out", LENIENT)
    for path in (p for paths in made.files.values() for p in paths):
        assert check_parquet(path, Demands(), max_images=99).with_boxes
    check_leakage(made.files["train"], made.files["val"], image_key="images", max_images=1000)
    findings, figures = Audit(find_data([made.folder])).run()
    assert not [finding for finding in findings.sorted() if finding.level == "FAIL"]
    assert figures.rows == made.rows


def test_a_photo_lying_on_its_side_is_stored_upright_with_its_boxes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(1))).save(out, format="JPEG", exif=exif)
    data = out.getvalue()
    drawn = example(0, data, boxes=(((0, 0, 15, 20),),))  # the raw picture's upper left: upright, its upper right
    made = build(Made([drawn]), tmp_path / "out", dataclasses.replace(SMALL, val_share=0))
    (row,) = rows(made.folder)
    assert row["extra_info"]["image_size_wh"] == [[40, 60]]
    np.testing.assert_allclose(row["extra_info"]["boxes"][0], [[0.5, 0, 1, 0.25]], atol=1e-12)
    assert json.loads((made.folder / "manifest.json").read_text())["images"] == {"upright": 1}
    with refusal("D45", "EXIF"):
        build(Made([dataclasses.replace(drawn, sizes=())]), tmp_path / "auto", SMALL)


def test_rows_without_boxes_are_kept_where_that_is_asked_for(tmp_path):
    things: list[Any] = [example(0, boxes=((),), box_names=((),)), example(2, boxes=(((0, 0, 60, 40),),)), example(4)]
    options = dataclasses.replace(SMALL, val_share=0)
    assert build(Made(things), tmp_path / "a", options).left_out == {"no_box": 2}
    made = build(Made(things), tmp_path / "b", dataclasses.replace(options, keep_without_boxes=True))
    assert [row["extra_info"]["boxes"] for row in rows(made.folder)][:2] == [[[]], [[]]]
    told = json.loads((made.folder / "manifest.json").read_text())
    assert told["tally"]["without_boxes"] == 2
    assert told["boxes_left_out"] == {"box_too_large": 1}
    rules = dataclasses.replace(options, box_rules=BoxRules(max_area=1), image_rules=ImageRules(min_side=40))
    assert build(Made(things), tmp_path / "c", rules).left_out == {"no_box": 1}


def test_several_images_of_a_row(tmp_path):
    pair = Example(
        "two",
        (ImageRef("b", data=picture(1)), ImageRef("a", data=picture(2))),
        "which?",
        "x",
        (((0, 0, 20, 20),), ()),
        (("t",), ()),
        "xyxy",
        "made",
        "sayo/made",
    )
    options = dataclasses.replace(SMALL, val_share=0)
    (row,) = rows(build(Made([pair]), tmp_path / "out", dataclasses.replace(options, instruction="Say it.")).folder)
    assert row["prompt"][0]["content"] == "<image><image>which?\nSay it."
    (bare,) = rows(build(Made([pair]), tmp_path / "bare", dataclasses.replace(options, instruction="")).folder)
    assert bare["prompt"][0]["content"] == "<image><image>which?"
    assert [image["bytes"] for image in row["images"]] == [picture(1), picture(2)]
    assert [len(of_image) for of_image in row["extra_info"]["boxes"]] == [1, 0]
    assert row["extra_info"]["image_keys"] == ["b", "a"]


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


class Killed(BaseException):
    """Not caught by anything."""


def killing(function: Callable, at: int) -> Callable:
    """The function, which ends the process, as far as it can tell, at its ``at``-th call."""
    calls = iter(range(at + 1))

    def called(*args: Any) -> Any:
        if next(calls, None) == at - 1:
            raise Killed
        return function(*args)

    return called


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
        from pathlib import Path
        sys.path.insert(0, str(Path(sys.argv[1])))
        if __name__ == "__main__":
            import test_data_build as t
            class Slow(t.Made):
                def examples(self):
                    for n, thing in enumerate(super().examples()):
                        if n == 45:
                            print("here", flush=True)
                            time.sleep(60)
                        yield thing
            source = Slow(t.mixed().things)
            t.build(source, Path(sys.argv[2]), t.dataclasses.replace(t.LENIENT, workers=2))
    """)
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py"), str(Path(__file__).parent), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
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
    assert ("goes on" in told) == (how is signal.SIGINT)
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
        assert "goes on" in capsys.readouterr().err
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


def interrupted(out: Path, options: BuildOptions = LENIENT) -> None:
    """A folder that was begun, with some shards."""
    source = mixed()
    stop = dataclasses.replace(example(45), images=(ImageRef("x", path=out / "not there"),))
    source.things[45] = stop
    with refusal("D54"):
        build(source, out, options)
    assert json.loads((out / "progress.json").read_text())["state"]["shards"]


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


# ----------------------------------------------------------------------------------------------- ids, splits, draws


def test_two_records_of_one_id(tmp_path):
    for workers in (1, 2):
        for options in (SMALL, dataclasses.replace(SMALL, limit=2)):
            with refusal("D52", "one id"):
                build(
                    Made([example(1), example(2), LeftOut("e1", "no_object")]),
                    tmp_path / "out",
                    dataclasses.replace(options, workers=workers),
                )


def test_the_same_question_twice(tmp_path):
    things: list[Any] = [example(n, image=n % 2, question=q) for n, q in enumerate(["a?", "a?", " a?\n", "b?", "a? "])]
    made = build(Made(things), tmp_path / "out", dataclasses.replace(SMALL, val_share=0))
    assert left_out(made.folder) == {"e2": "duplicate", "e4": "duplicate"}
    # one that was left out for its box is no earlier one
    things[0] = dataclasses.replace(things[0], boxes=(((3, 3, 3, 9),),))
    made = build(Made(things), tmp_path / "again", dataclasses.replace(SMALL, val_share=0))
    assert left_out(made.folder) == {"e0": "no_box", "e4": "duplicate"}


def splits_of(tmp_path: Path, names: list[str], options: BuildOptions = SMALL) -> dict[str, str]:
    """The split of each image name: that of a row which has this image alone."""
    things: list[Any] = [
        dataclasses.replace(example(n), images=(ImageRef(name, data=picture(n)),)) for n, name in enumerate(names)
    ]
    folder = build(Made(things), tmp_path / f"splits of seed {options.seed}", options).folder
    return {row["extra_info"]["image_keys"][0]: row["extra_info"]["split"] for row in rows(folder)}


def test_a_picture_under_two_names_is_in_one_split(tmp_path):
    things: list[Any] = [
        dataclasses.replace(example(n), images=(ImageRef(f"name {n}", data=picture(n % 25)),)) for n in range(100)
    ]
    made = build(Made(things), tmp_path / "out", SMALL)
    bytes_of = {split: {row["images"][0]["bytes"] for row in rows(made.folder, split)} for split in ("train", "val")}
    assert min(map(len, bytes_of.values())) >= 3
    assert not bytes_of["train"] & bytes_of["val"]
    assert set(left_out(made.folder).values()) == {"image_in_other_split"}
    # the first row of a picture decides; all others of the same split stay
    splits = splits_of(tmp_path, [f"name {n}" for n in range(100)])
    first: dict[int, str] = {}
    for n in range(100):
        split = splits[f"name {n}"]
        assert (f"e{n}" in left_out(made.folder)) == (first.setdefault(n % 25, split) != split)


@settings(PROPERTY, max_examples=25)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True), min_size=2, max_size=12))
def test_train_and_val_share_no_image(pairs):
    things: list[Any] = [
        Example(
            f"e{n}",
            tuple(ImageRef(f"p{i}", data=picture(i // 2)) for i in of_row),
            f"{n}?",
            "a",
            tuple(((0, 0, 20, 20),) for _ in of_row),
            tuple(("t",) for _ in of_row),
            "xyxy",
            "made",
            "sayo/made",
        )
        for n, of_row in enumerate(pairs)
    ]
    with tempfile.TemporaryDirectory() as out:
        try:
            build(Made(things), Path(out), dataclasses.replace(SMALL, val_share=0.5))
            refused = ""
        except SayoError as error:  # no row in train, or names that rows of several images tie together
            refused = error.code
        assert refused in ("", "D52", "D55")
        assert refused != "D52" or any(len(of_row) > 1 for of_row in pairs)
        assert refused != "D55" or not (Path(out) / "train-00000.parquet").exists()
        if refused:
            return
        found = {split: rows(Path(out), split) for split in ("train", "val")}
    for what in (lambda row: row["extra_info"]["image_keys"], lambda row: [i["bytes"] for i in row["images"]]):
        train, val = ({x for row in found[split] for x in what(row)} for split in ("train", "val"))
        assert not train & val
    assert found["train"]


def test_rows_that_tie_images_of_both_splits_together_are_refused(tmp_path):
    names = [f"p{n}" for n in range(40)]
    splits = splits_of(tmp_path, names)
    held = next(n for n in names if splits[n] == "val")
    kept = min(n for n in names if splits[n] == "train")
    low, high = min(held, kept), max(held, kept)

    def of(id: str, *keys: str) -> Example:
        boxes = tuple(((0, 0, 20, 20),) for _ in keys)
        return Example(
            id,
            tuple(ImageRef(k, data=picture(int(k[1:]))) for k in keys),
            id,
            "a",
            boxes,
            tuple(("t",) for _ in keys),
            "xyxy",
            "made",
            "sayo/made",
        )

    for things in ([of("one", low, high), of("two", high)], [of("two", high), of("one", high, low)]):
        with refusal("D52", "train and in val.*--val-share"):
            build(Made(things), tmp_path / things[0].id, SMALL)
    with refusal("D52", "no image"):
        build(Made([Example("none", (), "q", "a", (), (), "xyxy", "m", "sayo/made")]), tmp_path / "none", SMALL)


def test_the_split_is_a_share_of_the_images_that_the_seed_draws(tmp_path):
    names = [f"p{n}" for n in range(150)]
    shares = []
    for seed in (0, 1):
        splits = splits_of(tmp_path, names, dataclasses.replace(SMALL, seed=seed, shard_rows=99))
        shares.append([name for name in names if splits[name] == "val"])
        assert 15 <= len(shares[-1]) <= 45  # of 150; sd 5
    assert shares[0] != shares[1]


def test_a_limit_draws_from_the_whole_source_whatever_its_order(tmp_path):
    source = Made([example(n, image=n) for n in range(60)])
    options = dataclasses.replace(SMALL, limit=20, val_share=0)
    ids = {row["extra_info"]["id"] for row in rows(build(source, tmp_path / "a", options).folder)}
    assert len(ids) == 20
    numbers = sorted(int(id[1:]) for id in ids)
    assert numbers[0] < 15
    assert numbers[-1] > 45
    turned = Made(source.things[::-1])
    found = [row["extra_info"]["id"] for row in rows(build(turned, tmp_path / "b", options).folder)]
    assert set(found) == ids
    assert found == sorted(found, key=lambda id: -int(id[1:]))  # in the order of the source
    other = build(source, tmp_path / "c", dataclasses.replace(options, seed=1))
    assert {row["extra_info"]["id"] for row in rows(other.folder)} != ids
    assert build(source, tmp_path / "d", dataclasses.replace(options, limit=100)).rows["train"] == 60


def test_a_share_draws_at_random_and_goes_before_the_limit(tmp_path):
    source = Made([example(n, image=n) for n in range(200)])
    options = dataclasses.replace(SMALL, share=0.25, seed=3, val_share=0)
    drawn, limited, other = (
        {row["extra_info"]["id"] for row in rows(build(source, tmp_path / name, chosen).folder)}
        for name, chosen in (
            ("a", options),
            ("b", dataclasses.replace(options, limit=190)),
            ("c", dataclasses.replace(options, seed=4)),
        )
    )
    assert 30 < len(drawn) < 70
    assert limited == drawn
    assert other != drawn


def test_a_drawn_build_is_interrupted_like_any_other(tmp_path, monkeypatch):
    options = dataclasses.replace(LENIENT, limit=40, shard_rows=8)
    whole = sums(build(mixed(), tmp_path / "whole", options).folder)
    for at in (8, 27):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", killing(os.fsync, at))
            with pytest.raises(Killed):
                build(mixed(), tmp_path / str(at), options)
        assert sums(build(mixed(), tmp_path / str(at), dataclasses.replace(options, workers=2)).folder) == whole


# ------------------------------------------------------------------------------------------------------- what is lost


def on_disk(tmp_path: Path, n: int = 30) -> Made:
    (tmp_path / "images").mkdir()
    things: list[Any] = []
    for k in range(n):
        path = tmp_path / "images" / f"{k}.png"
        path.write_bytes(picture(k))
        things.append(dataclasses.replace(example(k), images=(ImageRef(f"p{k}", path=path),)))
    return Made(things)


@pytest.mark.parametrize("workers", [1, 2])
def test_missing_images_stop_the_work_and_are_named(tmp_path, workers):
    source = on_disk(tmp_path)
    whole = build(source, tmp_path / "whole", SMALL)
    gone = {n: (tmp_path / "images" / f"{n}.png").read_bytes() for n in (17, 19, 20, 28)}
    for n in gone:
        (tmp_path / "images" / f"{n}.png").unlink()
    options = dataclasses.replace(SMALL, workers=workers)
    with refusal("D54", "images are missing.*17.png.*19.png.*20.png.*28.png.*--allow-missing-images"):
        build(source, tmp_path / "out", options)
    with refusal("D55", "lost.*4 of 30.*image_missing.*wanted at most 1.00%"):
        build(source, tmp_path / "lossy", dataclasses.replace(options, allow_missing_images=True))
    lenient = dataclasses.replace(options, allow_missing_images=True, max_drop=0.2)
    made = build(source, tmp_path / "lossy", lenient)
    assert left_out(made.folder) == {f"e{n}": "image_missing" for n in gone}
    # and with the images back, the first goes on
    for n, data in gone.items():
        (tmp_path / "images" / f"{n}.png").write_bytes(data)
    assert sums(build(source, tmp_path / "out", options).folder) == sums(whole.folder)


def test_what_the_source_misses_counts_as_well(tmp_path):
    things = [example(0), LeftOut("e1", "image_missing", "null"), example(2)]
    with refusal("D54", "e1: null"):
        build(Made(things), tmp_path / "out", SMALL)


def test_rows_that_cannot_be_are_counted(tmp_path):
    gif = io.BytesIO()
    Image.new("RGB", (60, 40)).save(gif, format="GIF")
    broken = {
        "image_empty": b"",
        "image_unreadable": picture(50)[:-60],
        "image_format": gif.getvalue(),
        "image_too_small": picture(51, (20, 60)),
        "image_too_long": picture(52, (28 * 201, 28)),
    }
    things: list[Any] = [example(n) for n in range(60)]
    for n, (_, data) in enumerate(broken.items(), start=3):
        things[n] = dataclasses.replace(example(n), images=(ImageRef(f"broken {n}", data=data),))
    things[20] = example(20, image=b"text, whatever its name says", question="who?")
    things[30], things[31], things[32] = (
        example(30, question=" "),
        example(31, answer=""),
        example(32, question="<|image_pad|>?"),
    )
    things[40] = LeftOut("e40", "unknown_object")
    with refusal("D55", "too many examples are lost.*9 of 59.*1.00%"):
        build(Made(things), tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "manifest.json").exists()
    made = build(Made(things), tmp_path / "out", dataclasses.replace(SMALL, max_drop=0.2))
    assert made.left_out == dict.fromkeys(broken, 1) | {
        "image_format": 2,
        "empty_question": 1,
        "empty_answer": 1,
        "reserved_text": 1,
        "unknown_object": 1,
    }
    assert set(REASONS) > LOSSES


def test_what_is_lost_is_a_share_of_what_was_drawn(tmp_path):
    things: list[Any] = [example(n, image=n) for n in range(40)]
    things += [LeftOut(f"l{n}", "empty_answer") for n in range(40)]  # of the whole source, not of the draw
    options = dataclasses.replace(SMALL, val_share=0)
    assert build(Made(things), tmp_path / "a", dataclasses.replace(options, limit=20)).rows["train"] == 20
    with refusal("D55", "40 of 80"):
        build(Made(things), tmp_path / "b", options)
    assert build(Made(things), tmp_path / "c", dataclasses.replace(options, max_drop=0.5)).rows["train"] == 40


def test_a_source_of_which_most_is_lost_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "ENOUGH_TO_TELL", 20)
    read = []

    def things() -> Iterator[Any]:
        for n in range(1000):
            read.append(n)
            yield example(n, image=b"x" if n % 3 else picture(n), question=f"{n}?")

    source = Made([])
    monkeypatch.setattr(source, "examples", things)
    with refusal("D55", "too many"):
        build(source, tmp_path / "out", SMALL)
    assert len(read) < 50


def test_nothing_in_train(tmp_path):
    with refusal("D55", "no row is left.*no_object"):
        build(Made([LeftOut("a", "no_object")]), tmp_path / "out", SMALL)


# ------------------------------------------------------------------------------------------------------------ mix-ups


@pytest.mark.parametrize("workers", [1, 2])
def test_boxes_in_another_format_stop_the_work(tmp_path, workers):
    wrong = example(5, boxes=(((30, 20, 20, 10),),))
    with refusal("D43", "looks like xywh.*--box-format=xywh"):
        build(
            Made([*(example(n) for n in range(5)), wrong]),
            tmp_path / "out",
            dataclasses.replace(SMALL, workers=workers),
        )
    with refusal("D44", "another size"):
        build(Made([example(0, sizes=((120, 80),))]), tmp_path / "size", dataclasses.replace(SMALL, workers=workers))


@pytest.mark.parametrize("interrupt", [False, True])
@pytest.mark.parametrize("left", [0, 12])
def test_mix_ups_of_many_rows_are_found_whether_interrupted_or_not(tmp_path, monkeypatch, interrupt, left):
    """The rows that tell are among the first: in shards, or left out for their boxes, when the work is interrupted."""
    things: list[Any] = []
    for n in range(190):  # fewer boxes than are needed for a look before the end; sizes that nobody states
        x = (60 - left if n % 2 else 3) if n < 120 else 20
        things.append(example(n, image=n % 40, boxes=(((x, 2 + n % 8, x + 20, 30 + n / 100),),), sizes=()))
    options = dataclasses.replace(SMALL, shard_rows=5)
    if interrupt:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "place_boxes", killing_keywords(pipeline.place_boxes, 170))
            with pytest.raises(Killed):
                build(Made(things), tmp_path / "out", options)
        assert json.loads((tmp_path / "out" / "progress.json").read_text())["state"]["consumed"] > 140
        assert len(left_out(tmp_path / "out")) == (0 if left else 60)
    with refusal("D43", "probably not xyxy.*60 of 190 boxes run out"):
        build(Made(things), tmp_path / "out", options)
    assert build(Made(things[120:]), tmp_path / "right", options).rows["train"] > 40


def killing_keywords(function: Callable, at: int) -> Callable:
    calls = iter(range(at))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return function(*args, **kwargs)

    return called


def test_data_sources_of_verl_are_refused(tmp_path):
    for name in ("openai/gsm8k", "numina_x", "sayo/Upper", "sayo/", "sayo/a b", "sayo/a\n"):
        with refusal("D52", "data source"):
            build(Made([example(0, data_source=name)]), tmp_path / "out", SMALL)


# ------------------------------------------------------------------------------------------------ shards and checks


def test_row_groups_are_capped_by_rows_and_by_bytes(tmp_path):
    noise = [np.random.default_rng(n).integers(0, 255, (60 + 20 * n, 60, 3), dtype=np.uint8) for n in range(12)]
    data = []
    for pixels in noise:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        data.append(out.getvalue())
    things: list[Any] = [example(n, image=d, sizes=()) for n, d in enumerate(data)]
    cap = 90_000
    assert max(map(len, data)) < cap < sum(map(len, data)) / 3
    options = BuildOptions(
        workers=1, val_share=0, row_group_rows=3, row_group_bytes=cap, box_rules=BoxRules(min_area=0)
    )
    made = build(Made(things), tmp_path / "out", options)
    (path,) = made.files["train"]
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(g, columns=["images"]).to_pylist() for g in range(file.num_row_groups)]
        column = next(i for i in range(len(file.schema)) if file.schema.column(i).path.endswith("bytes"))
        assert file.metadata.row_group(0).column(column).compression == "UNCOMPRESSED"
        assert file.metadata.row_group(0).column(column).statistics is None
        assert file.schema_arrow.equals(ROW_SCHEMA)
    sizes = [[len(row["images"][0]["bytes"]) for row in group] for group in groups]
    assert all(len(group) <= 3 and sum(group) <= cap for group in sizes)
    assert all(len(a) == 3 or sum(a) + b[0] > cap for a, b in itertools.pairwise(sizes))  # and no smaller
    assert {2, 3} <= {len(group) for group in sizes}
    assert [row["images"][0]["bytes"] for row in rows(made.folder)] == data


def test_a_shard_that_was_cut_short_is_named(tmp_path):
    folder = build(mixed(), tmp_path / "out", LENIENT).folder
    assert check_folder(folder, hashes=True)["rows"]["train"] > 30
    path = folder / "train-00001.parquet"
    data = path.read_bytes()
    for part in range(16):
        path.write_bytes(data[: len(data) * part // 16])
        with refusal(
            "D56", rf"not complete.*{path.name}.*got {len(data) * part // 16} bytes, wanted {len(data)} bytes"
        ):
            check_folder(folder)
        with refusal("D56"):
            build(mixed(), folder, LENIENT)
    path.write_bytes(data[:-8] + b"\0" * 8)  # of the right size
    with refusal("D56", f"cannot be read.*{path.name}"):
        check_folder(folder)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with refusal("D56", f"was changed.*{path.name}"):
        check_folder(folder, hashes=True)
    path.unlink()
    with refusal("D56", "no file"):
        check_folder(folder)
    assert sums(build(mixed(), folder, dataclasses.replace(LENIENT, overwrite=True)).folder)[path.name] == (
        hashlib.sha256(data).hexdigest()
    )


def test_what_is_written_is_read_back_before_it_counts(tmp_path, monkeypatch):
    sync = os.fsync

    def cutting(handle: int) -> None:
        sync(handle)
        if os.readlink(f"/proc/self/fd/{handle}").endswith("train-00001.parquet.tmp"):
            os.ftruncate(handle, os.fstat(handle).st_size - 100)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cutting)
        with refusal("D56", "cannot be read.*train-00001.parquet.tmp"):
            build(mixed(), tmp_path / "out", LENIENT)
    assert not (tmp_path / "out" / "train-00001.parquet").exists()
    whole = build(mixed(), tmp_path / "whole", LENIENT)
    assert sums(build(mixed(), tmp_path / "out", LENIENT).folder) == sums(whole.folder)


def test_a_full_disk_is_told_and_the_work_goes_on(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with refusal("D56", "No space left on device"):
            build(mixed(), tmp_path / "out", LENIENT)
    assert build(mixed(), tmp_path / "out", LENIENT).rows["train"] > 30


def test_columns_that_differ_are_named(tmp_path):
    folder = build(mixed(), tmp_path / "out", LENIENT).folder
    path = folder / "train-00001.parquet"
    info = ROW_SCHEMA.field("extra_info").type
    whole = pa.struct([f.with_type(pa.list_(pa.list_(pa.list_(pa.int64())))) if f.name == "boxes" else f for f in info])
    schema = ROW_SCHEMA.set(ROW_SCHEMA.get_field_index("extra_info"), pa.field("extra_info", whole))
    found = list(read_rows(folder, [path.name]))
    for row in found:
        row["extra_info"]["boxes"] = [[[0, 0, 1, 1]]]
    pq.write_table(pa.Table.from_pylist(found, schema=schema), path)
    resized(folder, path)
    with refusal("D56", "columns.*extra_info.boxes: 'list<.*int64.*' there, 'list<.*double.*' wanted"):
        check_folder(folder)
    pq.write_table(pa.Table.from_pylist(found[1:], schema=ROW_SCHEMA), path)
    resized(folder, path)
    with refusal("D56", "number of rows.*got 9, wanted 10"):
        check_folder(folder)
    for row in found:
        row["data_source"] = "numina_x"
    pq.write_table(pa.Table.from_pylist(found, schema=ROW_SCHEMA), path)
    resized(folder, path)
    with refusal("D52", "numina_x"):
        check_folder(folder)


def resized(folder: Path, path: Path) -> None:
    told = json.loads((folder / "manifest.json").read_text())
    told["files"][path.name]["size"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(told))


def test_folders_that_are_none(tmp_path):
    folder = build(mixed(), tmp_path / "out", LENIENT).folder
    with refusal("D56", "no prepared folder"):
        check_folder(tmp_path)
    with refusal("D56", "no prepared folder"):
        check_folder(tmp_path / "nowhere")
    for suffix in ("pkl", "pt", "npy"):
        with refusal("D56", "run code"):
            check_folder(tmp_path / f"rows.{suffix}")
    interrupted(tmp_path / "begun")
    with refusal("D56", "not finished.*goes on"):
        check_folder(tmp_path / "begun")
    (folder / "train-00099.parquet").write_bytes(b"x")
    with refusal("D56", "train-00099.parquet"):
        check_folder(folder)
    (folder / "train-00099.parquet").unlink()
    told = json.loads((folder / "manifest.json").read_text())
    for change in ({"files": {"../x.parquet": {"size": 1, "sha256": "", "rows": 1}}}, {"kind": "other"}, {"format": 2}):
        (folder / "manifest.json").write_text(json.dumps(told | change))
        with refusal("D56"):
            check_folder(folder)
    for text in ("{", "[]", "\xff"):
        (folder / "manifest.json").write_text(text, encoding="latin-1")
        with refusal("D56", "cannot be read"):
            check_folder(folder)


class Crash(bytes):
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_worker_that_dies_is_told(tmp_path):
    with refusal("D54", "died.*--workers"):
        build(
            Made([example(0), dataclasses.replace(example(1), images=(ImageRef("x", data=Crash()),))]),
            tmp_path / "out",
            dataclasses.replace(SMALL, workers=2),
        )
    assert build(mixed(), tmp_path / "out", LENIENT).rows["train"] > 30


# ------------------------------------------------------------------------------------------------------------ the rest


def test_flags_and_options_say_the_same():
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep-without-boxes", action="store_true")  # as a source may have it
    add_flags(parser)
    assert options_from(parser.parse_args([])) == BuildOptions()
    given = "--limit 5 --share 0.5 --seed 3 --val-share 0.2 --workers 2 --shard-rows 7 --row-group-rows 3 \
        --row-group-bytes 99 --max-drop 0.5 --box-frame raw --rescale --keep-without-boxes --allow-missing-images \
        --overwrite \
        --image-max-pixels 9 --image-min-side 2 --image-max-ratio 3 --box-min-area-left 0.1 --box-merge-iou 0.2 \
        --box-max-area 0.3 --box-min-area 0.04 --instruction Think"
    wanted = BuildOptions(
        5,
        0.5,
        3,
        0.2,
        2,
        7,
        3,
        99,
        0.5,
        "raw",
        True,
        True,
        "Think",
        True,
        True,
        ImageRules(9, 2, 3),
        BoxRules(0.1, 0.2, 0.3, 0.04),
    )
    assert options_from(parser.parse_args(given.split())) == wanted
    names = {f.name for f in dataclasses.fields(BuildOptions)} - {"prompt"}  # which leaves no room for an instruction
    assert all(getattr(wanted, name) != getattr(BuildOptions(), name) for name in names)
    assert options_from(parser.parse_args(["--prompt", "released"])) == BuildOptions(prompt="released")
    assert "--box-frame" in parser.format_help()


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": -1},
        {"share": 0},
        {"share": 1.1},
        {"val_share": 1},
        {"val_share": -0.1},
        {"workers": -1},
        {"max_drop": 1.5},
        {"box_frame": "x"},
        {"shard_rows": 0},
        {"row_group_rows": 0},
        {"row_group_bytes": 0},
        {"instruction": "<image>"},
        {"prompt": "ours"},
        {"instruction": "Think", "prompt": "released"},
    ],
)
def test_options_out_of_range(wrong):
    with refusal("D57", f"--{next(iter(wrong)).replace('_', '-')}"):
        BuildOptions(**wrong)


def test_the_line_for_verl_survives_shell_and_hydra():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for folder in ("/data/a", "/data/with space/x=1", '/data/q"u', "/data/it's,$HOME{}[]\\ü"):
        files = {split: [Path(folder) / f"{split}-{n:05d}.parquet" for n in range(2)] for split in ("train", "val")}
        parsed = OverridesParser.create().parse_overrides(shlex.split(verl_flags(files)))
        assert [override.key_or_group for override in parsed] == ["data.train_files", "data.val_files"]
        assert [override.value() for override in parsed] == [[str(p) for p in files[s]] for s in ("train", "val")]


def test_a_folder_without_validation_rows_says_so(tmp_path, capsys):
    made = build(Made([example(0)]), tmp_path / "out", dataclasses.replace(SMALL, val_share=0))
    told = capsys.readouterr().err
    assert "no image was held out" in told
    assert "val_files" not in told
    assert made.files["val"] == []


def test_progress_without_a_terminal_is_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sayo_verl.data.building.meter.EVERY", 0)
    build(mixed(), tmp_path / "out", LENIENT)
    told = capsys.readouterr().err
    assert "sayo prepare made: 59 examples, 53 rows, 7 left out" in told
    assert "image_unreadable" in told
    assert "data.train_files=[" in told


@PROPERTY
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 50), max_size=200))
def test_hashes_are_a_set(values):
    ours, wanted = Hashes(), set()
    for value in values:
        assert ours.add(value) == (max(value, 1) not in wanted)
        wanted.add(max(value, 1))  # 0 and 1 are one
    assert len(ours) == len(wanted)
    assert all(value in ours for value in values)
    assert all((value ^ 1 << 63) in ours or (value ^ 1 << 63) not in wanted for value in values)


def test_many_hashes():
    numbers = [hash64(str(n)) for n in range(3000)]
    ours = Hashes()
    assert all(ours.add(number) for number in numbers)
    assert not any(ours.add(number) for number in numbers)
    assert not any(hash64(str(n)) in ours for n in range(3000, 6000))
    assert len(ours) == 3000
