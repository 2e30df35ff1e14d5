"""Drawings for reports: matplotlib figures as inline SVG that takes its colours and fonts from the page.

Figures are drawn in stand-in colours; afterwards each becomes a CSS variable, so that one drawing serves the light
page, the dark page and paper. Text stays text, in the page's font. One unit is one CSS pixel: every plot is drawn
twice, for wide and for narrow screens, instead of shrinking its text. The same result gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDE, NARROW = 940, 340
N_SERIES = 6
DASHES: tuple[tuple[int, ...] | None, ...] = (None, (6, 2), (2, 2), (7, 2, 2, 2), (10, 3), (4, 2, 1, 2, 1, 2))

# Stand-ins, none of which matplotlib writes by itself, and the CSS variables that replace them.
INK, MUTED, GRID, BAND, GROUND = "#a00001", "#a00002", "#a00003", "#a00004", "#a00005"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BAND: "--band", GROUND: "--ground"}
_VARIABLES |= {f"#b0000{i}": f"--series-{i}" for i in range(N_SERIES + 1)}
_VARIABLES |= {f"#c0000{i}": f"--part-{i}" for i in range(N_SERIES + 2)}

ERASER = {"fc": GROUND, "ec": "none", "pad": 1.5}  # keeps a line from crossing a text

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a line may hold a dollar sign
    "font.size": 12.0,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Plot:
    """One plot in both widths; `text` says in words what it shows."""

    wide: str
    narrow: str
    text: str


def series_name(index: int) -> str:
    """The CSS variable of a variant's colour: 0 is the baseline, the others take turns."""
    return f"--series-{colour_of(index)}"


def dash_of(index: int) -> str:
    """A variant's SVG stroke-dasharray, so that no one has to tell it by its colour alone."""
    dash = dash_at(index)
    return " ".join(map(str, dash)) if dash else "none"


def new_figure(width: int, height: int, n_axes: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.06, wspace=0.05, hspace=0.06)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=layout)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    grid = figure.subplots(-(-n_axes // columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.patch.set_alpha(0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=5)
        axes.set_axisbelow(True)
    return figure, list(grid.flat)


def colour_of(index: int) -> int:
    return 0 if index == 0 else 1 + (index - 1) % N_SERIES


def colour_at(index: int) -> str:
    return f"#b0000{colour_of(index)}"


def dash_at(index: int) -> tuple[int, ...] | None:
    # Every round of the colours starts at another dash, so that 36 lines differ.
    return None if index == 0 else DASHES[(index - 1 + (index - 1) // N_SERIES) % len(DASHES)]


def both(draw: Callable[[int], Figure], name: str, text: str) -> Plot:
    """Draw for both widths."""
    pictures = []
    for width, suffix in ((WIDE, "wide"), (NARROW, "narrow")):
        settings: Any = {**_RC, "svg.hashsalt": f"{name}-{suffix}"}
        with mpl.rc_context(settings), warnings.catch_warnings():
            # A line may hold characters that matplotlib's own font lacks; the page's fonts draw them.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            stream = io.StringIO()
            draw(width).savefig(stream, format="svg")
        pictures.append(_inline(stream.getvalue(), f"{name}-{suffix}", suffix, text))
    return Plot(pictures[0], pictures[1], text)


def _inline(svg: str, name: str, css_class: str, text: str) -> str:
    """A figure's file as an element of a page: page colours, ids of its own, no style sheet, a spoken text."""
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    href = f"{{{_XLINK}}}href"
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        if href in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(href)[1:]}")
        for key in ("style", "clip-path", "fill", "stroke"):
            value = element.get(key)
            if value is not None:
                value = re.sub(r"#[abc]0000\d", lambda m: f"var({_VARIABLES[m[0]]})", value)
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    used = set(re.findall(r"url\(#([^)]+)\)", ET.tostring(root, encoding="unicode")))
    used |= {element.get("href", "")[1:] for element in root.iter()}
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
    root.set("class", f"plot {css_class}")
    root.set("role", "img")
    root.set("aria-label", text)
    root.set("style", "stroke-linejoin:round")
    root.set("width", root.get("width", "").removesuffix("pt"))
    root.set("height", root.get("height", "").removesuffix("pt"))
    for element in root.iter():  # the HTML parser knows <svg> without a namespace
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    return ET.tostring(root, encoding="unicode")
