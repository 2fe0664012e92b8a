"""Matplotlib figures as inline SVG of a page, in the page's font and colours."""

import io
import itertools
import re
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

INK, GREY, FAINT, GRID, WARN = "#1f2328", "#59636e", "#d1d9e0", "#eef0f2", "#9a3412"
# Okabe and Ito's colours, which readers with any colour vision can distinguish. The order gives two runs most contrast.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# These colours follow the page from light to dark. All others stay, so a text on a cell of a fixed colour should use
# ON_LIGHT or ON_DARK.
VARIABLES = {
    INK: "ink",
    GREY: "grey",
    FAINT: "faint",
    GRID: "grid",
    WARN: "warn",
    "#ffffff": "paper",
    **{colour.lower(): f"c{i}" for i, colour in enumerate(COLOURS)},
}
ON_LIGHT, ON_DARK = "#111111", "#fefefe"
_numbers = itertools.count(1)


def style() -> Any:
    """Settings for ``matplotlib.rc_context`` while the figure is drawn.

    A figure up to 5 inches wide is readable on a phone. A wider one scrolls sideways there.
    """
    return {
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",  # comes with matplotlib, so sizes are the same everywhere
        "font.size": 9,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.edgecolor": FAINT,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.labelcolor": GREY,
        "axes.labelsize": 8.5,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": False,
        "grid.color": GRID,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": GREY,
        "ytick.labelcolor": GREY,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "text.color": INK,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar sign of a name or a response stays one
    }


def inline(figure: Figure, label: str) -> str:
    """The figure as HTML: an SVG with text as text, transparent, with ids of its own.

    Args:
        figure: drawn under ``style()``. A text with a path effect would become an outline.
        label: one sentence for a screen reader.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style .*?</style>|\s*<!--.*?-->", "", svg, flags=re.S)
    own = f"f{next(_numbers)}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda found: _colour(found[0]), svg)
    svg = re.sub(r"(font-family|font): ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1: \2var(--font)", svg)
    width, height = (float(size) * 4 / 3 for size in re.findall(r'(?:width|height)="([\d.]+)pt"', svg[:400]))
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view
    opening = (
        f'<svg class="figure" xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" '
        f'aria-label="{escape(label)}" style="max-width:{width:.0f}px;min-width:{min(width, 0.7 * width):.0f}px;'
        f'aspect-ratio:{width:.0f}/{height:.0f}">'
    )
    return f'<div class="scroll">{opening}{svg[svg.index(">") + 1 :].strip()}</div>'


def _colour(found: str) -> str:
    name = VARIABLES.get(found)
    return f"var(--{name})" if name else found
