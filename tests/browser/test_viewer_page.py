"""The viewer in a browser: the pointed word's map is drawn, the keyboard is enough, texts stay texts."""

from dataclasses import replace

import numpy as np
import pytest
from support.browser import check_page
from support.viewed import EVIL, INTERNVL, looked_at, said

from sayo_verl.look.page import write_page
from sayo_verl.view.figure import inline
from sayo_verl.view.maps import Packed
from sayo_verl.view.page import page
from sayo_verl.view.viewer import mount
from sayo_verl.vision.grids import Tile

WIDE = {"widths": (1280,), "schemes": ("light",)}
PIXELS = """(canvas) => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"""


def written(folder, prompt, states, **options):
    html, data = mount("v", prompt, states, **options)
    path = folder / "page.html"
    path.write_text(page("a viewer", f"<h1>A viewer</h1>{html}", data=data, viewer=True), encoding="utf-8")
    return path


def settled(tab, word: int | None, **more: object):
    """Wait until a word's map (None: the whole response's) is drawn; return the viewer."""
    named = {"word": "" if word is None else word, **more}
    wanted = "".join(f'[data-{name}="{value}"]' for name, value in named.items())
    tab.wait_for_selector(f".viewer[data-drawn]{wanted}", timeout=10_000)
    return tab.locator(".viewer")


def heat_of(tab, canvas: int = 0) -> np.ndarray:
    """Opacity [rows, columns], which grows with attention."""
    element = tab.locator("canvas").nth(canvas)
    rows, cols = (int(element.get_attribute(name)) for name in ("height", "width"))
    return np.array(element.evaluate(PIXELS)).reshape(rows, cols, 4)[..., 3]


def ordered_like(heat_V: np.ndarray, map_V: np.ndarray) -> bool:
    """Whether opacity never falls where attention grows."""
    return bool((np.diff(heat_V.ravel()[np.argsort(map_V)]) >= 0).all()) and np.ptp(heat_V) > 20


def test_pointer_and_keyboard_show_the_map_of_a_word(tmp_path):
    prompt = looked_at()
    answer = said(prompt, ("The", " re", "d", " box", " is", " here", ".\n"), heads=True)
    total_V, words_WV = answer.maps[0].total.unpack()[0], answer.maps[0].words.unpack()

    def use(tab):
        settled(tab, None)
        assert ordered_like(heat_of(tab), total_V)
        tab.locator(".word").nth(1).hover()
        viewer = settled(tab, 1)
        assert ordered_like(heat_of(tab), words_WV[1])
        assert float(viewer.get_attribute("data-share")) == pytest.approx(words_WV[1].sum(), rel=1e-4)
        assert int(tab.locator("canvas").get_attribute("data-peak")) == words_WV[1].argmax()
        assert "\u201cred\u201d, word 2 of 5" in tab.locator(".brief").inner_text()
        assert f"{100 * words_WV[1].sum():#.2g}".rstrip(".") in tab.locator(".brief").inner_text()
        tab.mouse.move(0, 0)
        settled(tab, None)
        tab.locator(".word").first.focus()
        tab.keyboard.press("ArrowRight")
        tab.keyboard.press("ArrowRight")
        settled(tab, 2)
        assert ordered_like(heat_of(tab), words_WV[2])
        tab.keyboard.press("Enter")
        assert tab.locator('.word[aria-pressed="true"]').inner_text() == "box"
        tab.locator(".word").nth(3).hover()
        settled(tab, 3)
        tab.mouse.move(0, 0)
        settled(tab, 2)
        tab.keyboard.press("Escape")
        settled(tab, None)

    check_page(written(tmp_path, prompt, {"": [answer]}), use)


def test_the_border_can_be_left_out(tmp_path):
    prompt = looked_at()
    answer = said(prompt)
    words_WV = answer.maps[0].words.unpack()

    def use(tab):
        tab.locator(".controls select").nth(1).select_option("border")
        tab.locator(".word").first.hover()
        settled(tab, 0)
        heat_RC, inside_RC = heat_of(tab), ~prompt.border.reshape(6, 8)
        assert len(set(heat_RC[~inside_RC])) == 1
        assert ordered_like(heat_RC[inside_RC], words_WV[0].reshape(6, 8)[inside_RC])
        assert (
            "24 of 48 visual tokens are left out, and the rest is scaled to 100 %" in tab.locator(".said").inner_text()
        )

    check_page(written(tmp_path, prompt, {"": [answer]}), use, **WIDE)


def test_tiles_and_thumbnail_are_two_drawings(tmp_path):
    prompt = looked_at(INTERNVL)
    answer = said(prompt)
    total_V = answer.maps[0].total.unpack()[0]

    def use(tab):
        settled(tab, None)
        assert ordered_like(heat_of(tab, 1), total_V[-16:])
        tiles_RC = np.block([[total_V[16 * (3 * r + c) :][:16].reshape(4, 4) for c in range(3)] for r in range(2)])
        assert ordered_like(heat_of(tab, 0), tiles_RC.ravel())

    check_page(written(tmp_path, prompt, {"": [answer]}), use, **WIDE)


def test_a_head_is_chosen_in_the_table_and_a_missing_map_names_its_option(tmp_path):
    prompt = looked_at()
    answer = said(prompt, maps=("mean", "L1H2", "L2"), stored=("mean", "L1H2"), heads=True)

    def use(tab):
        tab.locator("summary").click()
        tab.locator('td[data-layer="1"][data-head="2"]').click()
        tab.locator(".word").nth(1).hover()
        settled(tab, 1, map="L1H2")
        assert ordered_like(heat_of(tab), answer.maps[1].words.unpack()[1])
        tab.locator('td[data-layer="0"][data-head="0"]').click()
        assert "--maps L0H0 stores it" in tab.locator(".spot").inner_text()
        tab.keyboard.press("ArrowDown")
        assert "Layer 1, head 0" in tab.locator(".spot").inner_text()
        tab.locator(".controls select").first.select_option("L2")
        tab.locator(".word").nth(1).hover()
        settled(tab, None, map="L2")
        assert "--maps L2 stores them" in tab.locator(".said").inner_text()

    check_page(written(tmp_path, prompt, {"": [answer]}), use, **WIDE)


def test_numbers_of_tokens_stand_beside_their_own_map_only(tmp_path):
    """With `--maps L1` the first map is not the mean, which the numbers per token belong to."""
    prompt = looked_at()
    answer = said(prompt, maps=("L1", "mean"), stored=("L1", "mean"))
    tokens = len(answer.pieces)
    mass = {"image_mass": np.full(tokens, 0.48, np.float32), "region_mass": np.linspace(0.01, 0.3, tokens)}
    answer = replace(answer, values={**answer.values, **mass, "sink_mass": np.full(tokens, 0.4, np.float32)})
    a, v = mass["region_mass"] / 5, mass["image_mass"] / 48
    single = a**2 / (a**2 + v**2)

    def use(tab):
        settled(tab, None, map="L1")
        told = tab.locator(".said").inner_text()
        assert f"{100 * answer.maps[0].total.unpack().sum():.1f} %" in told
        assert "R_a" not in tab.locator(".viewer").inner_text()
        assert "first token" not in told
        assert "Attention to the boxes." in tab.locator(".legend").inner_text(), "the first tint, with boxes"
        assert "Over map mean." in tab.locator(".legend").inner_text()
        tab.locator(".controls select").first.select_option("mean")
        settled(tab, None, map="mean")
        row = tab.locator(".said tr", has_text="R_a of single tokens, map mean")
        assert float(row.locator("td").last.inner_text()) == pytest.approx(single.mean(), rel=0.01)
        tab.locator(".word").nth(1).hover()
        settled(tab, 1, map="mean")
        assert float(row.locator("td").first.inner_text()) == pytest.approx(single[1:3].mean(), rel=0.01)
        assert tab.locator(".viewer").inner_text().count("R_a") == 1

    check_page(written(tmp_path, prompt, {"": [answer]}), use, **WIDE)


def flat(prompt):
    """A response whose maps are even but for one token."""
    answer, even_V = said(prompt), np.full(prompt.tokens, 0.01)
    even_V[0] = 0.0128
    maps = replace(
        answer.maps[0],
        total=Packed.of(even_V[None]),
        words=Packed.of(np.repeat(even_V[None], len(answer.words), 0)),
        steady=np.zeros(prompt.tokens, bool),
    )
    return replace(answer, maps=(maps,), facts={"accuracy": 0.0})


def test_a_nearly_even_map_is_said_to_be_so_and_not_stretched(tmp_path):
    prompt = looked_at()

    def use(tab):
        viewer = settled(tab, None)
        assert "Nearly even: the largest value is 1.3 times the mean." in tab.locator(".scale").inner_text()
        assert float(viewer.get_attribute("data-top")) == pytest.approx(0.02, rel=0.03)
        assert "The answer is wrong." in tab.locator(".right").inner_text()
        tab.locator(".checks label", has_text="picture alone").locator("input").check()
        assert not tab.locator("canvas").is_visible()
        assert tab.locator(".stack img").evaluate("(image) => getComputedStyle(image).filter") == "none"

    check_page(written(tmp_path, prompt, {"": [flat(prompt)]}), use, **WIDE)


def test_a_small_grid_has_no_border(tmp_path):
    prompt = looked_at((Tile(3, 3),))

    def use(tab):
        settled(tab, None)
        assert "border" not in tab.locator(".viewer").inner_text()
        tab.locator(".controls select").nth(1).select_option("steady")
        tab.wait_for_selector(".said .note")
        said_now = tab.locator(".said").inner_text()
        assert "There are no steady tokens here." in said_now
        assert "without steady tokens: 0 of 9" in said_now

    check_page(written(tmp_path, prompt, {"": [flat(prompt)]}), use, **WIDE)


def test_arrow_keys_reach_the_words_without_a_focus(tmp_path):
    prompt = looked_at()

    def use(tab):
        settled(tab, None)
        tab.keyboard.press("ArrowRight")
        settled(tab, 0)
        tab.keyboard.press("ArrowRight")
        settled(tab, 1)

    check_page(written(tmp_path, prompt, {"": [said(prompt)]}), use, **WIDE)


def test_a_group_is_shown_through_training(tmp_path):
    prompt = looked_at()
    states = {
        f"step {step}": [
            said(prompt, seed=step + i, facts={"accuracy": float(i % 2), "reward": 0.5 * i, "advantage": i - 1.5})
            for i in range(4 - (step == 10))
        ]
        for step in (0, 10, 20)
    }
    states["step 30"] = []

    def use(tab):
        slider = tab.locator(".states input")
        assert slider.input_value() == "3"
        assert "0 of 4 responses were recorded" in tab.locator("output").inner_text()
        assert "No response was recorded here" in tab.locator(".brief").inner_text()
        slider.focus()
        tab.keyboard.press("ArrowLeft")
        assert tab.locator(".verdict").all_inner_texts() == ["right", "wrong"] * 2, "the largest advantage comes first"
        tab.locator(".card").nth(2).locator(".word").nth(2).hover()
        settled(tab, 2, response=1)
        assert ordered_like(heat_of(tab), states["step 20"][1].maps[0].words.unpack()[2])
        slider.focus()
        tab.keyboard.press("ArrowLeft")
        assert "step 10 (2 of 4). 3 of 4 responses were recorded" in tab.locator("output").inner_text()
        assert tab.locator(".card").count() == 3

    check_page(written(tmp_path, prompt, states), use)


def test_texts_of_a_response_stay_texts(tmp_path):
    prompt = looked_at(text=EVIL)
    answer = said(prompt, (EVIL, " 红", "色", "\n\n", "", " " + EVIL), facts={EVIL: EVIL}, notes=(EVIL,))
    write_page(tmp_path / "page.html", EVIL, [(prompt, answer), (prompt, replace(answer, maps=()))], {EVIL: EVIL})

    def use(tab):
        assert tab.locator("img").count() == 2
        assert tab.locator(".words").first.inner_text().count(EVIL) == 2

    check_page(tmp_path / "page.html", use)


def test_a_browser_without_decompression_is_told_so(tmp_path):
    prompt = looked_at()
    path = written(tmp_path, prompt, {"": [said(prompt)]})

    def use(tab):
        tab.add_init_script("delete window.DecompressionStream")
        tab.reload()
        tab.wait_for_selector(".brief .warn")
        assert "lacks DecompressionStream" in tab.locator(".brief").inner_text()

    check_page(path, use, **WIDE)


def test_figures_are_drawn_at_each_width(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3))
    figure.subplots().imshow(np.eye(4))
    (tmp_path / "page.html").write_text(page("t", inline(figure, "a table") * 2), encoding="utf-8")
    check_page(tmp_path / "page.html")
