"""Folders of prepared data: what is in one, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from support.builds import FIFTH, PROPERTY, Made, example
from support.refusals import refusal

from sayo_verl.data.build import build
from sayo_verl.data.folder import check_folder, new_folder, read_folder, split_files, verl_flags


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(Made([example(n) for n in range(20)]), tmp_path_factory.mktemp("made") / "out", FIFTH).folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def test_a_folder_says_what_it_was_made_of(folder):
    manifest = check_folder(folder)
    assert manifest["source"] == {"name": "made", "n": 20}
    assert manifest["options"]["val_share"] == 0.2
    built = read_folder(folder)
    assert sum(built.rows.values()) == 20
    assert [path.name for path in split_files(folder)["train"]] == ["train-00000.parquet"]


@pytest.mark.parametrize("how", ["cut", "gone", "more", "no manifest", "no JSON", "no fields", "older"])
def test_a_folder_that_is_not_as_its_manifest_says_is_refused(folder, how):
    shard, manifest = folder / "train-00000.parquet", folder / "manifest.json"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "gone":
        shard.unlink()
    elif how == "more":
        shutil.copy(shard, folder / "train-00001.parquet")
    elif how == "no manifest":
        manifest.unlink()
    elif how == "no JSON":
        manifest.write_text("{")
    elif how == "no fields":
        manifest.write_text("{}")
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with refusal("D56"):
        split_files(folder)


def test_a_folder_is_not_overwritten_unless_it_is_prepared_data_and_the_user_says_so(folder, tmp_path):
    with refusal("D53", "prepared data already.*--overwrite"):
        build(Made([example(0)]), folder, FIFTH)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with refusal("D53", "other files.*thesis.tex"), new_folder(other, overwrite=overwrite):
            pass
    with new_folder(folder, overwrite=True) as new:
        (new / "a").write_text("b")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_folder_that_is_replaced_stays_if_the_new_build_fails(folder, tmp_path):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ZeroDivisionError), new_folder(folder, overwrite=True):
        raise ZeroDivisionError
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_an_empty_folder_is_filled_and_the_folder_of_another_build_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", overwrite=False) as new:
        (new / "a").write_text("b")
    assert (tmp_path / "real" / "a").read_text() == "b"
    with refusal("D53"), new_folder(tmp_path / "two", overwrite=False) as first:
        (first / "a").write_text("first")
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "a").write_text("second")
    assert (tmp_path / "two" / "a").read_text() == "second"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with refusal("D56", "cannot be written"), new_folder(tmp_path / "file" / "out", overwrite=False):
        pass


def test_looking_at_a_folder_needs_the_standard_library_only(made):
    code = f"from pathlib import Path; from sayo_verl.data.folder import split_files; split_files(Path({str(made)!r}))"
    code += "; import sys; print({'pyarrow', 'numpy', 'datasets', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@PROPERTY
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=20))
def test_the_flags_are_read_by_hydra_as_the_files(tmp_path_factory, name):
    import shlex

    file = tmp_path_factory.getbasetemp() / name.replace("/", "_") / "train-00000.parquet"
    (flag,) = shlex.split(verl_flags({"train": [file], "val": []}))
    override = OverridesParser.create().parse_override(flag)
    assert override.value() == [str(file.absolute())]
