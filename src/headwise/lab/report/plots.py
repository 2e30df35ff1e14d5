"""The report's plots: matplotlib figures as inline SVG that takes its colours and fonts from the page.

Figures are drawn in stand-in colours; afterwards each becomes a CSS variable, so that one drawing serves the light
page, the dark page and paper. Text stays text, in the page's font. One unit is one CSS pixel: every plot is drawn
twice, for wide and for narrow screens, instead of shrinking its text. The same result gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from headwise.lab.render import percent, relative_interval, signed
from headwise.lab.result import CompareResult, Curve, Diff, Ratio, VariantResult

WIDE, NARROW = 940, 340
N_SERIES = 6
DASHES: tuple[tuple[int, ...] | None, ...] = (None, (6, 2), (2, 2), (7, 2, 2, 2), (10, 3), (4, 2, 1, 2, 1, 2))

# Stand-ins, none of which matplotlib writes by itself, and the CSS variables that replace them.
_INK, _MUTED, _GRID, _BAND, _GROUND = "#a00001", "#a00002", "#a00003", "#a00004", "#a00005"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _BAND: "--band", _GROUND: "--ground"}
_VARIABLES |= {f"#b0000{i}": f"--series-{i}" for i in range(N_SERIES + 1)}
_VARIABLES |= {f"#c0000{i}": f"--part-{i}" for i in range(N_SERIES + 2)}

_ERASER = {"fc": _GROUND, "ec": "none", "pad": 1.5}  # keeps a line from crossing a text

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a line may hold a dollar sign
    "font.size": 12.0,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "grid.color": _GRID,
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
    return f"--series-{_colour_of(index)}"


def dash_of(index: int) -> str:
    """A variant's SVG stroke-dasharray, so that no one has to tell it by its colour alone."""
    dash = _dash(index)
    return " ".join(map(str, dash)) if dash else "none"


def interval_plot(result: CompareResult) -> Plot | None:
    """Each variant's difference to the baseline with its 95 % interval, every seed as a dot, the margin as a band."""
    rows = [(i, v, v.diff) for i, v in enumerate(result.variants) if v.diff is not None and v.diff.relative is not None]
    base = result.variants[0].val_loss
    if not rows or not base.mean:
        return None

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        figure, (axes,) = _figure(width, (80 if narrow else 62) * len(rows) + 56, 1)
        _intervals(axes, result, rows, narrow)
        return figure

    spoken = "; ".join(f"{v.label}: {_spoken(result, d)}" for _, v, d in rows)
    text = f"Differences in validation loss to {result.variants[0].label}, in percent, with 95 % intervals. {spoken}."
    return _both(draw, "intervals", text)


def loss_plot(result: CompareResult) -> Plot | None:
    """Training and validation loss against the step: mean over seeds, one standard deviation either side."""
    panels = [
        (title, curves)
        for title, name in (("Validation loss", "val"), ("Training loss", "train"))
        if (curves := [(i, _band(v.curves, name)) for i, v in enumerate(result.variants)])
        and any(len(band[0]) > 1 for _, band in curves)
    ]
    if not panels:
        return None

    def draw(width: int) -> Figure:
        side_by_side = len(panels) if width == WIDE else 1
        figure, all_axes = _figure(width, 300 * (len(panels) // side_by_side), len(panels), side_by_side)
        for axes, (title, curves) in zip(all_axes, panels, strict=True):
            _curves(axes, curves)
            axes.set_title(title + ", nats a token", pad=10)
            axes.set_xlabel("step")
        return figure

    ends = "; ".join(f"{v.label} ends at {v.val_loss.mean:.4f}" for v in result.variants if v.val_loss.mean is not None)
    return _both(
        draw, "losses", f"Loss against training step, mean over seeds with a band of one standard deviation. {ends}."
    )


def gap_plot(result: CompareResult) -> Plot | None:
    """The paired difference of the validation loss to the baseline while training goes on."""
    base = result.variants[0]
    gaps = [(i, _gap(v.curves, base.curves)) for i, v in enumerate(result.variants) if i]
    gaps = [(i, band) for i, band in gaps if len(band[0]) > 2]
    if not gaps:
        return None

    def draw(width: int) -> Figure:
        figure, (axes,) = _figure(width, 260, 1)
        axes.axhline(0, color="#b00000", lw=1.5)
        _curves(axes, gaps)
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
        return figure

    last = "; ".join(f"{result.variants[i].label}: {signed(float(band[1][-1]))}" for i, band in gaps)
    text = f"Validation loss minus that of {base.label} with the same seed, against the step. At the end: {last} nats."
    return _both(draw, "gaps", text)


def speed_plot(result: CompareResult) -> Plot | None:
    """Training speed, decoding speed and memory as ratios to the baseline, with the intervals over rounds."""
    metrics = (("Training speed", "train"), ("Decoding speed", "decode"), ("Peak memory", "memory"))
    rows = list(enumerate(result.variants))[1:]
    panels: list[tuple[str, list[tuple[int, VariantResult, Ratio]]]] = []
    for title, name in metrics:
        present = [(i, v, r) for i, v in rows if (r := getattr(v.ratios, name)) is not None]
        if present:
            panels.append((title, present))
    if not panels:
        return None
    order = [i for i, _ in rows]

    def draw(width: int) -> Figure:
        side_by_side = len(panels) if width == WIDE else 1
        height = 44 * len(rows) + 64
        figure, all_axes = _figure(width, height * (len(panels) // side_by_side), len(panels), side_by_side)
        for k, (axes, (title, present)) in enumerate(zip(all_axes, panels, strict=True)):
            _ratio_bars(axes, present, order, labels=k == 0 or side_by_side == 1)
            axes.set_title(title, pad=10)
        return figure

    spoken = "; ".join(
        f"{title.lower()}: " + ", ".join(f"{v.label} {r.ratio:.2f} times" for _, v, r in present)
        for title, present in panels
    )
    return _both(draw, "speed", f"Ratios to {result.variants[0].label}. {spoken}.")


def parts_of(result: CompareResult) -> list[str]:
    """The parts of the models that hold parameters, in the order in which they first appear."""
    return list(dict.fromkeys(part for v in result.variants for part, n in v.params_by_part.items() if n))


def params_plot(result: CompareResult) -> Plot | None:
    """Parameters by part, one stacked bar a line."""
    parts = parts_of(result)
    if not parts:
        return None

    def draw(width: int) -> Figure:
        figure, (axes,) = _figure(width, 44 * len(result.variants) + 50, 1)
        _stacked(axes, result.variants, parts)
        return figure

    spoken = "; ".join(
        f"{v.label}: " + ", ".join(f"{part} {v.params_by_part[part]:,}" for part in parts if v.params_by_part.get(part))
        for v in result.variants
    )
    return _both(draw, "params", f"Parameters by part. {spoken}.")


# --- drawing ----------------------------------------------------------------------------------------------------------


def _intervals(
    axes: Axes, result: CompareResult, rows: Sequence[tuple[int, VariantResult, Diff]], narrow: bool
) -> None:
    base = result.variants[0].val_loss
    scale = 100 / abs(base.mean or 1.0)
    axes.axvspan(-100 * result.margin, 100 * result.margin, color=_BAND, lw=0)
    axes.axvline(0, color="#b00000", lw=1.5)
    edge = blended_transform_factory(axes.transAxes, axes.transData)
    for y, (i, variant, diff) in enumerate(rows):
        colour = _colour(i)
        seeds = [
            scale * (a - b) for a, b in zip(variant.val_loss.per_seed, base.per_seed) if a is not None and b is not None
        ]
        axes.scatter(seeds, [y + 0.22] * len(seeds), s=26, color=colour, alpha=0.55, lw=0, zorder=2)
        if diff.ci95 is not None:
            axes.plot([scale * x for x in diff.ci95], [y, y], color=colour, lw=4, zorder=3)
        axes.plot(100 * (diff.relative or 0.0), y, "o", ms=10, mfc=_GROUND, mec=colour, mew=3, zorder=4)
        top = y - (0.5 if narrow else 0.33)
        axes.text(0, top, variant.label, transform=edge, family="monospace", va="center", fontsize=11 if narrow else 12)
        note = f"{percent(diff.relative)} · {diff.verdict}"
        x, y_note, align = (0, y - 0.28, "left") if narrow else (1, top, "right")
        axes.text(x, y_note, note, transform=edge, ha=align, va="center", color=_MUTED if narrow else _INK)
    axes.set_ylim(len(rows) - 0.5, -0.75 if narrow else -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -150 * result.margin), max(high, 150 * result.margin))
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x) + " %"))
    axes.set_xlabel("← better", loc="left")
    beside = ("axes fraction", axes.xaxis.label)
    axes.annotate("worse →", (1, 0), xycoords=beside, ha="right", va="bottom", color=_MUTED)


def _curves(axes: Axes, curves: Sequence[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> None:
    """Lines with bands. The first steps, where every loss falls from the same height, may run out of the top."""
    lows, highs = [], []
    for i, (steps, mean, sd) in curves:
        if len(steps) < 2:
            continue
        (line,) = axes.plot(steps, mean, color=_colour(i), lw=1.8, zorder=3 if i else 2)
        if (dash := _dash(i)) is not None:
            line.set_dashes(dash)
        axes.fill_between(steps, mean - sd, mean + sd, color=_colour(i), alpha=0.16, lw=0)
        shown = steps >= steps[0] + 0.08 * (steps[-1] - steps[0])
        lows.append((mean - sd)[shown].min())
        highs.append((mean + sd)[shown].max())
    low, high = min(lows), max(highs)
    room = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    axes.grid(axis="y")
    axes.margins(x=0.01)


def _ratio_bars(
    axes: Axes, rows: Sequence[tuple[int, VariantResult, Ratio]], order: Sequence[int], labels: bool
) -> None:
    ends = []
    for i, variant, ratio in rows:
        y = order.index(i)
        high = ratio.ratio if ratio.hi is None else ratio.hi
        axes.barh(y, ratio.ratio, height=0.36, color=_colour(i), alpha=0.85, lw=0)
        if ratio.lo is not None:
            axes.plot([ratio.lo, high], [y, y], color=_INK, lw=1.6)
        note = f"{ratio.ratio:.2f}×"
        axes.annotate(note, (high, y), (7, 0), textcoords="offset points", va="center", zorder=5, bbox=_ERASER)
        if labels:
            axes.text(0, y - 0.42, variant.label, family="monospace", va="center", fontsize=11, zorder=5, bbox=_ERASER)
        ends.append(high)
    axes.axvline(1, color="#b00000", lw=1.5)
    axes.set_xlim(0, 1.25 * max(1.0, *ends))
    axes.set_ylim(len(order) - 0.5, -0.75)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))


def _stacked(axes: Axes, variants: Sequence[VariantResult], parts: Sequence[str]) -> None:
    for y, variant in enumerate(variants):
        left = 0
        for k, part in enumerate(parts):
            n = variant.params_by_part.get(part, 0)
            axes.barh(y, n, left=left, height=0.42, color=f"#c0000{k % (N_SERIES + 2)}", ec=_GROUND, lw=1)
            left += n
        axes.text(0, y - 0.42, variant.label, family="monospace", va="center", fontsize=11)
    axes.set_ylim(len(variants) - 0.5, -0.75)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _amount(x)))


def _band(curves: Sequence[Curve], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all runs reported, mean and standard deviation over the runs there (0 for a single run)."""
    runs = [dict(zip(s.step, s.loss)) for c in curves if (s := getattr(c, name)).step]
    steps = sorted(set.intersection(*(set(r) for r in runs))) if runs else []
    table = np.array([[r[s] for s in steps] for r in runs]).reshape(len(runs), len(steps))
    if not steps:
        return np.array([]), np.array([]), np.array([])
    sd = table.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return np.array(steps), table.mean(axis=0), sd


def _gap(variant: Sequence[Curve], baseline: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_band`, of the differences to the run of the baseline with the same seed."""
    partners = {c.seed: dict(zip(c.val.step, c.val.loss)) for c in baseline}
    paired = []
    for curve in variant:
        other = partners.get(curve.seed, {})
        both = [(s, x - other[s]) for s, x in zip(curve.val.step, curve.val.loss) if s in other]
        if both:
            series = curve.val.model_copy(update={"step": [s for s, _ in both], "loss": [d for _, d in both]})
            paired.append(curve.model_copy(update={"val": series}))
    return _band(paired, "val")


def _figure(width: int, height: int, n_axes: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
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


def _colour_of(index: int) -> int:
    return 0 if index == 0 else 1 + (index - 1) % N_SERIES


def _colour(index: int) -> str:
    return f"#b0000{_colour_of(index)}"


def _dash(index: int) -> tuple[int, ...] | None:
    return None if index == 0 else DASHES[(index - 1) % len(DASHES)]


def _tick(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _amount(value: float) -> str:
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g} {prefix}"
    return f"{value:g}"


def _spoken(result: CompareResult, diff: Diff) -> str:
    ends = relative_interval(result, diff)
    spread = "" if ends is None else f", from {percent(ends[0])} to {percent(ends[1])}"
    return f"{percent(diff.relative)}{spread}, {diff.verdict}"


# --- SVG --------------------------------------------------------------------------------------------------------------


def _both(draw: Callable[[int], Figure], name: str, text: str) -> Plot:
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
