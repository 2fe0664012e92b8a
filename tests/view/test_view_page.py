"""The shell of a page, figures in it, and the data of the viewer."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.viewed import EVIL, INTERNVL, QWEN, looked_at, said

from sayo_verl.view import picture
from sayo_verl.view.figure import COLOURS, INK, inline, style
from sayo_verl.view.maps import SPAN, Packed
from sayo_verl.view.page import page, table, text
from sayo_verl.view.picture import save_png
from sayo_verl.view.seen import SeenPrompt
from sayo_verl.view.viewer import BUDGET, mount


class Parts(HTMLParser):
    """Start tags, and the text of each script by its id."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[self.tags[-1][1].get("id") or ""] = data


def test_no_text_of_a_prompt_or_response_becomes_markup():
    prompt = looked_at(text=EVIL)
    answer = replace(said(prompt, (EVIL, " ", EVIL), facts={EVIL: EVIL}), notes=(EVIL,))
    html, data = mount("v", prompt, {EVIL: [answer, answer]})
    parts = Parts(page(EVIL, f"<h1>{text(EVIL)}</h1>{html}{table(['a'], [[text(EVIL)]])}", data=data, viewer=True))
    assert not [tag for tag, attributes in parts.tags if "onerror" in attributes]
    assert sum(tag == "img" for tag, _ in parts.tags) == 1
    assert set(parts.scripts) == {"v-data", ""}
    island = json.loads(parts.scripts["v-data"])
    assert island["question"] == EVIL
    assert island["states"][0]["responses"][0]["facts"] == {EVIL: EVIL}


def test_the_policy_of_a_page_allows_its_own_script_only():
    for viewer in (False, True):
        source = page("t", "", viewer=viewer)
        policy = next(a["content"] for tag, a in Parts(source).tags if "http-equiv" in a)
        assert "default-src 'none'" in policy
        assert ("'sha256-" in policy) == viewer
        assert not re.search(r"(src|href)=\"(?!data:|#)", source)


def test_numbers_of_a_table_are_aligned():
    cells = table(["a"], [["12.5 %", "3", -0.5, "1.2 ± 0.1", "step 3", "<b>x</b>"]])
    assert re.findall(r'<td( class="number")?>', cells) == [' class="number"'] * 4 + [""] * 2


def drawn() -> Figure:
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(4, 2))
        axis = figure.subplots()
        axis.set_title("cost $5 & <b>more</b> $6")
        axis.plot([0, 1], [1, 2], color=COLOURS[0])
        axis.scatter([0, 1], [1, 1], color=COLOURS[1])
        axis.pcolormesh(np.eye(3), cmap="viridis")
    return figure


def test_a_figure_keeps_its_text_and_takes_the_colours_of_the_page():
    svg = inline(drawn(), 'a "line" & more')
    assert ">cost $5 &amp; &lt;b&gt;more&lt;/b&gt; $6</text>" in svg
    assert 'aria-label="a &quot;line&quot; &amp; more"' in svg
    assert 'role="img"' in svg
    assert "var(--c0)" in svg
    assert "var(--c1)" in svg
    assert "var(--ink)" in svg
    assert "DejaVu" not in svg
    assert "<style" not in svg
    assert INK not in svg
    assert "#440154" in svg, "a colour of a colour map stays"


def test_ids_of_figures_on_a_page_differ_and_their_references_exist():
    both = inline(drawn(), "a") + inline(drawn(), "a")
    ids = re.findall(r'\bid="([^"]+)"', both)
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', both)) <= set(ids)


@pytest.mark.parametrize(
    ("tiles", "grids"), [(QWEN, [(6, 8)]), (INTERNVL, [(8, 12), (4, 4)])], ids=["one grid", "tiles and thumbnail"]
)
def test_each_visual_token_has_one_cell(tiles, grids):
    prompt = looked_at(tiles, images=2)
    _, data = mount("v", prompt, {"": [said(prompt)]})
    island = data["v-data"]
    assert [(g["rows"], g["cols"]) for g in island["grids"]] == grids * 2
    cells, tokens = [], []
    for n, grid in enumerate(island["grids"]):
        for start, rows, cols, row, col in grid["tiles"]:
            tokens += range(start, start + rows * cols)
            cells += [(n, row + v // cols, col + v % cols) for v in range(rows * cols)]
    assert sorted(tokens) == list(range(prompt.tokens))
    assert sorted(cells) == [
        (n, r, c) for n, (rows, cols) in enumerate(grids * 2) for r in range(rows) for c in range(cols)
    ]


def test_the_second_resolution_of_a_picture_costs_no_bytes():
    html, _ = mount("v", prompt := looked_at(INTERNVL), {"": [said(prompt)]})
    assert html.count("data:image/") == 1
    assert html.count("<canvas") == 2


def test_the_border_is_that_of_the_image_not_of_its_tiles():
    prompt = looked_at(INTERNVL)
    tiles_RC = np.zeros((8, 12), bool)
    for i, tile in enumerate(INTERNVL[:-1]):
        row, col = round(tile.y0 * 8), round(tile.x0 * 12)
        tiles_RC[row : row + 4, col : col + 4] = prompt.border[16 * i : 16 * (i + 1)].reshape(4, 4)
    assert tiles_RC.sum() == 2 * 8 + 2 * 12 - 4
    assert not tiles_RC[1:-1, 1:-1].any()
    assert prompt.border[-16:].sum() == 12


def test_numbers_that_were_not_measured_are_null():
    prompt = looked_at()
    values = mount("v", prompt, {"": [said(prompt)]})[1]["v-data"]["states"][0]["responses"][0]["values"]["effect"]
    assert values[1] is None
    assert isinstance(values[0], float)


def stored(data: dict, state: int) -> list[int | None]:
    """Levels of the word maps of a state's responses; None: left out."""
    return [
        r["maps"][0]["words"] and r["maps"][0]["words"]["levels"] for r in data["v-data"]["states"][state]["responses"]
    ]


def test_maps_become_coarser_until_they_fit_then_word_maps_leave_from_the_last_state_on():
    prompt = looked_at()
    states = {f"step {s}": [said(prompt, (" word",) * 60, seed=10 * s + i) for i in range(2)] for s in range(3)}

    def kept(budget: int) -> tuple[list[list[int | None]], str, int, dict]:
        html, data = mount("v", prompt, states, budget=budget)
        return [stored(data, s) for s in range(3)], html, sum(len(p["data"]) for p in packed(data)), data

    picture = len(re.findall(r'src="([^"]+)"', mount("v", prompt, states)[0])[0])
    everything = kept(10**9)
    assert everything[0] == [[255, 255]] * 3
    assert "255 levels" in everything[1]
    coarser = kept(picture + everything[2] - 1)
    assert coarser[0] == [[63, 63]] * 3
    coarsest = kept(picture + coarser[2] - 1)
    assert coarsest[0] == [[15, 15]] * 3
    fewer = kept(picture + coarsest[2] - 1)
    assert fewer[0] == [[15, 15], [15, 15], [15, None]]
    assert "left out" in fewer[1]
    assert "step 2, map mean" in fewer[1]
    assert [[r["maps"][0]["left_out"] for r in s["responses"]] for s in fewer[3]["v-data"]["states"]] == [
        [False, False], [False, False], [False, True],
    ]  # fmt: skip
    none, html, *_ = kept(picture + 10)
    assert none == [[None, None]] * 3
    assert "Maps of whole responses are complete" in html


def packed(data: dict) -> list[dict]:
    return [
        p
        for state in data["v-data"]["states"]
        for response in state["responses"]
        for m in response["maps"]
        for p in (m["total"], m["words"])
        if p
    ]


@pytest.mark.parametrize("levels", [63, 15])
def test_coarser_maps_are_those_packed_with_fewer_levels(levels: int):
    maps_WV = np.random.default_rng(0).pareto(1.2, (5, 200))
    coarse, direct = Packed.of(maps_WV).coarser(levels).unpack(), Packed.of(maps_WV, levels).unpack()
    step = SPAN ** (1 / (levels - 1))
    both = (coarse > 0) & (direct > 0)
    assert both.sum() > 900
    assert (np.maximum(coarse[both] / direct[both], direct[both] / coarse[both]) < step * 1.001).all()

    assert coarse.max() == pytest.approx(maps_WV.max())


def test_the_budget_bounds_the_whole_page():
    """A fifth of 2,000 tokens over 4,000 visual tokens in a fifth of the budget: the page must stay below 8 MB / 5."""
    small = looked_at()
    image = replace(small.images[0], tiles=(replace(QWEN[0], rows=50, cols=80),))
    prompt = SeenPrompt(small.where, small.question, (image,))
    html, data = mount("v", prompt, {"": [said(prompt, (" word",) * 400)]}, budget=BUDGET // 5)
    assert len(page("t", html, data=data, viewer=True).encode()) < 8e6 / 5
    assert stored(data, 0) != [None]


def test_pictures_take_half_of_the_budget_and_a_reduced_one_is_mentioned():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1700, 1700, 3), np.uint8))
    prompt = looked_at(images=2)
    prompt = replace(prompt, images=tuple(replace(image, picture=noise) for image in prompt.images))
    for budget, pixels in ((10**8, "1,600"), (2_000_000, "640")):
        html, _ = mount("v", prompt, {"": [said(prompt)]}, budget=budget)
        assert f"at most {pixels} pixels on the longer side" in html
        assert "have 1700 x 1700, 1700 x 1700" in html
        assert sum(map(len, re.findall(r'src="([^"]+)"', html))) <= budget / 2
    assert "longer side" not in mount("v", looked_at(), {"": [said(prompt)]})[0]


def test_the_colours_of_a_picture_end_at_twice_the_mean_or_above():
    even_V = np.full(100, 0.01)
    assert picture._top(even_V) == pytest.approx(0.02)
    even_V[:2] = 0.5
    assert picture._top(even_V) == 0.5


def test_a_picture_is_1600_pixels_wide(tmp_path):
    for name, prompt in {
        "one": looked_at(text="costs $5 and $6"),
        "tiles": looked_at(INTERNVL, images=2),
        "plain": looked_at(box=False),
    }.items():
        save_png(prompt, said(prompt), tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").width == 1600
    save_png(prompt, replace(said(prompt), maps=()), tmp_path / "none.png")
    assert Image.open(tmp_path / "none.png").width == 1600
