"""Folders of rows: the same bytes however they come about, nothing repeated, nothing lost without a reason."""

import argparse
import dataclasses
import hashlib
import io
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.builds import (
    LENIENT,
    PROPERTY,
    SMALL,
    Killed,
    Made,
    example,
    left_out,
    mixed,
    picture,
    rows,
    sums,
)
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.data.boxes import BoxRules
from sayo_verl.data.building import build as build_module
from sayo_verl.data.building import pipeline
from sayo_verl.data.building.build import BuildOptions, add_flags, build, options_from
from sayo_verl.data.building.folder import verl_flags
from sayo_verl.data.building.options import LOSSES
from sayo_verl.data.building.shards import Hashes, hash64
from sayo_verl.data.check import check_parquet
from sayo_verl.data.contract import Demands
from sayo_verl.data.images import ImageRules
from sayo_verl.data.rows import INSTRUCTION, REASONS, RELEASED_SYSTEM, Example, ImageRef, LeftOut
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.launch.split_check import check_leakage

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
