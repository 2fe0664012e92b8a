"""Open a page in the system's Chromium, and say what is wrong with it.

``check_page`` is what the test of each page calls. No browser is downloaded: the one on PATH is driven by Playwright.
Without one the test is skipped, and tests/conftest.py says so at the end of the run. All tests of a process share one
browser. It lives in a thread of its own, because Playwright's event loop would break ``asyncio.run`` in other tests.
"""

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NO_BROWSER = f"no browser on PATH (tried: {', '.join(BROWSERS)})"
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")  # a phone and a laptop, in CSS pixels
LOCAL = re.compile(r"(file|data|blob|about):")
THREAD = ThreadPoolExecutor(1, thread_name_prefix="browser")

# Run in the page. Returns problems: broken pictures, overflow, and colours that ignore the scheme.
LOOK = """async (scheme) => {
  const found = [];
  const name = (e) => [e.tagName.toLowerCase() + (e.id && "#" + e.id), ...e.classList].join(".");
  for (const image of document.images) {
    await image.decode().catch(() => {});
    if (!image.naturalWidth) found.push(`image without pixels: ${name(image)} ${image.src.slice(0, 80)}`);
  }
  for (const href of new Set([...document.querySelectorAll("svg image")].map((e) => e.href.baseVal))) {
    const image = new Image();
    image.src = href;
    await image.decode().catch(() => found.push(`image without pixels in an svg: ${href.slice(0, 80)}`));
  }
  const root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const right = (e) => Math.round(e.getBoundingClientRect().right + scrollX);
    const wide = [...document.body.querySelectorAll("*")].filter((e) => right(e) > root.clientWidth);
    wide.sort((a, b) => right(b) - right(a));
    const named = wide.slice(0, 5).map((e) => `${name(e)} to ${right(e)}`).join(", ");
    found.push(`horizontal overflow: ${root.scrollWidth} > ${root.clientWidth} pixels: ${named}`);
  }
  const canvas = document.createElement("i");
  canvas.style.backgroundColor = "Canvas";
  document.body.append(canvas);
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const behind = [document.body, root, canvas].map((e) => channels(getComputedStyle(e).backgroundColor));
  const paper = behind.find((c) => c.length < 4 || c[3] > 0.5);
  const ink = channels(getComputedStyle(document.body).color);
  canvas.remove();
  const light = (c) => 0.2126 * (c[0] / 255) ** 2.2 + 0.7152 * (c[1] / 255) ** 2.2 + 0.0722 * (c[2] / 255) ** 2.2;
  const [low, high] = [light(ink), light(paper)].sort((a, b) => a - b);
  if ((high + 0.05) / (low + 0.05) < 4.5) found.push(`text is hard to read: rgb(${ink}) on rgb(${paper})`);
  if ((light(paper) < light(ink)) != (scheme == "dark")) found.push(`background rgb(${paper}) in a ${scheme} scheme`);
  return found;
}"""


@functools.cache
def find_browser() -> str | None:
    """The command of a browser that starts; Ubuntu's chromium-browser may be a stub that asks for a snap."""
    for name in BROWSERS:
        try:
            if subprocess.run([name, "--version"], capture_output=True, timeout=60).returncode == 0:
                return name
        except OSError:
            continue
    return None


@functools.cache
def _shared() -> tuple[Any, Any]:
    """Playwright and the browser of this process. Called in ``THREAD`` only."""
    from playwright.sync_api import sync_playwright

    found = find_browser()
    assert found is not None, NO_BROWSER
    driver = sync_playwright().start()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    return driver, driver.chromium.launch(executable_path=shutil.which(found), args=arguments)


def close_browser() -> None:
    """Close the browser of this process, if one was opened."""
    if _shared.cache_info().currsize:
        driver, browser = THREAD.submit(_shared).result()
        THREAD.submit(lambda: (browser.close(), driver.stop())).result()
        _shared.cache_clear()


def problems(path: Path, width: int, scheme: str, act: Callable[[Any], None] | None = None) -> list[str]:
    """What is wrong with a page at a width in CSS pixels and a colour scheme; after ``act`` too, if that is given.

    Requests for anything but local files and data are stopped and reported.
    """
    found: list[str] = []

    def look() -> None:
        context = _shared()[1].new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(60_000)
        context.route(re.compile(f"^(?!{LOCAL.pattern})"), lambda route: route.abort())
        context.on("request", lambda r: None if LOCAL.match(r.url) else found.append(f"request for {r.url}"))
        context.on("requestfailed", lambda r: found.append(f"request failed: {r.url[:80]}"))
        page = context.new_page()
        page.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: found.append(f"error of a script: {error}"))
        try:
            page.goto(path.resolve().as_uri())
            found.extend(page.evaluate(LOOK, scheme))
            if act is not None:
                act(page)
                found.extend(page.evaluate(LOOK, scheme))
        finally:
            context.close()

    THREAD.submit(look).result()
    return list(dict.fromkeys(found))


def check_page(
    path: Path,
    act: Callable[[Any], None] | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    schemes: Sequence[str] = SCHEMES,
) -> None:
    """Fail with all problems of a page, at each width and in each colour scheme.

    Args:
        path: the HTML file.
        act: uses the page (a Playwright ``Page``) and asserts what it does; the page is looked at again afterwards.
    """
    if find_browser() is None:
        pytest.skip(NO_BROWSER)
    found = {f"{w} px, {s}": p for w in widths for s in schemes if (p := problems(path, w, s, act))}
    assert not found, "\n".join(f"{path.name} at {name}: {'; '.join(found[name])}" for name in found)
