"""The page of `sayo inspect`: where boxes are in all rows, and samples with boxes and visual tokens, in one HTML file.

The file needs no network and no script: pictures are data URIs, drawings are SVG, the switches are CSS. Every text of
the data is escaped. A picture is drawn once for each resolution at which the model sees it: once for the Qwen families,
as tiles and as the thumbnail for InternVL. Without a model it is drawn once, with boxes only.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sayo_verl.data.reading import decoded
from sayo_verl.inspection.audit import Finding
from sayo_verl.inspection.model_view import Seen
from sayo_verl.inspection.positions import CELLS, Positions
from sayo_verl.vision.grids import Tile, token_levels

MAX_WIDTH, MAX_HEIGHT = 640, 960  # of a picture on the page, in its own pixels
MIN_SHOWN = 360  # CSS pixels: small pictures are shown enlarged
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22")
SWITCHES = {"box": "boxes", "token": "visual tokens in boxes", "grid": "grid of visual tokens"}


class Shown(NamedTuple):
    """A row of the page, and how the model sees it."""

    where: str
    row: Mapping[str, Any]
    seen: Seen


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:1.2em;color:#1d2429;background:#fff}
h1{font-size:1.35em;margin:.2em 0;overflow-wrap:anywhere}h2{font-size:1.1em;margin:1.6em 0 .4em}
table{border-collapse:collapse;font-size:14px}th,td{text-align:left;vertical-align:top;padding:.2em .9em .2em 0}
th{font-weight:600}td{white-space:pre-line;font-variant-numeric:tabular-nums}thead th{border-bottom:1px solid #ccd3d8}
.FAIL{color:#b00020;font-weight:600}.WARN{color:#9a6200;font-weight:600}
.rows,.meta,figcaption{color:#5a6670;font-size:12.5px;overflow-wrap:anywhere}
.switches{position:sticky;top:0;background:#fffffff0;padding:.5em 0;border-bottom:1px solid #ccd3d8;z-index:1}
.switches label{margin-right:1.4em}.sample{border-top:1px solid #ccd3d8;padding:1em 0}
.side{display:flex;flex-wrap:wrap;gap:1.2em 3em;align-items:flex-start}figure{margin:0;max-width:100%}
svg{display:block;max-width:100%;height:auto;border:1px solid #ccd3d8}path{vector-effect:non-scaling-stroke;fill:none}
.q{white-space:pre-wrap;margin:.3em 0;max-width:70em}.grid{stroke:#fff;stroke-opacity:.75;stroke-width:.7}
.token{fill:#ffb000;fill-opacity:.3;stroke:#ff8c00;stroke-width:1.4}.tile{stroke:#00a0a0;stroke-width:2}
path.box{stroke-width:2.2}text.box{font-weight:700;paint-order:stroke;stroke:#fff;stroke-width:.2em}
"""


def make_page(
    about: str, figures: Mapping[str, str], findings: Sequence[Finding], positions: Positions, samples: Sequence[Shown]
) -> str:
    """The whole file.

    Args:
        about: title of the page.
        figures: name -> value.
        findings: listed above the samples.
        positions: of the boxes of all rows.
        samples: in the order of the page.
    """
    style = _STYLE + "".join(f"body:has(#{name}:not(:checked)) .{name}{{display:none}}\n" for name in SWITCHES)
    listed = [
        (f"<span class={f.kind.level}>{f.kind.level}</span>", _text(f.kind.code), str(f.count))
        + (f'{_text(f.kind.what)}<div class="rows">{"<br>".join(map(_text, f.rows))}</div>', _text(f.kind.fix))
        for f in findings
    ]
    switches = "".join(f'<label><input type="checkbox" id="{k}" checked> {v}</label>' for k, v in SWITCHES.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(about)}</title><style>{style}</style></head><body>\n<h1>{_text(about)}</h1>\n"
        f'<div class="side">{_table([], [(f"<b>{_text(k)}</b>", _text(v)) for k, v in figures.items()])}'
        f"{_map(positions)}</div>\n<h2>Findings</h2>\n"
        + (_table(["", "code", "count", "what", "fix"], listed) if listed else "<p>None.</p>")
        + f'\n<h2>{len(samples)} rows</h2>\n<div class="switches">{switches}</div>\n'
        + "\n".join(map(_sample, samples))
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{body}</tbody></table>"


def _map(positions: Positions) -> str:
    """The heat map of boxes: the darker a cell, the more rows have a box there."""
    if not positions.rows:
        return ""
    share_GG = positions.map_GG / positions.rows
    top, size = float(share_GG.max()), 15
    cells = "".join(
        f'<rect x="{c * size}" y="{r * size}" width="{size}" height="{size}" fill="#08519c" '
        f'fill-opacity="{share / top:.3f}"><title>{share:.1%} of the rows with a box</title></rect>'
        for (r, c), share in np.ndenumerate(share_GG)
    )
    side, step = CELLS * size, CELLS * size / 5
    legend = "".join(
        f'<rect x="{i * step}" y="{side + 12}" width="{step}" height="12" fill="#08519c" fill-opacity="{i / 4}"/>'
        f'<text x="{(i + 0.5) * step}" y="{side + 40}" font-size="12" text-anchor="middle">{i / 4 * top:.0%}</text>'
        for i in range(5)
    )
    thirds = "".join(f"M{side * i / 3:.1f} 0v{side}M0 {side * i / 3:.1f}h{side}" for i in (1, 2))
    return (
        f'<figure id="map"><figcaption>Share of the {positions.rows} rows with boxes that have a box here, all images '
        f'stretched to a square</figcaption><svg viewBox="0 0 {side} {side + 48}" width="{side}" role="img">{cells}'
        f'<path stroke="#5a6670" stroke-dasharray="3 4" d="{thirds}M0 {side}h{side}"/>{legend}</svg></figure>'
    )


def _sample(sample: Shown) -> str:
    row, seen, info = sample.row, sample.seen, sample.row.get("extra_info") or {}
    names = info.get("box_names") or [[] for _ in seen.tiles]
    images = zip(row.get("images") or [], seen.tiles, seen.boxes, names, seen.masks, strict=True)
    pictures = "".join(_picture(decoded(image, sample.where), *of_image) for image, *of_image in images)
    question = "\n".join(str(message["content"]) for message in row["prompt"])
    facts = [row["data_source"], info.get("kind") or "-", f"boxes: {info.get('box_source') or '-'}"]
    facts += [f"prompt of {seen.prompt_tokens} tokens"] if seen.prompt_tokens else []
    return (
        f'<div class="sample"><b>{_text(sample.where)}</b><div class="meta">{_text(", ".join(map(str, facts)))}</div>'
        f'<div class="q">{_text(question)}</div><b>{_text(row["reward_model"]["ground_truth"])}</b>{pictures}</div>'
    )


def _picture(
    image: Image.Image, tiles: Sequence[Tile], boxes: Sequence[Any], names: Sequence[str], mask_NV: np.ndarray
) -> str:
    """An image at each of its resolutions, and the table of its boxes."""
    V, covered_V = mask_NV.shape[1], mask_NV.any(axis=0)
    level_V = token_levels(tiles, where="page") if tiles else np.zeros(0, dtype=np.int64)
    first_T = np.cumsum([0, *(tile.tokens for tile in tiles)])[:-1]
    cells_V4 = np.concatenate([_cells(tile) for tile in tiles] or [np.zeros((0, 4))])
    shown = image.copy()
    shown.thumbnail((MAX_WIDTH, MAX_HEIGHT))
    drawings = []
    for level in range(max(level_V, default=0) + 1):
        here_V = level_V == level
        of_level = [tile for tile, first in zip(tiles, first_T, strict=True) if level_V[first] == level]
        paths = _path("token", cells_V4[here_V & covered_V]) + _path("grid", cells_V4[here_V])
        if len(of_level) > 1:
            paths += _path("tile", [(tile.x0, tile.y0, tile.x1, tile.y1) for tile in of_level])
        down, across = (len(np.unique(cells_V4[here_V][:, axis].round(6))) for axis in (1, 0))
        caption = f"{down} x {across} visual tokens (down x across)" if tiles else "boxes only"
        if level_V.any():
            caption += f", {len(of_level)} tiles" if level == 0 else ", thumbnail"
        drawings.append(_drawing(shown, paths, boxes, caption))
    rows = [
        (f'<b style="color:{_colour(i)}">{i + 1}</b>', _text(names[i] if i < len(names) else "-"))
        + (str(int(mask_NV[i].sum())) if tiles else "-", f"{100 * (box[2] - box[0]) * (box[3] - box[1]):.2f} %")
        + (", ".join(f"{v:.4f}" for v in box),)
        for i, box in enumerate(boxes)
    ]
    size = f"{image.width} x {image.height} pixels"
    size += f", {V} visual tokens, {int(covered_V.sum())} in boxes" if tiles else ""
    table = _table(["box", "name", "tokens", "of the image", "x0, y0, x1, y1"], rows) if rows else "<p>No box.</p>"
    return f'<div class="meta">{size}</div><div class="side">{"".join(drawings)}{table}</div>'


def _drawing(image: Image.Image, paths: str, boxes: Sequence[Any], caption: str) -> str:
    (width, height), letter = image.size, max(image.width, 60) / 28
    zoom = max(1.0, MIN_SHOWN / width)
    labels = ""
    for i, (x0, y0, *_) in enumerate(boxes):
        paths += _path("box", [boxes[i]], f' stroke="{_colour(i)}"')
        labels += f'<text class="box" fill="{_colour(i)}" font-size="{letter:.2f}" x="{x0 * width + letter / 4:.2f}" '
        labels += f'y="{max(y0 * height - letter / 4, letter):.2f}">{i + 1}</text>'
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" width="{width * zoom:.0f}" role="img">'
        f'<image href="{_data_uri(image)}" width="{width}" height="{height}"/>'
        f'<g transform="scale({width} {height})">{paths}</g>{labels}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _cells(tile: Tile) -> np.ndarray:
    """Corners of the cells of a tile in token order: float64 [tokens, 4]."""
    x, y = np.linspace(tile.x0, tile.x1, tile.cols + 1), np.linspace(tile.y0, tile.y1, tile.rows + 1)
    return np.array([(x[c], y[r], x[c + 1], y[r + 1]) for r in range(tile.rows) for c in range(tile.cols)])


def _path(name: str, boxes: Iterable[Sequence[float]], more: str = "") -> str:
    """Rectangles of a kind, in shares of the image."""
    drawn = "".join(f"M{x0:.5f} {y0:.5f}H{x1:.5f}V{y1:.5f}H{x0:.5f}z" for x0, y0, x1, y1 in boxes)
    return f'<path class="{name}"{more} d="{drawn}"/>'


def _data_uri(image: Image.Image) -> str:
    """PNG for small pictures, because it is lossless and short there; JPEG for others."""
    kind = "PNG" if image.width * image.height <= 128 * 128 else "JPEG"
    out = io.BytesIO()
    image.save(out, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
