"""Mixtures of prepared folders: exact counts, uniform draws, held-out pictures apart across the parts."""

import argparse
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builds import Killed, killing, picture, sums
from support.refusals import refusal

from sayo_verl.data.building import mix
from sayo_verl.data.building.build import BuildOptions, build
from sayo_verl.data.building.folder import check_folder
from sayo_verl.data.building.mix import mix_folders
from sayo_verl.data.building.shards import Layout, read_rows
from sayo_verl.data.building.shares import check_shares, largest_remainder, train_counts, val_counts
from sayo_verl.data.rows import Example, ImageRef
from sayo_verl.errors import SayoError
from sayo_verl.inspection.audit import Audit
from sayo_verl.inspection.files import find_data
from sayo_verl.launch.split_check import check_leakage

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SMALL = Layout(shard_rows=7, row_group_rows=3)


@dataclasses.dataclass
class Pictures:
    """Two questions about each of some pictures."""

    name: str
    pictures: range

    def facts(self) -> dict[str, Any]:
        return {"pictures": str(self.pictures)}

    def examples(self) -> Iterator[Example]:
        for n in self.pictures:
            for q in "ab":
                box = (n % 10, 2, n % 10 + 20, 22)
                yield Example(
                    f"{n}{q}",
                    (ImageRef(f"p{n}", data=picture(n)),),
                    f"{self.name} {n} {q}?",
                    q,
                    ((box,),),
                    (("thing",),),
                    "xyxy",
                    "made",
                    f"sayo/{self.name}",
                )


def prepared(folder: Path, name: str, pictures: range, val_share: float = 0.2, **options: Any) -> Path:
    return build(
        Pictures(name, pictures),
        folder / name,
        BuildOptions(workers=1, shard_rows=9, row_group_rows=4, val_share=val_share, **options),
    ).folder


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return list(read_rows(folder, [path.name for path in sorted(folder.glob(f"{split}-*.parquet"))]))


def ids(folder: Path, split: str) -> list[str]:
    return [row["extra_info"]["id"] for row in rows(folder, split)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three folders; a and b have pictures 20 to 29 in common, and hold different ones of them out."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "a": prepared(folder, "a", range(30)),
        "b": prepared(folder, "b", range(20, 60), seed=1),
        "c": prepared(folder, "c", range(100, 110), val_share=0),
    }


# -------------------------------------------------------------------------------------------------------------- counts


@PROPERTY
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 1000))
def test_largest_remainder_adds_up_and_is_within_one_row_of_each_share(weights, rows):
    shares = {str(n): Fraction(weight, sum(weights)) for n, weight in enumerate(weights)}
    counts = largest_remainder(shares, rows)
    assert sum(counts.values()) == rows
    assert all(abs(counts[part] - share * rows) < 1 for part, share in shares.items())


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=5), st.integers(1, 200))
def test_a_part_with_too_few_rows_stops_the_work_which_says_how_many_there_can_be(given_parts, rows):
    total = sum(weight for weight, _ in given_parts)
    shares: dict[str, Any] = {str(n): Fraction(weight, total) for n, (weight, _) in enumerate(given_parts)}
    there = {str(n): rows_there for n, (_, rows_there) in enumerate(given_parts)}
    try:
        counts = train_counts(shares, rows, there)
    except SayoError as error:
        most = int(str(error.fix).split("--rows to ")[1].split()[0])
        assert most < rows
        if most:
            assert sum(train_counts(shares, most, there).values()) == most
        return
    assert sum(counts.values()) == rows
    assert all(counts[part] <= there[part] for part in shares)


def test_all_and_rest():
    there = {"a": 30, "b": 1000, "c": 1000}
    assert train_counts({"a": "all", "b": "rest"}, 100, there) == {"a": 30, "b": 70}
    assert train_counts({"b": 0.75, "a": "all", "c": 0.25}, 70, there) == {"b": 30, "a": 30, "c": 10}
    assert train_counts({"a": "all"}, 30, there) == {"a": 30}
    assert train_counts({"a": "all", "b": "rest"}, 30, there) == {"a": 30, "b": 0}
    for shares, rows in (({"a": "all"}, 31), ({"a": "all"}, 29), ({"a": "all", "b": "rest"}, 29)):
        with refusal("D57", "30 there"):
            train_counts(shares, rows, there)
    with refusal("D57", "b has 1000 rows, 1970 wanted.*--rows to 1030 or less"):
        train_counts({"a": "all", "b": "rest"}, 2000, there)


def test_validation_rows_are_as_many_as_the_shares_allow():
    assert val_counts({"a": 300, "b": 100}, -1, {"a": 60, "b": 100}) == {"a": 60, "b": 20}
    assert val_counts({"a": 300, "b": 100}, 8, {"a": 60, "b": 100}) == {"a": 6, "b": 2}
    assert val_counts({"a": 300, "b": 100}, -1, {"a": 60, "b": 0}) == {"a": 60, "b": 0}
    assert val_counts({"a": 300, "b": 0}, -1, {"a": 5, "b": 9}) == {"a": 5, "b": 0}
    assert val_counts({"a": 300, "b": 100}, -1, {"a": 0, "b": 0}) == {"a": 0, "b": 0}
    with refusal("D57", "held out too few.*at most 80"):
        val_counts({"a": 300, "b": 100}, 81, {"a": 60, "b": 100})


@pytest.mark.parametrize(
    "shares",
    [
        {"a": 0.5, "b": 0.4},
        {"a": 0.5, "b": "rest"},
        {"a": "rest", "b": "rest"},
        {},
        {"a": 0.0, "b": 1},
        {"a": -0.5, "b": 1.5},
        {"a": "half", "b": 0.5},
        {"a": float("nan"), "b": 0.5},
        {"a": "all", "b": 0.5},
    ],
)
def test_shares_that_do_not_add_up(shares):
    with refusal("D57", "--mix"):
        check_shares(shares)


# ---------------------------------------------------------------------------------------------------------- the folder


def test_rows_are_those_of_the_parts(parts, tmp_path):
    made = mix_folders({"a": (parts["a"], 0.3), "b": (parts["b"], 0.7)}, 40, tmp_path / "out", 3, layout=SMALL)
    drawn = Counter(id.split("/")[0] for id in ids(made.folder, "train"))
    assert drawn == {"a": 12, "b": 28}
    assert made.rows["train"] == 40
    for split in ("train", "val"):
        found = rows(made.folder, split)
        assert [row["extra_info"]["index"] for row in found] == list(range(len(found)))
        origin = {f"{part}/{row['extra_info']['id']}": row for part in "ab" for row in rows(parts[part], split)}
        for row in found:
            there = origin[row["extra_info"]["id"]]
            part = row["extra_info"]["id"].split("/")[0]
            info = there["extra_info"] | {
                "id": row["extra_info"]["id"],
                "index": row["extra_info"]["index"],
                "image_keys": [f"{part}/{key}" for key in there["extra_info"]["image_keys"]],
            }
            assert row == there | {"extra_info": info}
        for part in "ab":  # within a part, its order
            order = [id for id in origin if id.startswith(part)]
            of_part = [row["extra_info"]["id"] for row in found if row["extra_info"]["id"].startswith(part)]
            assert of_part == sorted(of_part, key=order.index)
    owners = [id[0] for id in ids(made.folder, "train")]
    changes = sum(x != y for x, y in itertools.pairwise(owners))
    assert changes >= 8  # of about 17; not one part after the other
    told = check_folder(made.folder, hashes=True)
    assert told["parts"]["a"]["train"] == 12
    assert told["tally"] == {"examples": sum(made.rows.values()), "boxes": sum(made.rows.values()), "without_boxes": 0}
    findings, _ = Audit(find_data([made.folder])).run()
    assert not [finding for finding in findings.sorted() if finding.level == "FAIL"]


def test_the_draw_of_a_part_depends_on_the_seed_alone_and_repeats_nothing(parts, tmp_path):
    made = mix_folders({"b": (parts["b"], 0.5), "c": (parts["c"], 0.5)}, 20, tmp_path / "out", 5)
    alone = mix_folders({"b": (parts["b"], 1)}, 10, tmp_path / "alone", 5)
    drawn = {part: [id for id in ids(made.folder, "train") if id.startswith(part)] for part in "bc"}
    assert set(drawn["b"]) == set(ids(alone.folder, "train"))
    assert [len(set(of_part)) for of_part in drawn.values()] == [10, 10]
    other = mix_folders({"b": (parts["b"], 0.5), "c": (parts["c"], 0.5)}, 20, tmp_path / "other", 6)
    assert set(ids(other.folder, "train")) != set(ids(made.folder, "train"))
    assert len(set(ids(other.folder, "train"))) == 20


def test_the_order_of_the_parts_decides_nothing(parts, tmp_path):
    given = {"a": (parts["a"], 0.5), "b": (parts["b"], 0.5)}
    one = mix_folders(given, 30, tmp_path / "one", layout=SMALL)
    two = mix_folders(dict(reversed(given.items())), 30, tmp_path / "two", layout=SMALL)
    assert sums(one.folder) == sums(two.folder)


def test_a_picture_held_out_in_one_part_is_in_no_other_ones_train(parts, tmp_path):
    shared = {picture(n) for n in range(20, 30)}
    held = {part: {row["images"][0]["bytes"] for row in rows(parts[part], "val")} & shared for part in "ab"}
    crossing = {
        f"{part}/{row['extra_info']['id']}"
        for part, other in ("ab", "ba")
        for row in rows(parts[part], "train")
        if row["images"][0]["bytes"] in held[other]
    }
    assert len(crossing) >= 2
    made = mix_folders({"a": (parts["a"], "all"), "b": (parts["b"], "rest")}, 75, tmp_path / "out", layout=SMALL)
    noted = [json.loads(line) for line in (made.folder / "left_out.jsonl").read_text().splitlines()]
    assert {line["id"] for line in noted} == crossing
    assert made.left_out == {"image_in_other_split": len(crossing)}
    train, val = ({row["images"][0]["bytes"] for row in rows(made.folder, split)} for split in ("train", "val"))
    assert not train & (val | held["a"] | held["b"])
    assert train & shared
    check_leakage(made.files["train"], made.files["val"], image_key="images", max_images=1000)
    # all is all that may be taken
    n_a = len(ids(parts["a"], "train")) - sum(id.startswith("a/") for id in crossing)
    assert Counter(id[0] for id in ids(made.folder, "train")) == {"a": n_a, "b": 75 - n_a}


def test_too_few_rows(parts, tmp_path):
    with refusal("D57", "c has 20 rows, 30 wanted.*--rows to 40 or less"):
        mix_folders({"b": (parts["b"], 0.5), "c": (parts["c"], 0.5)}, 60, tmp_path / "out")
    made = mix_folders({"b": (parts["b"], 0.5), "c": (parts["c"], 0.5)}, 40, tmp_path / "out")  # the same folder
    assert made.rows["train"] == 40
    assert {id[0] for id in ids(made.folder, "val")} == {"b"}  # c held nothing out
    with refusal("D57", "--val-rows"):
        mix_folders({"b": (parts["b"], 1)}, 40, tmp_path / "val", val_rows=500)
    assert mix_folders({"b": (parts["b"], 1)}, 40, tmp_path / "val", val_rows=3).rows == {"train": 40, "val": 3}


def test_what_is_no_part(parts, tmp_path):
    with refusal("D56", "no prepared folder"):
        mix_folders({"x": (tmp_path, 1)}, 10, tmp_path / "out")
    with refusal("D56", "run code"):
        mix_folders({"x": (tmp_path / "rows.pkl", 1)}, 10, tmp_path / "out")
    with refusal("D57", "two parts"):
        mix_folders({"x": (parts["a"], 0.5), "y": (parts["a"], 0.5)}, 10, tmp_path / "out")
    with refusal("D57", "not plain"):
        mix_folders({"x/y": (parts["a"], 1)}, 10, tmp_path / "out")
    for rows_wanted, val_rows in ((0, -1), (10, -2)):
        with refusal("D57", "out of range"):
            mix_folders({"x": (parts["a"], 1)}, rows_wanted, tmp_path / "out", val_rows=val_rows)
    copy = prepared(tmp_path, "copy", range(10))
    shard = copy / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with refusal("D56", "not complete.*train-00000"):
        mix_folders({"x": (copy, 1)}, 10, tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("at", [1, 12, 40])
def test_an_interrupted_mixture_goes_on_to_the_same_bytes(parts, tmp_path, monkeypatch, at):
    given = {"a": (parts["a"], 0.3), "b": (parts["b"], 0.7)}
    whole = sums(mix_folders(given, 30, tmp_path / "whole", layout=SMALL).folder)
    assert "left_out.jsonl" in whole
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killing(os.fsync, at))
        with pytest.raises(Killed):
            mix_folders(given, 30, tmp_path / "out", layout=SMALL)
    assert sums(mix_folders(given, 30, tmp_path / "out", layout=SMALL).folder) == whole


def test_a_finished_mixture_is_taken_as_it_is_and_others_are_refused(parts, tmp_path, monkeypatch, capsys):
    given = {"a": (parts["a"], 0.5), "b": (parts["b"], 0.5)}
    made = mix_folders(given, 30, tmp_path / "out", layout=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(mix, "read_rows", None)  # nothing may be read
        assert mix_folders(given, 30, tmp_path / "out", layout=SMALL).reused
    assert "data.train_files=[" in capsys.readouterr().err
    with refusal("D53", "options.rows: 30 there, 31 now"):
        mix_folders(given, 31, tmp_path / "out", layout=SMALL)
    with refusal("D53", "parts.b.share: '0.5' there, 'rest' now"):
        mix_folders({"a": (parts["a"], "all"), "b": (parts["b"], "rest")}, 30, tmp_path / "out", layout=SMALL)
    with refusal("D53", "parts.b.manifest"):
        mix_folders({"a": (parts["a"], 0.5), "b": (parts["c"], 0.5)}, 30, tmp_path / "out", layout=SMALL)
    with refusal("D53"):  # a folder that was prepared from a source
        mix_folders(given, 30, parts["c"], layout=SMALL)
    over = mix_folders(given, 31, tmp_path / "out", layout=SMALL, overwrite=True)
    assert (made.rows["train"], over.rows["train"]) == (30, 31)


# --------------------------------------------------------------------------------------------------------------- flags


def parsed(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=mix.__doc__)
    mix.add_flags(parser)
    assert "--val-rows" in parser.format_help()
    return parser.parse_args(given)


def test_the_command_line(parts, tmp_path):
    folders = ("--from", f"a={parts['a']}", "--from", f"b={parts['b']}", "--rows", "30")
    made = mix.from_args(parsed(*folders, "--mix", "a=0.5,b=0.5", "--out", str(tmp_path / "out"), "--seed", "4"))
    wanted = mix_folders({"a": (parts["a"], 0.5), "b": (parts["b"], 0.5)}, 30, tmp_path / "wanted", 4)
    assert sums(made.folder) == sums(wanted.folder)
    again = mix.from_args(
        parsed(
            *folders,
            "--mix",
            "a=0.5,b=0.5",
            "--out",
            str(tmp_path / "out"),
            "--val-rows",
            "2",
            "--shard-rows",
            "8",
            "--overwrite",
        )
    )
    assert (again.rows, len(again.files["train"])) == ({"train": 30, "val": 2}, 4)
    made = mix.from_args(parsed(*folders[:4], "--rows", "60", "--mix", "a=all,b=rest", "--out", str(tmp_path / "all")))
    assert made.rows["train"] == 60
    for wrong in ("a=0.5,b", "a=0.5,a=0.5", "a=0.5", "a=0.5,c=0.5", "a=0.5,b=x", "", "=1"):
        with refusal("D57"):
            mix.from_args(parsed(*folders, "--mix", wrong, "--out", str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
