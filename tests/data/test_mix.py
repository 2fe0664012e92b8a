"""Mixtures of prepared folders."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builds import FIFTH, PROPERTY, Made, example, left_out, rows
from support.refusals import refusal

from sayo_verl.cli import main
from sayo_verl.data.build import build
from sayo_verl.data.mix import mix_folders, train_counts


def part(folder, name, first, n, **options):
    things = [example(i, data_source=f"sayo/{name}") for i in range(first, first + n)]
    return build(Made(things), folder / name, dataclasses.replace(FIFTH, **options)).folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {"a": part(folder, "a", 0, 40, val_share=0), "b": part(folder, "b", 100, 60)}


def test_rows_are_those_of_the_parts_shuffled_and_repeat_nothing(parts, tmp_path):
    made = mix_folders(parts, {"a": "0.25", "b": "0.75"}, 40, tmp_path / "out")
    there = {(row["data_source"], row["extra_info"]["id"]): row for folder in parts.values() for row in rows(folder)}
    mixed = rows(made.folder, "train")
    names = [(row["data_source"], row["extra_info"]["id"]) for row in mixed]
    assert len(set(names)) == len(names) == 40
    assert [there[name] for name in names] == mixed
    assert [name[0] for name in names].count("sayo/a") == 10
    assert names != sorted(names)
    assert rows(made.folder, "val") == rows(parts["b"], "val")


def test_the_draw_depends_on_the_seed(parts, tmp_path):
    drawn = [
        rows(mix_folders(parts, {"a": "0.5", "b": "0.5"}, 20, tmp_path / str(i), seed).folder, "train")
        for i, seed in enumerate((0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_picture_held_out_in_one_part_is_in_no_training_row(parts, tmp_path):
    same = part(tmp_path, "same", 100, 60, val_share=0)  # the pictures of b
    made = mix_folders({"b": parts["b"], "same": same}, {"b": "all", "same": "rest"}, 60, tmp_path / "out")
    held_out = {row["images"][0]["bytes"] for row in rows(made.folder, "val")}
    assert held_out
    assert held_out.isdisjoint(row["images"][0]["bytes"] for row in rows(made.folder, "train"))
    assert set(left_out(made.folder).values()) == {"image_in_other_split"}


@PROPERTY
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 50))
def test_counts_add_up_and_are_within_one_row_of_each_share(weights, rows):
    shares = {str(i): str(weight / sum(weights)) for i, weight in enumerate(weights)}
    counts = train_counts(shares, rows, dict.fromkeys(shares, rows))
    assert sum(counts.values()) == rows
    assert all(abs(counts[name] - rows * float(share)) < 1 + 1e-9 for name, share in shares.items())


def test_all_and_rest():
    assert train_counts({"a": "all", "b": "rest"}, 10, {"a": 3, "b": 9}) == {"a": 3, "b": 7}
    assert train_counts({"a": "all", "b": "all"}, 12, {"a": 3, "b": 9}) == {"a": 3, "b": 9}
    for wanted, message in ((2, "2 wanted, 3"), (20, "b has 9 rows, 17 wanted")):
        with refusal("D57", message):
            train_counts({"a": "all", "b": "rest"}, wanted, {"a": 3, "b": 9})


@pytest.mark.parametrize(
    ("shares", "rows", "message"),
    [
        ({"a": "0.5", "b": "0.6"}, 5, "add up to 1"),
        ({"a": "0.5", "b": "half"}, 5, "add up to 1"),
        ({"a": "rest", "b": "rest"}, 5, "add up to 1"),
        ({"a": "1"}, 5, "differ"),
        ({"a": "0.5", "b": "0.5"}, 0, "out of range"),
        ({"a": "0.5", "b": "0.5"}, 500, "a has 40 rows, 250 wanted"),
    ],
)
def test_what_cannot_be_mixed_is_refused(parts, tmp_path, shares, rows, message):
    with refusal("D57", message):
        mix_folders(parts, shares, rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_verl_cannot_join_are_refused(parts, tmp_path):
    linked = part(tmp_path, "linked", 200, 10, link=True)
    with refusal("D57", "paths.*--link"):
        mix_folders({"a": parts["a"], "linked": linked}, {"a": "all", "linked": "all"}, 50, tmp_path / "out")
    again = part(tmp_path, "a", 0, 10, val_share=0)  # the data source and the ids of a
    with refusal("D57", "data source and id"):
        mix_folders({"a": parts["a"], "again": again}, {"a": "all", "again": "all"}, 50, tmp_path / "out")
    with refusal("D57", "named twice"):
        mix_folders({"a": parts["a"], "b": parts["a"]}, {"a": "all", "b": "all"}, 80, tmp_path / "out")


def test_the_command_line(parts, tmp_path, capsys):
    command = ["prepare", "mix", "--from", f"a={parts['a']}", "--from", f"b={parts['b']}", "--mix", "a=all,b=rest"]
    assert main([*command, "--rows", "50", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert main([*command[:-1], "a", "--rows", "50", "--out", str(tmp_path / "two")]) == 2
    assert "SAYO-D57" in capsys.readouterr().err
