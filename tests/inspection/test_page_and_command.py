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
from sayo_verl.inspection.audit import Finding
from sayo_verl.inspection.model_view import Seen
from sayo_verl.inspection.page import MAX_SIZE, make_page
from sayo_verl.vision.grids import Tile, merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks, region_mask

RECTANGLE = re.compile(r"M(\S+) (\S+)H(\S+)V(\S+)H\S+z")
NO_BOXES = np.zeros((0, 4))


class Drawings(HTMLParser):
    """What a page draws: of each drawing its picture and rectangles by class; cells of the map; texts; addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.drawn: list[dict[str, list[tuple[float, ...]]]] = []
        self.pictures: list[Image.Image] = []
        self.shades: list[float] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag == "image":
            self.drawn.append({})
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(given["href"].split(",", 1)[1]))))
        elif tag == "path" and "class" in given:
            found = [tuple(map(float, corners)) for corners in RECTANGLE.findall(given["d"])]
            self.drawn[-1].setdefault(given["class"], []).extend(found)
        elif tag == "rect":
            self.shades.append(float(given["fill-opacity"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(boxes: list[Any], tiles: tuple[Tile, ...], size: tuple[int, int] = (96, 64), **values: Any) -> Seen:
    made = row(3, data=[encoded(size=size)], boxes=[boxes], **values)
    return Seen("rows row 3", made, [tiles], [boxes], [box_masks(boxes, tiles)], 40)


TILINGS = {
    "grid": merged_grid(1, 10, 14, 2, where=""),
    "tiles and thumbnail": tile_grid(3, 2, 4, where=""),
    "one tile": tile_grid(1, 1, 4, where=""),
}


@pytest.mark.parametrize("tiles", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize("size", [(96, 64), (1400, 900), (30, 1500)], ids=str)
def test_the_page_draws_grids_boxes_and_the_tokens_of_the_region_where_they_are(tiles, size):
    boxes = [[0.1, 0.2, 0.6, 0.7], [0.9, 0.9, 0.91, 0.92]]
    page = Drawings(make_page("rows", {}, [], NO_BOXES, [seen(boxes, tiles, size)]))
    cells = [
        (t.x0 + c * w, t.y0 + r * h, t.x0 + (c + 1) * w, t.y0 + (r + 1) * h)
        for t in tiles
        for w, h in [((t.x1 - t.x0) / t.cols, (t.y1 - t.y0) / t.rows)]
        for r in range(t.rows)
        for c in range(t.cols)
    ]
    assert len(page.drawn) == (2 if len(tiles) > 1 else 1)  # a thumbnail is a drawing of its own
    grid, token = ([cell for of_level in page.drawn for cell in of_level[kind]] for kind in ("grid", "token"))
    np.testing.assert_allclose(grid, cells, atol=1e-4)
    np.testing.assert_allclose(token, np.array(cells)[region_mask(boxes, tiles)], atol=1e-4)
    if len(tiles) > 1:
        np.testing.assert_allclose(page.drawn[0]["tile"], [(t.x0, t.y0, t.x1, t.y1) for t in tiles[:-1]], atol=1e-4)
        assert len(page.drawn[1]["grid"]) == tiles[-1].tokens
        assert "6 tiles: 8 x 12 visual tokens" in page.text
    for of_level, shown in zip(page.drawn, page.pictures, strict=True):
        np.testing.assert_allclose(of_level["box"], boxes, atol=1e-4)
        assert shown.width <= MAX_SIZE[0]
        assert shown.height <= MAX_SIZE[1]
        assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_a_row_of_two_images_shows_both():
    two = [merged_grid(1, 4, 6, 2, where=""), tile_grid(2, 1, 4, where="")]
    made = row(3, data=[encoded(seed=1), encoded(seed=2)], boxes=[[], [BOX]])
    masks = [box_masks([], two[0]), box_masks([BOX], two[1])]
    page = Drawings(make_page("", {}, [], NO_BOXES, [Seen("row 3", made, two, [[], [BOX]], masks, 9)]))
    assert [len(drawing.get("box", [])) for drawing in page.drawn] == [0, 1, 1]


def test_the_map_is_darkest_where_most_boxes_are_and_says_numbers():
    boxes_N4 = np.array([[0, 0, 0.5, 0.5]] * 3 + [[0.5, 0.5, 1, 1]])
    page = make_page("rows", {}, [], boxes_N4, [])
    shades = np.array(Drawings(page).shades).reshape(24, 24)
    assert (shades[:12, :12] == 1).all()
    np.testing.assert_allclose(shades[12:, 12:], 1 / 3, atol=1e-3)
    assert not shades[:12, 12:].any()
    assert page.count("<title>75.0% of the boxes</title>") == 144
    assert "75.0% of the 4 boxes" in page
    assert 'id="map"' not in make_page("rows", {}, [], NO_BOXES, [])


def test_the_page_escapes_every_text():
    evil = "<script>alert(\"1\")</script><img src=x onerror=alert(1)> & 'quoted' </title></style>"
    values = dict.fromkeys(("question", "answer", "source", "kind", "box_source"), evil)
    shown = seen([BOX], TILINGS["grid"], text=evil, box_names=[[evil]], **values)
    finding = Finding("D66", "FAIL", evil, evil, 3, (evil, evil))
    drawn = Drawings(make_page(evil, {evil: evil}, [finding], NO_BOXES, [shown]))
    assert not {"script", "img"} & set(drawn.tags)
    assert drawn.tags.count("style") == drawn.tags.count("title") == 1
    assert drawn.text.count(evil) == 2 + 2 + 4 + 5 + 1  # title and heading, figure, finding, row, box


def test_the_page_needs_nothing_from_elsewhere():
    page = make_page("rows", {}, [], np.array([BOX]), [seen([BOX], TILINGS["tiles and thumbnail"])] * 2)
    drawn = Drawings(page)
    assert all(a.startswith("data:image/") for a in drawn.addresses)
    assert len(drawn.addresses) == 4  # two pictures at two resolutions
    assert not re.search("http|@import|script", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(svg)


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
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar, and no empty line, in a log
    for figure in ("train 10, val 1", "visual tokens of a box", "tokens of a prompt", "area of boxes, by place", "D69"):
        assert figure in printed.out
    assert "8 rows with images decoded" in printed.out
    assert max(map(len, printed.out.split("\n\n")[0].splitlines())) <= 80  # figures fit a terminal
    drawn, tiles = Drawings(page.read_text(encoding="utf-8")), models[name].see(row(0), "").tiles[0]
    assert "Rows (5)" in drawn.text
    assert "<b>red</b>" in drawn.text
    tokens = sum(len(d["token"]) for d in drawn.drawn)
    rows_with_boxes = sum("box" in d for d in drawn.drawn) // (2 if len(tiles) > 1 else 1)
    assert tokens == rows_with_boxes * region_mask([BOX], tiles).sum()


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
    assert command(bad, "--strict") == 1
    assert command(good, *model, "--strict", "--max-prompt-length", 3) == 1
    val = write(tmp_path / "val.parquet", [row(0)])
    assert command(good, "--strict", "--val", val) == 1  # the same image
    assert command(write(tmp_path / "warned.parquet", [row(0, boxes=[[]])]), "--strict") == 1  # D04 is a WARN
    assert command(good, "--strict", "--rows", 0, "--page", tmp_path / "p.html") == 0
    with refusal("D64", "no rows to inspect"):
        command(tmp_path / "absent.parquet", *model)
    with refusal("D64", "cannot be written"):
        command(good, "--page", tmp_path)
    with refusal("L17"):
        command(good, "--model", tmp_path / "absent")


def test_without_a_model_everything_that_needs_no_processor_is_checked_and_the_rest_is_named(tmp_path, capsys):
    write(tmp_path / "data" / "train-00000.parquet", [row(0), row(1, answer="")])
    page = tmp_path / "page.html"
    assert command(tmp_path / "data", "--page", page, "--strict") == 1
    out = capsys.readouterr().out
    assert "D74" in out
    assert re.search(r"not checked +visual tokens, prompt lengths", out)
    assert "visual tokens of a box" not in out
    (drawing,) = Drawings(page.read_text(encoding="utf-8")).drawn
    assert drawing.keys() == {"box"}
    np.testing.assert_allclose(drawing["box"], [BOX], atol=1e-4)


def test_a_model_that_cannot_be_reached_is_named_with_what_else_works(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = write(tmp_path / "a.parquet", [row(0)])
    with refusal("L17") as caught:
        command(data, "--model", "nobody/has-this-model")
    assert "local model folder" in caught.value.wanted
    assert "without --model" in caught.value.fix
