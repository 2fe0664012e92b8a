"""Mixtures of prepared folders."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builds import FIFTH, PROPERTY, Made, example, left_out, rows
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.data.build import build
from sayo_verl.data.folder import split_files
from sayo_verl.data.mix import mix_folders, train_counts


def part(folder, name, first, n, **options):
    things = [example(i, data_source=f"sayo/{name}") for i in range(first, first + n)]
    return build(Made(things), folder / name, dataclasses.replace(FIFTH, **options)).folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return part(folder, "a", 0, 40, val_share=0), part(folder, "b", 100, 60)


def test_rows_are_those_of_the_parts_shuffled_and_repeat_nothing(parts, tmp_path):
    made = mix_folders({parts[0]: "0.25", parts[1]: "0.75"}, 40, tmp_path / "out")
    there = {(row["data_source"], row["extra_info"]["id"]): row for folder in parts for row in rows(folder)}
    mixed = rows(made.folder, "train")
    names = [(row["data_source"], row["extra_info"]["id"]) for row in mixed]
    assert len(set(names)) == len(names) == 40
    assert [there[name] for name in names] == mixed
    assert [name[0] for name in names].count("sayo/a") == 10
    assert names != sorted(names)
    assert rows(made.folder, "val") == rows(parts[1], "val")
    assert split_files(made.folder)["train"]


def test_the_draw_depends_on_the_seed(parts, tmp_path):
    shares = dict.fromkeys(parts, "0.5")
    drawn = [rows(mix_folders(shares, 20, tmp_path / str(i), seed).folder, "train") for i, seed in enumerate((0, 0, 1))]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_picture_held_out_in_one_part_is_in_no_training_row(parts, tmp_path):
    same = part(tmp_path, "same", 100, 60, val_share=0)  # the pictures of b
    n = 60 - len(rows(parts[1], "val"))
    made = mix_folders({parts[1]: "all", same: "rest"}, 2 * n, tmp_path / "out")
    held_out = {row["images"][0]["bytes"] for row in rows(made.folder, "val")}
    assert held_out
    assert held_out.isdisjoint(row["images"][0]["bytes"] for row in rows(made.folder, "train"))
    assert set(left_out(made.folder).values()) == {"image_in_other_split"}


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 50))
def test_counts_add_up_and_are_within_one_row_of_each_share(weights, wanted):
    shares = {Path(str(i)): str(weight / sum(weights)) for i, weight in enumerate(weights)}
    counts = train_counts(shares, wanted, dict.fromkeys(shares, wanted))
    assert sum(counts.values()) == wanted
    assert all(abs(counts[name] - wanted * float(share)) < 1 + 1e-9 for name, share in shares.items())


A, B = Path("a"), Path("b")


def test_all_and_rest():
    assert train_counts({A: "all", B: "rest"}, 10, {A: 3, B: 9}) == {A: 3, B: 7}
    assert train_counts({A: "all", B: "all"}, 12, {A: 3, B: 9}) == {A: 3, B: 9}


@pytest.mark.parametrize(
    ("shares", "wanted", "message"),
    [
        (("0.5", "0.6"), 5, "add up to 1"),
        (("0.5", "half"), 5, "add up to 1"),
        (("rest", "rest"), 5, "add up to 1"),
        (("1.5", "-0.5"), 5, "add up to 1"),
        (("nan", "0.5"), 5, "add up to 1"),
        (("0.5", "0.5"), 0, "0 wanted"),
        (("0.5", "0.5"), 20, "a has 3 rows, 10 wanted"),
        (("all", "rest"), 2, "2 wanted, 3"),
        (("all", "rest"), 20, "b has 9 rows, 17 wanted"),
        (("all", "all"), 20, "20 wanted, 12"),
    ],
)
def test_what_cannot_be_drawn_is_refused(shares, wanted, message):
    with refusal("D57", message):
        train_counts(dict(zip((A, B), shares, strict=True)), wanted, {A: 3, B: 9})


def test_parts_that_do_not_fit_together_are_refused(parts, tmp_path):
    linked = part(tmp_path, "linked", 200, 10, link=True)
    with refusal("D64", "images"):
        mix_folders({parts[0]: "all", linked: "all"}, 50, tmp_path / "out")
    again = part(tmp_path, "a", 0, 10, val_share=0)  # the data source and the ids of a
    with refusal("D65", "one id"):
        mix_folders({parts[0]: "all", again: "all"}, 50, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(parts, tmp_path, capsys):
    command = ["prepare", "mix", "--from", f"{parts[0]}=all", "--rows", "50", "--out", str(tmp_path / "out")]
    assert main([*command, "--from", f"{parts[1]}=rest"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    for wrong in (f"{parts[0]}=0.5", "no-share"):
        assert main([*command, "--from", wrong]) == 2
        assert "SAYO-D57" in capsys.readouterr().err
