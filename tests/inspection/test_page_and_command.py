"""The page of pictures and the command."""

import argparse
import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.inspected import BOX, NAMES, encoded, row, write
from support.refusals import refusal

from sayo_verl.inspection import command as inspection
from sayo_verl.inspection import sample as second_pass
from sayo_verl.inspection.files import find_data
from sayo_verl.inspection.findings import Finding
from sayo_verl.inspection.page import MAX_HEIGHT, MAX_WIDTH, Picture, Sample, make_page
from sayo_verl.vision.grids import merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks, region_mask

# ---------------------------------------------------------------------------------------------------------- the page


class Drawings(HTMLParser):
    """What a page draws: token -> its rectangle, by picture and level; boxes; texts; addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: dict[str, dict[int, dict[int, tuple[float, ...]]]] = {}
        self.boxes: dict[str, dict[int, list[tuple[float, ...]]]] = {}
        self.sizes: dict[str, tuple[float, float]] = {}
        self.pictures: dict[str, Image.Image] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        told = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag == "svg":
            self.at, self.level = told["data-image"], int(told["data-level"])
            self.sizes[self.at] = tuple(float(v) for v in told["viewbox"].split()[2:])
            self.tokens.setdefault(self.at, {})[self.level] = {}
            self.boxes.setdefault(self.at, {})[self.level] = []
        elif tag == "image":
            kind, data = told["href"].split(",", 1)
            assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
            self.pictures[self.at] = Image.open(io.BytesIO(base64.b64decode(data)))
        elif tag == "rect":
            width, height = self.sizes[self.at]
            x, y, w, h = (float(told[k]) for k in ("x", "y", "width", "height"))
            share = (x / width, y / height, (x + w) / width, (y + h) / height)
            if told["class"] == "token":
                self.tokens[self.at][self.level][int(told["data-token"])] = share
            elif told["class"] == "box":
                self.boxes[self.at][self.level].append(share)

    def handle_data(self, data: str) -> None:
        self.text += data


def sample(picture: Picture, **texts: str) -> Sample:
    told = {
        "where": "rows row 3",
        "why": "at random",
        "question": "What?",
        "answer": "red",
        "source": "my/photos",
        "kind": "colour",
        "box_source": "drawn",
    }
    return Sample(**(told | texts), prompt_tokens=40, pictures=(picture,))


TILINGS = {
    "grid": merged_grid(1, 10, 14, 2, where=""),
    "tiles and thumbnail": tile_grid(3, 2, 4, where=""),
    "one tile": tile_grid(1, 1, 4, where=""),
}


@pytest.mark.parametrize("tiles", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("size", [(96, 64), (1400, 900), (30, 1500)], ids=str)
def test_the_page_draws_the_tokens_of_the_region_where_they_are(tiles, size):
    boxes = [[0.1, 0.2, 0.6, 0.7], [0.9, 0.9, 0.91, 0.92]]
    picture = Picture(Image.new("RGB", size, "grey"), tiles, boxes, ["a", "b"], box_masks(boxes, tiles))
    page = Drawings(make_page("rows", [], [], [sample(picture)]))
    levels = page.tokens["s0i0"]
    drawn = {token: share for level in levels.values() for token, share in level.items()}
    assert sorted(drawn) == np.flatnonzero(region_mask(boxes, tiles)).tolist()
    assert sum(len(level) for level in levels.values()) == len(drawn)
    assert len(levels) == (2 if len(tiles) > 1 else 1)
    first = 0
    for tile in tiles:
        for token in range(tile.tokens):
            r, c = divmod(token, tile.cols)
            w, h = (tile.x1 - tile.x0) / tile.cols, (tile.y1 - tile.y0) / tile.rows
            cell = (tile.x0 + c * w, tile.y0 + r * h, tile.x0 + (c + 1) * w, tile.y0 + (r + 1) * h)
            if first + token in drawn:
                assert drawn[first + token] == pytest.approx(cell, abs=1e-3)
                on_thumbnail = len(tiles) > 1 and tile == tiles[-1]
                assert (first + token in levels[1]) if on_thumbnail else (first + token in levels[0])
        first += tile.tokens
    for level in page.boxes["s0i0"].values():
        assert np.allclose(level, boxes, atol=1e-3)
    shown = page.pictures["s0i0"]
    assert shown.width <= MAX_WIDTH
    assert shown.height <= MAX_HEIGHT
    assert shown.size == page.sizes["s0i0"]
    assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_the_lines_of_the_grid_are_where_the_cells_end():
    tiles = merged_grid(1, 6, 8, 2, where="")
    page = make_page("", [], [], [sample(Picture(Image.new("RGB", (80, 60)), tiles, [], [], box_masks([], tiles)))])
    path = re.search(r'class="grid"[^>]* d="([^"]+)"', page).group(1)
    assert re.findall(r"M(\S+) 0.000V60.000", path) == ["20.000", "40.000", "60.000"]
    assert re.findall(r"M0.000 (\S+)H80.000", path) == ["20.000", "40.000"]


def test_the_page_escapes_every_text():
    evil = "<script>alert(\"1\")</script><img src=x onerror=alert(1)> & 'quoted' </title></style>"
    tiles = TILINGS["grid"]
    picture = Picture(Image.new("RGB", (64, 64)), tiles, [BOX], [evil], box_masks([BOX], tiles))
    names = ("where", "why", "question", "answer", "source", "kind", "box_source")
    finding = Finding("D66", "FAIL", evil, 3, (evil, evil), evil)
    page = make_page(evil, [(evil, evil)], [finding], [sample(picture, **dict.fromkeys(names, evil))])
    drawn = Drawings(page)
    assert not {"script", "img"} & set(drawn.tags)
    assert drawn.tags.count("style") == drawn.tags.count("title") == 1
    assert drawn.text.count(evil) == 1 + 1 + 2 + 4 + len(names) + 1  # title, heading, figure, finding, sample, box


def test_the_page_needs_nothing_from_elsewhere():
    tiles = TILINGS["tiles and thumbnail"]
    picture = Picture(Image.new("RGB", (64, 64)), tiles, [BOX], ["a"], box_masks([BOX], tiles))
    page = make_page("rows", [], [], [sample(picture)] * 2)
    drawn = Drawings(page)
    assert all(a.startswith("data:image/") for a in drawn.addresses)
    assert len(drawn.addresses) == 4  # two pictures at two resolutions
    assert "http" not in page
    assert "@import" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


def test_samples_are_the_worst_and_then_of_every_kind():
    path = Path("rows.parquet")
    rows = [(path, i, "my/photos", "ab"[i % 2], 5, 9) for i in range(40)]
    rows[7], rows[30] = (path, 7, "my/photos", "a", 1, 2), (path, 30, "my/photos", "a", 5, 60)
    rows[11] = (path, 11, "my/charts", "c", 0, 0)  # no box
    chosen = second_pass.choose_samples(rows, 8, 0)
    assert chosen == second_pass.choose_samples(rows, 8, 0)
    assert chosen[0] == (7, "visual tokens of its smallest box: 1")
    assert (30, "visual tokens of its largest box: 60") in chosen
    assert len(chosen) == len(dict(chosen)) == 8
    at_random = [i for i, why in chosen if why == "at random"]
    assert 11 in at_random
    assert {rows[i][3] for i in at_random} == {"a", "b", "c"}
    assert len(second_pass.choose_samples(rows, 100, 0)) == 40
    assert second_pass.choose_samples([], 8, 0) == []
    assert second_pass.choose_samples(rows, 8, 1) != chosen


# ------------------------------------------------------------------------------------------------------- the command


def command(*argv: str | Path | int) -> int:
    parser = argparse.ArgumentParser()
    inspection.add_flags(parser)
    return inspection.run(parser.parse_args([str(a) for a in argv]))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_prints_figures_and_writes_a_page(folders, models, tmp_path, capsys, name):
    rows = [row(i, question=f"Is {i} <b>red</b>?", boxes=[[BOX]] if i % 2 else [[]]) for i in range(10)]
    write(tmp_path / "data" / "train-00000.parquet", rows)
    write(tmp_path / "data" / "val-00000.parquet", [row(20)])
    page = tmp_path / "made" / "page.html"
    assert command(tmp_path / "data", "--model", folders[name], "--page", page, "--samples", 5, "--rows", 8) == 0
    out = capsys.readouterr().out
    for told in ("10 train, 1 val", "rows through the processor", "visual tokens per box", "prompt length", "D69"):
        assert told in out
    assert re.search(r"rows through the processor +8\b", out)
    drawn = Drawings(page.read_text(encoding="utf-8"))
    assert len(drawn.pictures) == 5
    assert "b" not in drawn.tags
    for at, levels in drawn.tokens.items():
        got = sorted(token for level in levels.values() for token in level)
        boxes = list(drawn.boxes[at][0])
        tiles = models[name].see(row(0), "").tiles[0]  # all pictures are 96 x 64
        assert got == (np.flatnonzero(region_mask([BOX], tiles)).tolist() if boxes else [])


def test_which_files_are_training_and_which_validation(tmp_path):
    folder = tmp_path / "made"
    files = {name: write(folder / f"{name}.parquet", [row(0)]) for name in ("train-0", "train-1", "val-0", "other")}
    alone = write(tmp_path / "alone.parquet", [row(0)])
    assert find_data([folder]).train == (files["train-0"], files["train-1"])  # others of the folder are not read
    assert find_data([folder]).val == (files["val-0"],)
    assert find_data([alone, files["val-0"]]).val == (files["val-0"],)  # by its name
    assert find_data([files["train-0"]], [alone]).val == (alone,)
    assert find_data([folder, folder]) == find_data([folder])


def test_the_modules_import_neither_torch_nor_verl():
    code = (
        "import sys, sayo_verl.inspection.command, sayo_verl.data.check, sayo_verl.inspection.page; "
        "print([m for m in ('torch', 'transformers', 'verl', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_strict_and_refusals(folders, tmp_path):
    model = ("--model", folders["qwen3_vl"])
    good = write(tmp_path / "good.parquet", [row(0), row(1, boxes=[[]])])
    bad = write(tmp_path / "bad.parquet", [row(0), row(1, answer="")])
    assert command(good, *model, "--strict") == 0  # an INFO is no reason
    assert command(bad, *model) == 0
    assert command(bad, *model, "--strict") == 1
    assert command(good, *model, "--strict", "--max-prompt-length", 3) == 1
    val = write(tmp_path / "val.parquet", [row(0)])
    assert command(good, *model, "--strict", "--val", val) == 1  # the same image
    warned = write(tmp_path / "warned.parquet", [row(0, boxes=[[]])])
    assert command(warned, *model, "--strict") == 1  # D04 is a WARN
    assert command(good, *model, "--strict", "--rows", 0, "--page", tmp_path / "p.html") == 0
    with refusal("D64", "no such file"):
        command(tmp_path / "absent.parquet", *model)
    with refusal("D64", "cannot be written"):
        command(good, *model, "--page", tmp_path)
    with refusal("L17"):
        command(good, "--model", tmp_path / "absent")


def test_without_a_model_everything_that_needs_no_processor_is_checked_and_the_rest_is_named(tmp_path, capsys):
    write(tmp_path / "data" / "train-00000.parquet", [row(0), row(1, answer="")])
    page = tmp_path / "page.html"
    assert command(tmp_path / "data", "--page", page, "--strict") == 1
    out = capsys.readouterr().out
    assert "D74" in out
    assert re.search(r"not checked +visual tokens of boxes, prompt lengths", out)
    assert "visual tokens per box" not in out
    drawn = Drawings(page.read_text(encoding="utf-8"))
    assert np.allclose(drawn.boxes["s0i0"][0], [BOX], atol=1e-3)
    assert drawn.tokens == {"s0i0": {0: {}}}
    assert "visual tokens (down" not in drawn.text
    cut = write(tmp_path / "cut.parquet", [row(0, data=[encoded()[:-40]])])
    assert command(cut, "--strict") == 1  # the header is whole, but the image cannot be decoded


def test_a_model_that_cannot_be_reached_is_named_with_what_else_works(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = write(tmp_path / "a.parquet", [row(0)])
    with refusal("L17") as caught:
        command(data, "--model", "nobody/has-this-model")
    assert "local model folder" in caught.value.wanted
    assert "without --model" in caught.value.fix
