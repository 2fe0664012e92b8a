"""Ids, splits and draws of a build; its shards and their checks."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.builds import (
    LENIENT,
    PROPERTY,
    SMALL,
    Killed,
    Made,
    example,
    interrupted,
    killing,
    left_out,
    mixed,
    picture,
    rows,
    sums,
)
from support.refusals import refusal

from sayo_verl.data.boxes import BoxRules
from sayo_verl.data.building.build import BuildOptions, build, check_folder
from sayo_verl.data.building.shards import read_rows
from sayo_verl.data.rows import ROW_SCHEMA, Example, ImageRef, LeftOut
from sayo_verl.errors import SayoError

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
    with refusal("D56", "not finished.*resumes"):
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


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_one_image_is_held_out_where_the_share_of_few_images_is_less_than_one(tmp_path, capsys, seed):
    six = Made([example(n, image=n) for n in range(6)])
    made = build(six, tmp_path / "out", dataclasses.replace(SMALL, val_share=0.001, seed=seed))
    assert made.rows == {"train": 5, "val": 1}
    said = capsys.readouterr().err
    assert "--val-share 0.001 of 6 images is less than one image: one is held out" in said
    assert "box format xyxy: 6 different boxes in 6 rows fit it, too few to tell it from other formats" in said
    assert build(six, tmp_path / "none", dataclasses.replace(SMALL, val_share=0)).rows == {"train": 6, "val": 0}
    alone = build(Made([example(0)]), tmp_path / "alone", dataclasses.replace(SMALL, val_share=0.001, seed=seed))
    assert alone.rows == {"train": 1, "val": 0}  # nothing would be left to train on
