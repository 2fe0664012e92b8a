"""The page of `sayo inspect`: samples with their boxes and visual tokens drawn over them, in one HTML file.

The file needs no network and no script: pictures are data URIs, drawings are SVG, the switches are CSS. Every text of
the data is escaped. A picture is drawn once for each resolution at which the model sees it: once for the Qwen families,
as tiles and as the thumbnail for InternVL. Without a model it is drawn once, with boxes only. The cell of a covered
visual token carries the number of the token within its image as ``data-token``.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sayo_verl.inspection.findings import Finding
from sayo_verl.vision.grids import Tile, token_levels

MAX_WIDTH, MAX_HEIGHT = 640, 960  # of a picture on the page, in its own pixels
MIN_SHOWN = 360  # CSS pixels: small pictures are shown enlarged
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#8c564b", "#17becf", "#bcbd22")


@dataclass(frozen=True)
class Picture:
    """An image of a sample.

    Attributes:
        image: as stored, RGB.
        tiles: its grids of visual tokens, in token order; empty without a model.
        boxes: N boxes in [0, 1].
        names: names of the boxes; may be empty.
        mask_NV: bool [N, V]: the visual tokens of each box.
    """

    image: Image.Image
    tiles: tuple[Tile, ...]
    boxes: Sequence[Sequence[float]]
    names: Sequence[str]
    mask_NV: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A row of the page, with the reason why it was chosen. ``prompt_tokens`` is None without a model."""

    where: str
    why: str
    question: str
    answer: str
    source: str
    kind: str
    box_source: str
    prompt_tokens: int | None
    pictures: tuple[Picture, ...]


_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1400px;padding:1.2em;color:#1d2429;background:#fff}
h1{font-size:1.35em;margin:.2em 0}h2{font-size:1.1em;margin:1.6em 0 .4em}
table{border-collapse:collapse;font-size:14px}th,td{text-align:left;vertical-align:top;padding:.2em .9em .2em 0}
td.n{text-align:right;font-variant-numeric:tabular-nums}thead th{border-bottom:1px solid #ccd3d8}
.FAIL{color:#b00020;font-weight:600}.WARN{color:#9a6200;font-weight:600}.INFO{color:#5a6670}
.rows{color:#5a6670;font-size:12.5px;overflow-wrap:anywhere}
.switches{position:sticky;top:0;background:#fffffff0;padding:.5em 0;border-bottom:1px solid #ccd3d8;z-index:1}
.switches label{margin-right:1.4em}
.sample{border-top:1px solid #ccd3d8;padding:1em 0}
.pictures{display:flex;flex-wrap:wrap;gap:1.2em}figure{margin:0}figcaption{font-size:12.5px;color:#5a6670}
svg{display:block;max-width:100%;height:auto;border:1px solid #ccd3d8}
.q{white-space:pre-wrap;margin:.3em 0;max-width:70em}.a{font-weight:600}.meta{color:#5a6670;font-size:13px}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.token,.grid,.tiles,.box{vector-effect:non-scaling-stroke}
.label{font-weight:700;paint-order:stroke;stroke:#fff;stroke-width:.2em}
body:has(#grid:not(:checked)) :is(.grid,.tiles){display:none}
body:has(#tokens:not(:checked)) .token{display:none}
body:has(#boxes:not(:checked)) :is(.box,.label){display:none}
"""


def make_page(
    about: str, figures: Sequence[tuple[str, str]], findings: Sequence[Finding], samples: Sequence[Sample]
) -> str:
    """The whole file.

    Args:
        about: title of the page.
        figures: (name, value).
        findings: listed above the samples.
        samples: in the order of the page.
    """
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in figures)
    switches = "".join(
        f'<label><input type="checkbox" id="{name}" checked> {label}</label>'
        for name, label in (("boxes", "boxes"), ("tokens", "visual tokens in boxes"), ("grid", "grid of visual tokens"))
    )
    shown = "".join(_sample(i, sample) for i, sample in enumerate(samples))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(about)}</title><style>{_STYLE}</style></head><body>\n"
        f'<h1>{_text(about)}</h1>\n<table class="figures">{rows}</table>\n<h2>Findings</h2>\n{_findings(findings)}\n'
        f'<h2>{len(samples)} rows</h2>\n<div class="switches">{switches}</div>\n{shown}\n</body></html>\n'
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return "<p>None.</p>"
    rows = "".join(
        f'<tr><td class="{f.level}">{f.level}</td><td>{_text(f.code)}</td><td>{_text(f.what)}'
        f'<div class="rows">{"<br>".join(_text(row) for row in f.rows)}</div></td><td class="n">{f.count}</td>'
        f"<td>{_text(f.fix)}</td></tr>"
        for f in findings
    )
    return (
        '<table class="findings"><thead><tr><th></th><th>code</th><th>what</th><th>count</th><th>fix</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _sample(number: int, sample: Sample) -> str:
    length = "" if sample.prompt_tokens is None else f"prompt of {sample.prompt_tokens} tokens, "
    facts = f"{sample.source}, {sample.kind}, boxes: {sample.box_source}, {length}chosen: {sample.why}"
    pictures = "".join(_picture(f"s{number}i{i}", picture) for i, picture in enumerate(sample.pictures))
    return (
        f'<section class="sample" id="s{number}"><h2>{_text(sample.where)}</h2><div class="meta">{_text(facts)}</div>'
        f'<p class="q">{_text(sample.question)}</p><p class="a">{_text(sample.answer)}</p>{pictures}</section>\n'
    )


def _picture(name: str, picture: Picture) -> str:
    level_V = token_levels(picture.tiles, where=name) if picture.tiles else np.zeros(0, dtype=int)
    covered_V = np.logical_or.reduce(picture.mask_NV, axis=0)
    V, n_levels = len(level_V), int(level_V.max(initial=0)) + 1
    figures = "".join(_level(name, picture, level, level_V, covered_V, n_levels) for level in range(n_levels))
    boxes = "".join(
        f'<tr><td><span class="swatch" style="background:{COLOURS[i % len(COLOURS)]}"></span>{i + 1}</td>'
        f"<td>{_text(picture.names[i] if i < len(picture.names) else '-')}</td>"
        f'<td class="n">{int(picture.mask_NV[i].sum()) if picture.tiles else "-"}</td>'
        f'<td class="n">{100 * (box[2] - box[0]) * (box[3] - box[1]):.2f} %</td>'
        f"<td>{', '.join(f'{v:.4f}' for v in box)}</td></tr>"
        for i, box in enumerate(picture.boxes)
    )
    table = (
        "<table><thead><tr><th>box</th><th>name</th><th>tokens</th><th>of the image</th><th>x0, y0, x1, y1</th></tr>"
        f"</thead><tbody>{boxes}</tbody></table>"
        if boxes
        else "<p>No box.</p>"
    )
    size = f"{picture.image.width} x {picture.image.height} pixels"
    if picture.tiles:
        size += f", {V} visual tokens, {int(covered_V.sum())} in boxes"
    return f'<div class="meta">{size}</div><div class="pictures">{figures}<div>{table}</div></div>'


def _level(name: str, picture: Picture, level: int, level_V: np.ndarray, covered_V: np.ndarray, n_levels: int) -> str:
    """One drawing: the tiles of a level over the picture, in pixels of the drawn picture."""
    shown = _reduced(picture.image)
    width, height = shown.size
    first, cells, grid, borders, rows, cols = 0, [], [], [], 0, 0
    tiles = []
    for tile in picture.tiles:
        if level_V[first] == level:
            tiles.append(tile)
            cells += _cells(tile, first, covered_V, width, height)
            grid.append(_lines(tile, width, height))
            borders.append(_rect("tiles", _scaled((tile.x0, tile.y0, tile.x1, tile.y1), width, height)))
        first += tile.tokens
    rows = sum(tile.rows for tile in tiles if tile.x0 == 0)
    cols = sum(tile.cols for tile in tiles if tile.y0 == 0)
    level_name = "" if n_levels == 1 else (f", {len(tiles)} tiles" if len(tiles) > 1 else ", thumbnail")
    caption = f"{rows} x {cols} visual tokens (down x across){level_name}" if tiles else "boxes only"
    zoom = max(1.0, MIN_SHOWN / width)
    background = f'<image href="{_data_uri(shown)}" width="{width}" height="{height}"/>'
    letter = max(width, 60) / 28
    boxes = "".join(
        _rect("box", _scaled(box, width, height), f' stroke="{colour}" data-box="{i}"')
        + f'<text class="label" fill="{colour}" font-size="{letter:.2f}" x="{box[0] * width + letter * 0.25:.2f}" '
        f'y="{max(box[1] * height - letter * 0.25, letter):.2f}">{i + 1}</text>'
        for i, box in enumerate(picture.boxes)
        for colour in [COLOURS[i % len(COLOURS)]]
    )
    return (
        f'<figure><svg data-image="{name}" data-level="{level}" viewBox="0 0 {width} {height}" '
        f'width="{width * zoom:.0f}" height="{height * zoom:.0f}" role="img">{background}'
        f'<g fill="#ffb000" fill-opacity=".3" stroke="#ff8c00" stroke-width="1.4">{"".join(cells)}</g>'
        f'<path class="grid" fill="none" stroke="#fff" stroke-opacity=".75" stroke-width=".7" d="{"".join(grid)}"/>'
        f'<g fill="none" stroke="#00a0a0" stroke-width="2">{"".join(borders) if len(tiles) > 1 else ""}</g>'
        f'<g fill="none" stroke-width="2.2">{boxes}</g></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _cells(tile: Tile, first: int, covered_V: np.ndarray, width: int, height: int) -> list[str]:
    """Rectangles of the covered tokens of a tile whose first token is ``first``."""
    across, down = (tile.x1 - tile.x0) / tile.cols, (tile.y1 - tile.y0) / tile.rows
    out = []
    for token in np.flatnonzero(covered_V[first : first + tile.tokens]):
        row, col = divmod(int(token), tile.cols)
        x, y = tile.x0 + col * across, tile.y0 + row * down
        out.append(
            _rect("token", _scaled((x, y, x + across, y + down), width, height), f' data-token="{first + int(token)}"')
        )
    return out


def _lines(tile: Tile, width: int, height: int) -> str:
    x0, y0, x1, y1 = _scaled((tile.x0, tile.y0, tile.x1, tile.y1), width, height)
    across, down = (x1 - x0) / tile.cols, (y1 - y0) / tile.rows
    return "".join(f"M{x0 + c * across:.3f} {y0:.3f}V{y1:.3f}" for c in range(1, tile.cols)) + "".join(
        f"M{x0:.3f} {y0 + r * down:.3f}H{x1:.3f}" for r in range(1, tile.rows)
    )


def _scaled(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _rect(kind: str, corners: tuple[float, float, float, float], more: str = "") -> str:
    x0, y0, x1, y1 = corners
    return f'<rect class="{kind}" x="{x0:.3f}" y="{y0:.3f}" width="{x1 - x0:.3f}" height="{y1 - y0:.3f}"{more}/>'


def _reduced(image: Image.Image) -> Image.Image:
    scale = min(1.0, MAX_WIDTH / image.width, MAX_HEIGHT / image.height)
    if scale == 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX)


def _data_uri(image: Image.Image) -> str:
    """PNG for small pictures, because it is lossless and short there; JPEG for others."""
    kind = "PNG" if image.width * image.height <= 128 * 128 else "JPEG"
    out = io.BytesIO()
    image.save(out, kind, **({} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
