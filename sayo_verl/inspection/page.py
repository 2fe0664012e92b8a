"""The page of `sayo inspect`: where all boxes are, and some rows with boxes and visual tokens, in one HTML file.

The file needs no network and no script. Every text of the data is escaped. A picture is drawn once for each resolution
at which the model sees it: for InternVL as tiles and as the thumbnail. Without a model only its boxes are drawn.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from sayo_verl.data.reading import decoded
from sayo_verl.inspection.audit import Finding
from sayo_verl.inspection.model_view import Seen
from sayo_verl.inspection.positions import covered
from sayo_verl.vision.grids import Tile, token_levels

MAX_SIZE, MIN_SHOWN = (640, 960), 360  # of a picture in its pixels; its width on the page, where it may be enlarged
MAP_CELLS, CELL = 24, 15  # the map of boxes: cells along a side, pixels of a cell
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22")
SWITCHES = {"box": "boxes", "token": "visual tokens in boxes", "grid": "grid of visual tokens"}
STYLE = """
:root{color-scheme:light dark;--ink:#1d2429;--grey:#5a6670;--faint:#ccd3d8;--paper:#fff;--fail:#b00020;--warn:#9a6200}
:root{--much:#08519c}@media(prefers-color-scheme:dark){:root{--ink:#e3e7ea;--grey:#a4afb8;--faint:#3c464e}
:root{--paper:#15191c;--fail:#ff8a93;--warn:#e0ac4e;--much:#6db3ff}}
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:1.2em;color:var(--ink)}
body,.switches{background:var(--paper)}td,.q,.row>b{overflow-wrap:anywhere}td:first-child{overflow-wrap:normal}
h1{font-size:1.35em;overflow-wrap:anywhere}h2{font-size:1.1em;margin:1.6em 0 .4em}
.tile{stroke:#00a0a0;stroke-width:2}
table{border-collapse:collapse;font-size:14px}td{vertical-align:top;padding:.2em .9em .2em 0;white-space:pre-wrap}
.FAIL{color:var(--fail)}.WARN{color:var(--warn)}.meta,figcaption{color:var(--grey);font-size:12.5px}
.meta,figcaption{overflow-wrap:anywhere}.switches{position:sticky;top:0;padding:.5em 0;z-index:1}
label{margin-right:1.4em;white-space:nowrap}.row{border-top:1px solid var(--faint);padding:1em 0}
.q{white-space:pre-wrap;margin:.3em 0;max-width:70em}
.side{display:flex;flex-wrap:wrap;gap:1.2em 2.5em;align-items:flex-start}
figure{margin:0;max-width:100%}figcaption{width:0;min-width:100%}
svg{display:block;max-width:100%;height:auto;border:1px solid var(--faint)}.side>div{min-width:0}
path{vector-effect:non-scaling-stroke;fill:none}
.scale{display:inline-block;width:9em;height:.8em;margin:0 .5em}
.scale{background:linear-gradient(90deg,var(--paper),var(--much))}
.grid{stroke:#fff;stroke-opacity:.75;stroke-width:.7}.token{fill:#ffb000;fill-opacity:.3;stroke:#ff8c00}
path.box{stroke-width:2.2}text.box{font-weight:700;paint-order:stroke;stroke:#fff;stroke-width:.2em}
""" + "".join(f"body:has(#{name}:not(:checked)) .{name}{{display:none}}\n" for name in SWITCHES)
BEFORE, AFTER = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>', "</body></html>\n"


def make_page(
    about: str, figures: Mapping[str, str], findings: Sequence[Finding], boxes_N4: np.ndarray, rows: Sequence[Seen]
) -> str:
    """The whole file: title, figures by name, the map of the boxes of all rows, findings, and rows in their order."""
    switches = "".join(f'<label><input type="checkbox" id="{k}" checked> {v}</label>' for k, v in SWITCHES.items())
    counted = _table((f"<b>{escape(name)}</b>", escape(value)) for name, value in figures.items())
    found = _table(
        (
            f'<b class="{f.level}">{f.level}</b> {f.code}, count {f.count}',
            f'{escape(f.what)}<div class="meta">{"<br>".join(map(escape, f.rows))}</div>fix: {escape(f.fix)}',
        )
        for f in findings
    )
    return (
        f"{BEFORE}{escape(about)}</title><style>{STYLE}</style></head><body>\n<h1>{escape(about)}</h1>\n"
        f'<div class="side">{counted}{_map(boxes_N4) if len(boxes_N4) else ""}</div>\n'
        f"<h2>Findings ({len(findings)})</h2>\n{found}\n<h2>Rows ({len(rows)})</h2>\n"
        f'<div class="switches">{switches}</div>\n' + "\n".join(map(_row, rows)) + AFTER
    )


def _table(rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells."""
    return "<table>" + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows) + "</table>"


def _map(boxes_N4: np.ndarray) -> str:
    """The heat map of boxes: the darker a cell, the more boxes cover it."""
    share_GG = covered(boxes_N4, MAP_CELLS)
    side, most = MAP_CELLS * CELL, float(share_GG.max())
    cells = "".join(
        f'<rect x="{c * CELL}" y="{r * CELL}" width="{CELL}" height="{CELL}" fill="var(--much)" '
        f'fill-opacity="{share / most:.3f}"><title>{share:.1%} of the boxes</title></rect>'
        for (r, c), share in np.ndenumerate(share_GG)
    )
    thirds = "".join(f"M{i * side / 3} 0v{side}M0 {i * side / 3}h{side}" for i in (1, 2))
    return (
        f'<figure><svg id="map" viewBox="0 0 {side} {side}" width="{side}" role="img">{cells}<path '
        f'stroke="var(--grey)" stroke-dasharray="3 4" d="{thirds}"/></svg>'
        f'<figcaption>0 %<span class="scale"></span>{most:.1%} of the '
        f"{len(boxes_N4)} boxes cover this place of their image</figcaption></figure>"
    )


def _row(seen: Seen) -> str:
    row, info = seen.row, seen.row.get("extra_info") or {}
    names = info.get("box_names") or [[] for _ in seen.tiles]
    images = zip(row.get("images") or [], seen.tiles, seen.boxes, names, seen.masks, strict=True)
    pictures = "".join(_picture(decoded(image, seen.where), *of_image) for image, *of_image in images)
    question = "\n".join(str(message["content"]) for message in row["prompt"])
    facts = f"{row['data_source']}, {info.get('kind') or '-'}, boxes: {info.get('box_source') or '-'}"
    facts += f", prompt of {seen.prompt_tokens} tokens" if seen.prompt_tokens else ""
    return (
        f'<div class="row"><b>{escape(seen.where)}</b><div class="meta">{escape(facts)}</div><div class="q">'
        f"{escape(question)}</div><b>{escape(str(row['reward_model']['ground_truth']))}</b>{pictures}</div>"
    )


def _picture(
    image: Image.Image, tiles: Sequence[Tile], boxes: Sequence[Any], names: Sequence[str], mask_NV: np.ndarray
) -> str:
    """An image at each of its resolutions, and the table of its boxes."""
    size, covered_V = f"{image.width} x {image.height} pixels", mask_NV.any(axis=0)
    size += f", {mask_NV.shape[1]} visual tokens, {covered_V.sum()} in boxes" if tiles else ""
    image.thumbnail(MAX_SIZE)
    drawings = "" if tiles else _drawing(image, "", boxes, "boxes only")
    cells_V4 = np.array([cell for tile in tiles for cell in _cells(tile)]).reshape(-1, 4)
    level_V = token_levels(tiles, where="page") if tiles else np.zeros(0, dtype=np.int64)
    tile_V = np.repeat(np.arange(len(tiles)), [tile.tokens for tile in tiles])
    for level in range(max(level_V, default=-1) + 1):
        here_V = level_V == level
        of_level = [tiles[i] for i in np.unique(tile_V[here_V])]
        paths = _path("token", cells_V4[here_V & covered_V]) + _path("grid", cells_V4[here_V])
        paths += _path("tile", [(t.x0, t.y0, t.x1, t.y1) for t in of_level]) if len(of_level) > 1 else ""
        across, down = (len(np.unique(cells_V4[here_V, axis].round(6))) for axis in (0, 1))
        note = f"{len(of_level)} tiles: " if len(of_level) > 1 else "thumbnail: " if level else ""
        drawings += _drawing(image, paths, boxes, f"{note}{down} x {across} visual tokens (down x across)")
    listed = [
        [
            f'<b style="color:{COLOURS[i % len(COLOURS)]}">{i + 1}</b>',
            escape(names[i] if i < len(names) else "-"),
            f"visual tokens: {mask_NV[i].sum()}" if tiles else "",
            f"{(x1 - x0) * (y1 - y0):.2%} of the image",
            f"{x0:.4f}, {y0:.4f}, {x1:.4f}, {y1:.4f}",
        ]
        for i, (x0, y0, x1, y1) in enumerate(boxes)
    ]
    return f'<div class="meta">{size}</div><div class="side">{drawings}<div>{_table(listed)}</div></div>'


def _drawing(image: Image.Image, paths: str, boxes: Sequence[Any], caption: str) -> str:
    """Boxes and ``paths`` over an image; paths are in shares of the image."""
    (width, height), letter, labels, out = image.size, max(image.width, 60) / 28, "", io.BytesIO()
    for i, box in enumerate(boxes):
        colour, x, y = COLOURS[i % len(COLOURS)], box[0] * width + letter / 4, max(box[1] * height - letter / 4, letter)
        paths += _path("box", [box], f' stroke="{colour}"')
        labels += f'<text class="box" fill="{colour}" font-size="{letter:.2f}" x="{x:.2f}" y="{y:.2f}">{i + 1}</text>'
    kind = "png" if width * height <= 128 * 128 else "jpeg"  # PNG is lossless, and short for small pictures
    image.save(out, kind, quality=85)
    data = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{max(width, MIN_SHOWN)}" role="img">'
        f'<image href="{data}" width="{width}" height="{height}"/><g transform="scale({width} {height})">{paths}</g>'
        f"{labels}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _cells(tile: Tile) -> list[tuple[float, ...]]:
    """Corners of the cells of a tile, in token order."""
    x, y = np.linspace(tile.x0, tile.x1, tile.cols + 1), np.linspace(tile.y0, tile.y1, tile.rows + 1)
    return [(x[c], y[r], x[c + 1], y[r + 1]) for r in range(tile.rows) for c in range(tile.cols)]


def _path(name: str, boxes: Iterable[Sequence[float]], more: str = "") -> str:
    """Rectangles of a kind, in shares of the image."""
    drawn = "".join(f"M{x0:.5f} {y0:.5f}H{x1:.5f}V{y1:.5f}H{x0:.5f}z" for x0, y0, x1, y1 in boxes)
    return f'<path class="{name}"{more} d="{drawn}"/>'
