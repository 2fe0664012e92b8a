"""The checker of pages finds what it is there for, and says when it did not run."""

import asyncio
from pathlib import Path

import pytest
from support import browser
from support.browser import check_page, find_browser, problems

GOOD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,"><title>x</title>'
    "<style>:root{color-scheme:light dark}</style><body><p>text</p>%s</body></html>"
)
BAD = {
    "external picture": ('<img src="https://example.com/a.png">', "request for https://example.com/a.png"),
    "external style": (
        '<link rel="stylesheet" href="http://example.com/a.css">',
        "request for http://example.com/a.css",
    ),
    "missing picture": ('<img src="missing.png">', "image without pixels: img"),
    "broken picture in an svg": ('<svg><image href="data:image/png;base64,AAAA"/></svg>', "without pixels in an svg"),
    "console": ("<script>console.error('lost')</script>", "console: lost"),
    "script": ("<script>undefinedName()</script>", "undefinedName is not defined"),
    "overflow": ('<div id="wide" class="row" style="width:2000px">x</div>', "div#wide.row to 20"),
    "one scheme": ("<style>body{background:#fff;color:#000}</style>", "background rgb(255,255,255) in a dark scheme"),
    "contrast": ("<style>body{background:#777;color:#888}</style>", "text is hard to read"),
}


def written(folder: Path, body: str) -> Path:
    page = folder / "page.html"
    page.write_text(GOOD % body)
    return page


def test_a_good_page_passes_and_is_used(tmp_path):
    pressed = []

    def press(page):
        page.click("button")
        pressed.append(page.inner_text("button"))

    check_page(written(tmp_path, """<button onclick="this.textContent='done'">go</button>"""), press)
    assert pressed == ["done"] * 4
    assert asyncio.run(asyncio.sleep(0, "other tests may use a loop")), "the browser's own loop is not in this thread"


@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD)
def test_a_bad_page_fails(tmp_path, body, says):
    if find_browser() is None:
        pytest.skip(browser.NO_BROWSER)
    found = "; ".join(problems(written(tmp_path, body), 390, "dark"))
    assert says in found


def test_what_an_action_breaks_is_found(tmp_path):
    with pytest.raises(AssertionError, match=r"page.html at 390 px, light: .*lost"):
        check_page(written(tmp_path, ""), lambda page: page.evaluate("console.error('lost')"))


def test_what_an_action_asserts_fails_the_test(tmp_path):
    def drag(page):
        assert page.inner_text("p") == "moved"

    with pytest.raises(AssertionError, match="moved"):
        check_page(written(tmp_path, ""), drag)


def test_a_stub_is_not_a_browser(tmp_path, monkeypatch):
    (tmp_path / "chromium").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "chromium").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_browser.__wrapped__() is None
