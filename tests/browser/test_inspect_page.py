"""The page of `sayo inspect` in a browser."""

import numpy as np
from support.browser import check_page
from support.inspected import BOX, encoded, row

from sayo_verl.inspection.audit import Finding
from sayo_verl.inspection.model_view import Seen
from sayo_verl.inspection.page import make_page
from sayo_verl.vision.grids import merged_grid, tile_grid
from sayo_verl.vision.masks import box_masks


def test_the_page_fits_and_its_switches_work(tmp_path):
    long = "a/long/path/without/blanks/" * 12
    seen = []
    for number, (tiles, size) in enumerate(
        [(merged_grid(1, 40, 60, 2, where=""), (1400, 900)), (tile_grid(3, 2, 4, where=""), (96, 64))]
    ):
        made = row(number, data=[encoded(size=size)], boxes=[[BOX]], question=long, answer=long, source=long, kind=long)
        seen.append(Seen(long, made, [tiles], [[BOX]], [box_masks([BOX], tiles)], 40))
    findings = [Finding("D66", level, long, f"bash {long}", 3, (long, long)) for level in ("FAIL", "WARN", "INFO")]
    page = tmp_path / "page.html"
    figures = {"rows": "train 10, val 1", "visual tokens of a box": "min 3, median 10, max 1,024", "file": long}
    page.write_text(make_page(long, figures, findings, np.array([BOX] * 3), seen), encoding="utf-8")

    def switch(opened):
        assert all(opened.locator("svg").nth(i).bounding_box()["width"] > 300 for i in range(3))
        for name in ("box", "token", "grid"):
            drawn = opened.locator(f"path.{name}").first
            assert drawn.is_visible()
            opened.uncheck(f"#{name}")
            assert not drawn.is_visible()

    check_page(page, switch)
