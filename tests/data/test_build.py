"""A build: which rows there are, of which split, with which images and boxes, and what stops it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from datasets import Value
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builds import FIFTH, PROPERTY, Made, bare, example, left_out, picture, rows
from support.refusals import refusal

from sayo_verl.data import build as module
from sayo_verl.data.build import BuildOptions, build
from sayo_verl.data.contract import Demands, RowContract
from sayo_verl.data.rows import Example, ImageRef, LeftOut
from sayo_verl.errors import SayoError


def ids(folder: Path, split: str = "*") -> list[str]:
    return [row["extra_info"]["id"] for row in rows(folder, split)]


def make(things: list[Example | LeftOut], out: Path, options: BuildOptions = FIFTH, **changes) -> Path:
    return build(Made(things), out, dataclasses.replace(options, **changes)).folder


# ------------------------------------------------------------------------------------------------------------ rows


def test_every_row_holds_to_the_contract_and_says_where_it_is_from(tmp_path):
    made = build(Made([example(n) for n in range(40)]), tmp_path / "out", FIFTH)
    assert made.rows["train"] + made.rows["val"] == 40
    assert made.rows["val"] >= 1
    for split in ("train", "val"):
        contract = RowContract(Demands())
        for row in rows(made.folder, split):
            assert not contract.look(row, "row").faults
            assert row["extra_info"]["split"] == split
    row = next(row for row in rows(made.folder) if row["extra_info"]["id"] == "e5")
    assert row["images"] == [{"bytes": picture(2), "path": None}]
    assert row["reward_model"] == {"style": "rule", "ground_truth": "a5"}
    assert row["extra_info"]["boxes"] == [[[5 / 60, 3 / 40, 35 / 60, 33 / 40]]]
    assert row["extra_info"]["image_size_wh"] == [[60, 40]]
    assert row["prompt"][0]["content"].startswith("<image>what is 5?\nThink first")


def test_worker_processes_make_the_rows_of_one_process(tmp_path, monkeypatch):
    things = [example(n, n // 20) for n in range(4 * module.GROUP_ROWS)]
    several = make(things, tmp_path / "several", skip_missing=True)
    monkeypatch.setattr(module, "_processes", lambda rows: None)
    assert rows(several) == rows(make(things, tmp_path / "one", skip_missing=True))


def test_rows_go_into_several_files_with_small_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 10)
    monkeypatch.setattr(module, "GROUP_ROWS", 4)
    made = build(Made([example(n) for n in range(25)]), tmp_path / "out", dataclasses.replace(FIFTH, val_share=0))
    assert [file.name for file in made.files["train"]] == [f"train-0000{i}.parquet" for i in range(3)]
    assert ids(made.folder) == [f"e{n}" for n in range(25)]
    first = pq.ParquetFile(made.files["train"][0]).metadata
    assert [first.row_group(n).num_rows for n in range(first.num_row_groups)] == [4, 4, 2]


def test_the_messages_columns_and_fields_of_a_source_are_kept(tmp_path):
    prompt = ({"role": "system", "content": "s"}, {"role": "user", "content": "look <image> here"})
    extra = {"key_word": "red", "index": 99}
    thing = example(0, prompt=prompt, extra=extra, columns={"ability": "math", "level": 3})
    source = Made([thing, example(9)], extra_features={"key_word": Value("string"), "index": Value("int64")})
    source.column_features = {"level": Value("int64"), "ability": Value("string")}
    row, other = rows(build(source, tmp_path / "out", dataclasses.replace(FIFTH, val_share=0)).folder)
    assert row["prompt"] == list(prompt)
    assert (row["ability"], row["level"], row["extra_info"]["key_word"]) == ("math", 3, "red")
    assert (other["ability"], other["level"], other["extra_info"]["key_word"]) == ("vqa", None, None)


@pytest.mark.parametrize(
    ("prompt", "content"),
    [("question", "<image>what is 0?"), ("Look. {question} Answer:", "<image>Look. what is 0? Answer:")],
)
def test_the_prompt_is_a_template(tmp_path, prompt, content):
    (row,) = rows(make([example(0)], tmp_path / "out", prompt=prompt))
    assert row["prompt"] == [{"role": "user", "content": content}]


def test_the_released_prompt_has_a_system_turn(tmp_path):
    (row,) = rows(make([example(0)], tmp_path / "out", prompt="released"))
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]


# ---------------------------------------------------------------------------------------------------------- images


def files_of(folder: Path, n: int, **values) -> Example:
    path = folder / f"{n}.png"
    path.write_bytes(picture(n))
    return example(n, images=(ImageRef(path.name, path),), **values)


def test_linked_images_are_paths_that_verl_opens(tmp_path):
    things = [files_of(tmp_path, 0), example(5)]
    folder = make(things, tmp_path / "out", val_share=0, link=True)
    first, second = rows(folder)
    assert first["images"] == [{"image": str(tmp_path / "0.png")}]
    stored = Path(second["images"][0]["image"])  # it was no file, and is one now
    assert stored.parent == folder / "images"
    assert stored.read_bytes() == picture(2)
    contract = RowContract(Demands())
    assert not [fault for row in (first, second) for fault in contract.look(row, "row").faults]


def test_missing_images_are_named_and_nothing_is_written(tmp_path):
    gone = [example(n, images=(ImageRef(f"{n}.png", tmp_path / f"{n}.png"),)) for n in range(40, 48)]
    with refusal("D54", "8: .*40.png; .*41.png.*--skip-missing"):
        make([example(0), *gone], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    folder = make([example(0), *gone], tmp_path / "out", skip_missing=True, max_drop=0.9)
    assert left_out(folder) == {f"e{n}": "image_missing" for n in range(40, 48)}


def test_unusable_images_and_texts_are_counted_up_to_a_share(tmp_path):
    things = [example(n) for n in range(20)]
    things[3] = example(3, picture(99)[:-40])
    things[4] = example(4, b"GIF89a")
    things[5] = example(5, question="what <image> is it?")
    things[6] = example(6, answer=" ")
    with refusal("D55", "image_unreadable.*at most 10.00% of 20.*--max-drop"):
        make(things, tmp_path / "out")
    reasons = left_out(make(things, tmp_path / "out", max_drop=0.2))
    assert reasons == {"e3": "image_unreadable", "e4": "image_format", "e5": "reserved_text", "e6": "empty_answer"}


# ----------------------------------------------------------------------------------------------------------- boxes


def test_a_region_that_loses_a_box_is_left_out_and_listed(tmp_path):
    two = (((5, 5, 20, 30), (0, 0, 60, 40)),)
    things = [example(0), example(1, boxes=two, box_names=(("a", "b"),))]
    folder = make(things, tmp_path / "out", val_share=0)
    assert ids(folder) == ["e0"]
    line = json.loads((folder / "left_out.jsonl").read_text())
    assert line == {"id": "e1", "reason": "box_too_large", "detail": "1 of 2 boxes"}
    kept = rows(make(things, tmp_path / "all", val_share=0, keep_without_boxes=True))[1]
    assert kept["extra_info"]["boxes"] == kept["extra_info"]["box_names"] == [[]]


def test_a_box_that_is_named_twice_is_one_box(tmp_path):
    twice = (((5, 5, 20, 30), (5, 5, 20, 30)),)
    (row,) = rows(make([example(0, boxes=twice, box_names=(("a", "b"),))], tmp_path / "out"))
    assert row["extra_info"]["boxes"] == [[[5 / 60, 5 / 40, 20 / 60, 30 / 40]]]


def test_rows_without_boxes_are_kept_on_request_or_by_their_nature(tmp_path):
    things = [example(0), bare(3), bare(6, neutral=True)]
    folder = make(things, tmp_path / "some", val_share=0)
    assert ids(folder) == ["e0", "e6"]
    assert left_out(folder) == {"e3": "no_box"}
    assert len(ids(make(things, tmp_path / "all", keep_without_boxes=True))) == 3
    with refusal("D55", "no training row is left.*no_box.*--keep-without-boxes"):
        make([bare(3)], tmp_path / "none")


def test_implausible_boxes_are_built_only_if_they_are_trusted(tmp_path):
    # corners read as corner and extent: many boxes leave the picture
    things = [example(n, boxes=(((20 + n % 5 / 2, 14 + n / 40, 45, 32),),), box_format="xywh") for n in range(40)]
    with refusal("D43", "xywh: .*--trust-boxes"):
        make(things, tmp_path / "out")
    manifest = json.loads((make(things, tmp_path / "out", trust_boxes=True, max_drop=1) / "manifest.json").read_text())
    assert manifest["options"]["trust_boxes"] is True


# ---------------------------------------------------------------------------------------------------------- splits


@settings(PROPERTY, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=12), st.floats(0, 1))
def test_no_picture_is_in_both_splits(tmp_path_factory, images, share):
    things = [
        example(
            n,
            images=tuple(ImageRef(f"p{i}", data=picture(i)) for i in of),
            boxes=((),) * len(of),
            box_names=((),) * len(of),
            sizes=(),
        )
        for n, of in enumerate(images)
    ]
    options = BuildOptions(val_share=share, keep_without_boxes=True)
    try:
        folder = build(Made(things), tmp_path_factory.mktemp("split") / "out", options).folder
    except SayoError as error:
        if error.code != "D55":  # every picture of training is also one of validation
            raise
        return
    seen = {
        split: {image["bytes"] for row in rows(folder, split) for image in row["images"]} for split in ("train", "val")
    }
    assert seen["train"].isdisjoint(seen["val"])
    assert len(ids(folder)) + len(left_out(folder)) == len(things)


def test_at_least_one_picture_is_held_out_and_all_on_request(tmp_path):
    things = [example(n) for n in range(6)]
    assert len(ids(make(things, tmp_path / "few", val_share=1e-9), "val")) == 2  # the rows of one picture
    folder = make(things, tmp_path / "all", val_share=1)
    assert (len(ids(folder, "train")), len(ids(folder, "val"))) == (0, 6)


def test_a_source_may_name_the_splits_and_training_rows_give_way(tmp_path):
    things = [example(n, split="val" if n == 9 else "train") for n in range(10)]  # e8 has the picture of e9
    folder = make(things, tmp_path / "out", val_share=0.5)
    assert ids(folder, "val") == ["e9"]
    assert left_out(folder) == {"e8": "image_in_other_split"}
    with refusal("D55", "no training row is left.*1 image_in_other_split"):
        make(things[8:], tmp_path / "none")


def test_the_same_question_about_the_same_picture_is_taken_once(tmp_path):
    things = [example(0), example(1, question="what is 0?"), example(7, question="what is 0?")]
    folder = make(things, tmp_path / "out", val_share=0)
    assert ids(folder) == ["e0", "e7"]
    assert left_out(folder) == {"e1": "duplicate"}


def test_a_limit_draws_by_the_seed_from_the_whole_source(tmp_path):
    things = [example(n) for n in range(100)]
    drawn = [ids(make(things, tmp_path / str(i), limit=10, seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert [len(found) for found in drawn] == [10, 10, 10]
    assert drawn[0] == drawn[1] != drawn[2]
    assert max(int(name[1:]) for name in drawn[0]) > 40
    assert ids(make(things, tmp_path / "share", limit=0.1, seed=1)) == drawn[2]


# -------------------------------------------------------------------------------------------------- what stops a build


def test_two_records_of_one_id_are_refused(tmp_path):
    with refusal("D52", "one id.*made e1"):
        make([example(1), example(1)], tmp_path / "out")


def test_what_the_source_leaves_out_is_no_loss(tmp_path):
    things = [example(0), *(LeftOut(f"x{n}", "no_object", "why") for n in range(30))]
    assert set(left_out(make(things, tmp_path / "out")).values()) == {"no_object"}
    with refusal("D55", "no training row is left.*30 no_object"):
        make(things[1:], tmp_path / "none")
    with refusal("D55", "has no record"):
        make([], tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", -1),
        ("limit", 1.5),
        ("limit", float("nan")),
        ("limit", float("inf")),
        ("val_share", 1.5),
        ("max_drop", -0.1),
        ("prompt", "Look."),
        ("prompt", "{question}<image>"),
        ("box_frame", "left"),
    ],
)
def test_an_option_out_of_range_is_refused_by_its_flag(name, value):
    with refusal("D57", f"--{name.replace('_', '-')}"):
        BuildOptions(**{name: value})


def test_two_prompts_of_one_question_are_two_rows(tmp_path):
    prompts = [({"role": "user", "content": f"<image>hint {n}"},) for n in range(2)]
    things = [example(n, question="what?", prompt=prompt) for n, prompt in enumerate(prompts)]
    assert ids(make(things, tmp_path / "out", val_share=0)) == ["e0", "e1"]


def test_ids_may_repeat_in_another_split_and_data_source(tmp_path):
    things = [example(0, split="train"), example(0, 5, split="val"), example(0, 7, data_source="sayo/other")]
    assert len(ids(make(things, tmp_path / "out"))) == 3


def test_a_limit_leaves_named_validation_rows_alone(tmp_path):
    things = [example(n, split="val" if n >= 20 else "train") for n in range(30)]
    made = build(Made(things), tmp_path / "out", dataclasses.replace(FIFTH, limit=4))
    assert made.rows == {"train": 4, "val": 10}


def test_columns_of_a_source_may_have_any_name(tmp_path):
    source = Made([example(0, columns={"_reason": "mine"})], column_features={"_reason": Value("string")})
    (row,) = rows(build(source, tmp_path / "out", FIFTH).folder)
    assert row["_reason"] == "mine"


def test_replacing_a_linked_folder_by_its_own_rows_keeps_the_pictures(tmp_path):
    folder = make([example(0)], tmp_path / "out", link=True)
    (row,) = rows(folder)
    path = Path(row["images"][0]["image"])
    again = [example(0, images=(ImageRef("p0", path),))]
    (row,) = rows(make(again, folder, link=True, overwrite=True))
    assert Path(row["images"][0]["image"]).read_bytes() == picture(0)


def test_text_that_cannot_be_stored_is_one_line(tmp_path):
    with refusal("D98", "surrogates not allowed"):
        make([example(0, question="what \ud800?")], tmp_path / "out")


@pytest.mark.parametrize("reading", ["records", "images"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_and_no_folder_and_starting_again_works(tmp_path, how, reading):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from support.builds import FIFTH, Made, example
        from sayo_verl.data import build as module, make_row
        class Slow(Made):
            def examples(self):
                for n in range(300):
                    yield example(n, n // 100)
                if sys.argv[2] == "records":
                    print("here", flush=True)
                    time.sleep(60)
        def slow(ref):
            print("here", flush=True)
            time.sleep(60)
        make_row.image_bytes = slow
        module._processes = lambda rows: 2
        sys.exit(module.build(Slow([]), Path(sys.argv[1]), FIFTH))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out"), reading],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits an ignored one
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("here")  # two workers may say it at once
    children = psutil.Process(process.pid).children(recursive=True)
    assert bool(children) == (reading == "images")
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == -how  # of SIGINT: Python ends so for a KeyboardInterrupt that nobody catches
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert not (tmp_path / "out").exists()
    assert ids(make([example(0)], tmp_path / "out")) == ["e0"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
