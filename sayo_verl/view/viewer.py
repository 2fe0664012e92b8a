"""The viewer of a page: images with heat maps beside the responses, word by word.

Python writes the images with their grids and boxes, and the data; ``static/*.js`` does the rest in the browser. Maps
stay packed in the page until they are shown.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image

from sayo_verl.view.maps import LEVELS, SPAN
from sayo_verl.view.page import text
from sayo_verl.view.seen import TOKEN_VALUES, HeadTable, MapSet, SeenImage, SeenPrompt, SeenResponse
from sayo_verl.vision.grids import token_levels

BUDGET = 7_000_000
LONGEST = (1600, 1200, 900, 640, 400)  # pixels of a picture's longer side on the page: the first that fits
SMALL = 128 * 128  # pixels up to which a picture is stored without loss
JPEG_QUALITY = 85


def mount(
    name: str,
    prompt: SeenPrompt,
    states: Mapping[str, Sequence[SeenResponse]],
    *,
    budget: int = BUDGET,
    more_maps: str = "--maps",
) -> tuple[str, dict[str, Any]]:
    """HTML of one viewer, and its data for ``page(..., data=..., viewer=True)``.

    Args:
        name: of this viewer, unique on the page; letters, digits, ``-`` and ``_``.
        prompt: its images are stored once.
        states: label of a state (``""``, ``step 25``) -> its responses. Several states get a slider, several responses
            are shown beside each other.
        budget: bytes of the pictures and maps on the page. Pictures become smaller until they take
            half of it, maps coarser until they fit. If the coarsest do not fit, word maps are left out from the last
            state on; maps of whole responses stay. The page says so.
        more_maps: the option that stores further word maps, as users type it.
    """
    assert re.fullmatch(r"[A-Za-z][\w-]*", name)
    pictures, reduced = _pictures(prompt.images, budget // 2)
    fitted, notes = _fit(states, budget, sum(map(len, pictures)))
    notes = [*reduced, *notes]
    grids, figures, start = [], "", 0
    for i, (image, picture) in enumerate(zip(prompt.images, pictures, strict=True)):
        of_image = grids_of(image, start)
        grids += [{"image": i, **grid} for grid in of_image]
        figures += "".join(
            _figure(image, picture if k == 0 else "", grid, _caption(i, len(pictures), grid))
            for k, grid in enumerate(of_image)
        )
        start += image.tokens
    data = {
        "question": prompt.question,
        "tokens": prompt.tokens,
        "grids": grids,
        "boxes": sum(len(image.boxes) for image in prompt.images),
        "region": None if prompt.region is None else _bits(prompt.region),
        "region_tokens": prompt.region_tokens,
        "border": _bits(prompt.border) if prompt.has_inside else None,
        "values": {key: asdict(value) for key, value in TOKEN_VALUES.items()},
        "more_maps": more_maps,
        "states": [
            {"label": label, "responses": [_response(*both) for both in zip(responses, states[label], strict=True)]}
            for label, responses in fitted.items()
        ],
    }
    answer = f'<p class="answer"><b>Right answer:</b> {text(prompt.answer)}</p>' if prompt.answer else ""
    noted = "".join(f'<p class="note">{text(note)}</p>' for note in notes)
    written = "".join(
        f"<h3>{text(label)}</h3>" * bool(label) + "".join(f"<pre>{text(r.text)}</pre>" for r in responses)
        for label, responses in states.items()
    )
    html = (
        f'<section class="viewer" id="{name}" data-island="{name}-data" aria-label="Where the model looked: '
        f'{text(prompt.where)}">\n<header><p class="where">{text(prompt.where)}</p>'
        f'<p class="question">{text(prompt.question)}</p>{answer}</header>\n'
        f'<div class="sides"><div class="left"><div class="top"><div class="pictures">{figures}</div></div></div>\n'
        '<div class="right"></div></div>\n'
        f'<div class="below">{noted}</div>\n<noscript><p class="warn">Heat maps need JavaScript.</p>{written}'
        "</noscript></section>\n"
    )
    return html, {f"{name}-data": data}


def _pictures(images: Sequence[SeenImage], budget: int) -> tuple[list[str], list[str]]:
    """``data:`` URIs of pictures, in at most ``budget`` bytes if small ones fit, and a sentence if one was reduced."""
    for longest in LONGEST:
        pictures = [_encoded(image.picture, longest) for image in images]
        if sum(map(len, pictures)) <= budget:
            break
    large = [f"{i.picture.width} x {i.picture.height}" for i in images if max(i.picture.size) > longest]
    note = f"Pictures are shown with at most {longest:,} pixels on the longer side, to keep the page small; "
    return pictures, [f"{note}{'those of the data have' if len(large) > 1 else 'that of the data has'} "
                      f"{', '.join(large)}. The maps are not affected."] if large else []  # fmt: skip


def _encoded(picture: Image.Image, longest: int) -> str:
    """A ``data:`` URI of a picture."""
    shown, out = picture.convert("RGB"), io.BytesIO()
    shown.thumbnail((longest, longest))
    kind = "png" if shown.width * shown.height <= SMALL else "jpeg"
    shown.save(out, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def grids_of(image: SeenImage, start: int) -> list[dict[str, Any]]:
    """Each resolution of an image as one grid: rows, columns, and where the tokens of each tile are.

    ``tiles``: first token, rows, columns, first row, first column.
    """
    level_V = token_levels(image.tiles, where="an image of the page")
    starts = np.cumsum([0, *(tile.tokens for tile in image.tiles)])
    grids = []
    for level in range(int(level_V.max(initial=-1)) + 1):
        here = [(tile, int(at)) for tile, at in zip(image.tiles, starts, strict=False) if level_V[at] == level]
        first = here[0][0]
        rows, cols = round(first.rows / (first.y1 - first.y0)), round(first.cols / (first.x1 - first.x0))
        places = [[start + at, t.rows, t.cols, round(t.y0 * rows), round(t.x0 * cols)] for t, at in here]
        grids.append({"rows": rows, "cols": cols, "tiles": places, "thumbnail": level > 0})
    return grids


def _caption(image: int, images: int, grid: Mapping[str, Any]) -> str:
    """Names a drawing: image, resolution, grid."""
    parts = [f"image {image + 1}"] if images > 1 else []
    parts += ["thumbnail"] if grid["thumbnail"] else [f"{len(grid['tiles'])} tiles"] if len(grid["tiles"]) > 1 else []
    return ", ".join([*parts, f"{grid['rows']} x {grid['cols']} visual tokens"])


def _figure(image: SeenImage, picture: str, grid: Mapping[str, Any], caption: str) -> str:
    """A picture with room for its map, its grid and its boxes. Without ``picture`` the script copies the one before."""
    rows, cols, (width, height) = grid["rows"], grid["cols"], image.picture.size
    lines = "".join(f"M0 {r / rows:.5f}h1" for r in range(1, rows))
    lines += "".join(f"M{c / cols:.5f} 0v1" for c in range(1, cols))
    seams = "".join(
        f"M{c / cols:.5f} {r / rows:.5f}h{across / cols:.5f}v{down / rows:.5f}h{-across / cols:.5f}z"
        for _, down, across, r, c in grid["tiles"]
    )
    boxes = names = ""
    for i, (x0, y0, x1, y1) in enumerate(image.boxes):
        outline = f"M{x0:.5f} {y0:.5f}H{x1:.5f}V{y1:.5f}H{x0:.5f}z"
        boxes += f'<path class="halo" d="{outline}"/><path class="box" d="{outline}"/>'
        name = " ".join([str(i + 1), *([] if grid["thumbnail"] else image.names[i : i + 1])])
        place = f"left:{x0:.2%};top:{y0:.2%};max-width:{1 - x0:.2%}"
        inside = " inside" if y0 < 0.07 or grid["thumbnail"] else ""
        names += f'<span class="boxname{inside}" style="{place}">{text(name)}</span>'
    seen = f'<path class="seam" d="{seams}"/>' if len(grid["tiles"]) > 1 else ""
    source = f'src="{picture}" ' if picture else ""
    return (
        f'<figure class="picture{" thumbnail" if grid["thumbnail"] else ""}"><div class="stack" '
        f'style="aspect-ratio:{width}/{height};--ratio:{width / height:.4f}">'
        f'<img {source}alt="picture, {text(caption)}" width="{width}" height="{height}">'
        f'<canvas width="{cols}" height="{rows}"></canvas><svg viewBox="0 0 1 1" preserveAspectRatio="none" '
        f'aria-hidden="true"><g class="grid"><path class="line" d="{lines}"/>{seen}</g><g class="boxes">{boxes}</g>'
        f'</svg><div class="boxes" aria-hidden="true">{names}</div></div>'
        f'<figcaption>{text(caption)}<span class="share"></span></figcaption></figure>'
    )


def _bits(mask_V: np.ndarray) -> str:
    """A mask as text of 0 and 1."""
    return "".join(map(str, mask_V.astype(int)))


def _response(response: SeenResponse, given: SeenResponse) -> dict[str, Any]:
    """A response that fits in the page; ``given`` is the response before that."""
    return {
        "pieces": response.pieces,
        "words": response.words,
        "values": {name: _numbers(values_T) for name, values_T in response.values.items()},
        "maps": [
            {
                "name": m.name,
                "label": m.label,
                "total": m.total.to_json(),
                "words": m.words.to_json() if m.words else None,
                "steady": None if m.steady is None else _bits(m.steady),
                "left_out": before.words is not None and m.words is None,
            }
            for m, before in zip(response.maps, given.maps, strict=True)
        ],
        "measured": _measured(response),
        "facts": {name: fact if isinstance(fact, str) else _number(fact) for name, fact in response.facts.items()},
        "notes": response.notes,
        "heads": response.heads and _heads(response.heads),
    }


def _measured(response: SeenResponse) -> str | None:
    """Name of the map that the numbers per token belong to: the mean, or the only map of a recorded response."""
    names = [m.name for m in response.maps]
    return "mean" if "mean" in names else names[0] if len(names) == 1 else None


def _heads(heads: HeadTable) -> dict[str, Any]:
    return {
        "layers": heads.layers,
        "values": {name: [_numbers(values_H) for values_H in values_LH] for name, values_LH in heads.values.items()},
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in np.asarray(values).tolist()]


def _number(value: float) -> float | None:
    """A number of JSON, shortened; None for NaN and infinity."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _fit(
    states: Mapping[str, Sequence[SeenResponse]], budget: int, pictures: int
) -> tuple[dict[str, list[SeenResponse]], list[str]]:
    """Responses whose maps fit in ``budget`` bytes beside the pictures, and sentences about what that cost.

    Maps of whole responses always stay. Word maps leave from the end: last state, its last set of maps, last response.
    """
    fitted = {label: list(responses) for label, responses in states.items()}
    for levels in LEVELS:
        for responses in fitted.values():
            responses[:] = [replace(r, maps=tuple(_coarser(m, levels) for m in r.maps)) for r in responses]
        if _bytes(fitted) + pictures <= budget:
            break
    left_out: dict[str, None] = {}
    over = _bytes(fitted) + pictures - budget
    for label, responses in reversed(fitted.items()):
        for k in reversed(range(max((len(r.maps) for r in responses), default=0))):
            for i, response in reversed(list(enumerate(responses))):
                words = response.maps[k].words if k < len(response.maps) else None
                if over > 0 and words:
                    over -= _base64(len(words.data))
                    maps = [replace(m, words=None) if j == k else m for j, m in enumerate(response.maps)]
                    responses[i] = replace(response, maps=tuple(maps))
                    left_out[f"{label}, {response.maps[k].label}" if label else response.maps[k].label] = None
    notes = []
    if any(r.maps for responses in fitted.values() for r in responses):
        step = SPAN ** (0.5 / (levels - 1)) - 1
        notes.append(
            f"Maps are stored with {levels} levels on a logarithmic scale. A value is within {100 * step:.2g} % of the "
            f"measured one; values below 1/{SPAN:,.0f} of the largest one are zero."
        )
    names = list(reversed(left_out))
    if names:
        notes.append(
            f"Maps of single words are left out, because pictures and maps would exceed {budget / 1e6:.1f} MB here: "
            f"{'; '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}. Maps of whole responses "
            "are complete."
        )
    return fitted, notes


def _coarser(maps: MapSet, levels: int) -> MapSet:
    return replace(
        maps, total=maps.total.coarser(max(levels, LEVELS[1])), words=maps.words and maps.words.coarser(levels)
    )


def _bytes(states: Mapping[str, Sequence[SeenResponse]]) -> int:
    packed = [p for rs in states.values() for r in rs for m in r.maps for p in (m.total, m.words) if p]
    return sum(_base64(len(p.data)) for p in packed)


def _base64(size: int) -> int:
    return -(-size // 3) * 4
