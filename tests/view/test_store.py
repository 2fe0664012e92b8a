"""Files of recorded rollouts: what is written is read, and what is damaged is named."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sayo_verl.errors import SayoError
from sayo_verl.view import store
from sayo_verl.view.maps import Packed
from sayo_verl.view.seen import HeadTable, MapSet, SeenImage, SeenPrompt, SeenResponse
from sayo_verl.vision.grids import Tile

TILES = (Tile(2, 3), Tile(1, 1, 0.0, 0.5))
V = 7


def prompt_of(colour: int = 0) -> SeenPrompt:
    picture = Image.fromarray(np.full((6, 8, 3), colour, np.uint8))
    image = SeenImage(picture, TILES, ((0.1, 0.2, 0.5, 1 / 3),), ("red <b>box</b>",))
    return SeenPrompt("row 3 of val.parquet", "What colour?", (image,), "red", 2, np.arange(V) < 2)


def response_of(pieces: tuple[str, ...] = ("The", " red", " 红", "")) -> SeenResponse:
    rng = np.random.default_rng(0)
    words = tuple((t, t + 1) for t in range(len(pieces)))
    values = rng.random((2, len(pieces))).astype(np.float32)
    values[1, :1] = np.nan
    steady = np.arange(V) % 3 == 0
    maps = MapSet("mean", "all layers", Packed.of(rng.random((1, V))), Packed.of(rng.random((len(words), V))), steady)
    heads = HeadTable((3, 5), {"image_mass": rng.random((2, 4)).astype(np.float32)})
    facts: dict[str, Any] = {"reward": 0.5, "accuracy": math.nan, "kind": "colour"}
    return SeenResponse(
        pieces, words, {"image_mass": values[0], "effect": values[1]}, (maps,), facts, ("a note",), heads
    )


def same(a: SeenResponse, b: SeenResponse) -> None:
    assert (a.pieces, a.words, a.notes) == (b.pieces, b.words, b.notes)
    assert a.values.keys() == b.values.keys()
    for name in a.values:
        np.testing.assert_array_equal(a.values[name], b.values[name])
    for one, other in zip(a.maps, b.maps, strict=True):
        assert (one.name, one.label, one.total, one.words) == (other.name, other.label, other.total, other.words)
        np.testing.assert_array_equal(one.steady, other.steady)
    assert {name: str(fact) for name, fact in a.facts.items()} == {name: str(fact) for name, fact in b.facts.items()}
    assert a.heads is not None
    assert b.heads is not None
    assert a.heads.layers == b.heads.layers
    np.testing.assert_array_equal(a.heads.values["image_mass"], b.heads.values["image_mass"])


def test_a_step_is_read_as_it_was_written(tmp_path: Path):
    for step in (5, 0, 1_000_000):
        store.write_step(tmp_path, step, [(prompt_of(), [response_of(), response_of(())])], 1.5, ["a sentence"])
    notes: list[str] = []
    steps = store.read_steps(tmp_path, notes)
    # steps 5 and 1,000,000: the file of step 0 is younger than that of step 5
    assert [one.step for one in steps] == [0, 1_000_000]
    assert notes == ["recorded rollouts of an abandoned attempt are left out: steps 5"]
    (one, _) = steps
    assert (one.seconds, one.notes) == (1.5, ("a sentence",))
    ((prompt, (response, empty)),) = one.prompts
    wanted = prompt_of()
    assert np.array_equal(prompt.images[0].picture, wanted.images[0].picture)
    assert prompt.images[0].picture is steps[1].prompts[0][0].images[0].picture, "steps share an image"
    assert (prompt.images[0].tiles, prompt.images[0].boxes, prompt.images[0].names) == (
        wanted.images[0].tiles,
        wanted.images[0].boxes,
        wanted.images[0].names,
    )
    assert (prompt.where, prompt.question, prompt.answer, prompt.region_tokens) == (
        wanted.where,
        wanted.question,
        wanted.answer,
        2,
    )
    np.testing.assert_array_equal(prompt.region, wanted.region)
    same(response, response_of())
    assert empty.text == ""


@given(st.lists(st.floats(width=32), max_size=8))
def test_float32_values_survive_json_and_what_is_not_finite_is_nan(values: list[float]):
    array = np.array(values, np.float32)
    response = SeenResponse(("x",) * len(values), (), {"entropy": array})
    text = json.dumps(store.response_to_json(response), allow_nan=False)
    back = store.response_from_json(json.loads(text)).values["entropy"]
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.where(np.isfinite(array), array, np.nan))


def test_an_image_is_stored_once_and_a_prompt_can_carry_its_own(tmp_path: Path):
    store.write_step(tmp_path, 0, [(prompt_of(), []), (prompt_of(), []), (prompt_of(9), [])], 0)
    assert len(list((tmp_path / "rollouts" / "images").iterdir())) == 2
    inline = json.loads(json.dumps(store.prompt_to_json(prompt_of(9))))
    assert np.array_equal(store.prompt_from_json(inline).images[0].picture, prompt_of(9).images[0].picture)


def test_a_run_without_rollouts_has_no_steps(tmp_path: Path):
    assert store.read_steps(tmp_path) == []


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _of_another_schema(file: Path) -> None:
    file.write_text(json.dumps({"schema": 99}))


def _edited(file: Path) -> None:
    record = json.loads(file.read_text())
    record["prompts"][0]["responses"][0]["values"]["effect"].pop()
    file.write_text(json.dumps(record))


def _accuracy_in_words(file: Path) -> None:
    record = json.loads(file.read_text())
    record["prompts"][0]["responses"][0]["facts"]["accuracy"] = "yes"
    file.write_text(json.dumps(record))


def _cut_map(file: Path) -> None:
    record = json.loads(file.read_text())
    record["prompts"][0]["responses"][0]["maps"][0]["words"]["data"] = "AAAA"
    file.write_text(json.dumps(record))


def _without_image(file: Path) -> None:
    next((file.parent / "images").iterdir()).unlink()


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("code", "damage"),
    [
        ("A27", _a_folder),
        ("A28", _cut),
        ("A28", _edited),
        ("A28", _accuracy_in_words),
        ("A28", _cut_map),
        ("A29", _of_another_schema),
        ("A30", _without_image),
    ],
)
def test_a_damaged_step_is_named_and_the_others_are_read(tmp_path: Path, code: str, damage: Any):
    store.write_step(tmp_path, 0, [], 0)
    store.write_step(tmp_path, 1, [(prompt_of(), [response_of()])], 0)
    damage(store.step_file(tmp_path, 1))
    with pytest.raises(SayoError, match=code):
        store.read_steps(tmp_path)
    notes: list[str] = []
    assert [one.step for one in store.read_steps(tmp_path, notes)] == [0]
    (note,) = notes
    assert f"SAYO-{code}" in note


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store.write_step(tmp_path, 3, [(prompt_of(), [response_of()])], 1)
    before = store.step_file(tmp_path, 3).read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write_step(tmp_path, 3, [(prompt_of(), [])], 2)
    assert store.step_file(tmp_path, 3).read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "rollouts").iterdir()) == ["images", "step-000003.json"]


def test_the_store_needs_neither_torch_nor_verl():
    code = "import sys; sys.modules.update(torch=None, verl=None); import sayo_verl.view.store"
    subprocess.run([sys.executable, "-c", code], check=True)
