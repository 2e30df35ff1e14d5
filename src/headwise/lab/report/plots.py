"""The plots of a comparison's report."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from headwise.lab.render import percent, relative_interval, signed
from headwise.lab.report.svg import (
    BAND,
    ERASER,
    GROUND,
    INK,
    MUTED,
    N_SERIES,
    NARROW,
    WIDE,
    Plot,
    both,
    colour_at,
    dash_at,
    new_figure,
)
from headwise.lab.result import CompareResult, Curve, Diff, Ratio, Series, VariantResult


def interval_plot(result: CompareResult) -> Plot | None:
    """Each variant's difference to the baseline with its 95 % interval, every seed as a dot, the margin as a band."""
    rows = [(i, v, v.diff) for i, v in enumerate(result.variants) if v.diff is not None and v.diff.relative is not None]
    base = result.variants[0].val_loss
    if not rows or not base.mean:
        return None

    def draw(width: int) -> Figure:
        narrow = width == NARROW
        figure, (axes,) = new_figure(width, (80 if narrow else 62) * len(rows) + 56, 1)
        _intervals(axes, result, rows, narrow)
        return figure

    spoken = "; ".join(f"{v.label}: {_spoken(result, d)}" for _, v, d in rows)
    text = f"Differences in validation loss to {result.variants[0].label}, in percent, with 95 % intervals. {spoken}."
    return both(draw, "intervals", text)


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
        figure, all_axes = new_figure(width, 300 * (len(panels) // side_by_side), len(panels), side_by_side)
        for axes, (title, curves) in zip(all_axes, panels, strict=True):
            _curves(axes, curves)
            axes.set_title(title + ", nats a token", pad=10)
            axes.set_xlabel("step")
        return figure

    ends = "; ".join(f"{v.label} ends at {v.val_loss.mean:.4f}" for v in result.variants if v.val_loss.mean is not None)
    return both(
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
        figure, (axes,) = new_figure(width, 260, 1)
        axes.axhline(0, color="#b00000", lw=1.5)
        _curves(axes, gaps)
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
        return figure

    last = "; ".join(f"{result.variants[i].label}: {signed(float(band[1][-1]))}" for i, band in gaps)
    text = f"Validation loss minus that of {base.label} with the same seed, against the step. At the end: {last} nats."
    return both(draw, "gaps", text)


def eps_plot(result: CompareResult) -> Plot | None:
    """The reconstruction error ε of each layer's vein against the step, a panel a line that has veins."""
    panels = []
    for i, variant in enumerate(result.variants):
        names = dict.fromkeys(name for curve in variant.curves for name in curve.eps)
        bands = [(name, _spread([c.eps[name] for c in variant.curves if name in c.eps])) for name in names]
        bands = [(name, band) for name, band in bands if len(band[0]) > 1]
        if bands:
            panels.append((i, variant.label, bands))
    if not panels:
        return None
    means = [mean for *_, bands in panels for _, (_, mean, _) in bands]
    low, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    room = 0.06 * (high - low or 1.0)

    def draw(width: int) -> Figure:
        side_by_side = min(2, len(panels)) if width == WIDE else 1
        rows = -(-len(panels) // side_by_side)
        figure, all_axes = new_figure(width, 260 * rows, len(panels), side_by_side)
        for axes, (i, label, bands) in zip(all_axes, panels):
            axes.set_ylim(low - room, high + room)  # of all, so that panels can be compared
            _veins(axes, i, bands)
            axes.set_title(label, pad=10, family="monospace", fontsize=11)
            axes.set_xlabel("step")
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        return figure

    spoken = "; ".join(
        f"{label}: " + ", ".join(f"{_layer(name)} ends at {band[1][-1]:.3f}" for name, band in bands)
        for _, label, bands in panels
    )
    return both(draw, "eps", f"Reconstruction error of each layer's vein against the training step. {spoken}.")


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
        figure, all_axes = new_figure(width, height * (len(panels) // side_by_side), len(panels), side_by_side)
        for k, (axes, (title, present)) in enumerate(zip(all_axes, panels, strict=True)):
            _ratio_bars(axes, present, order, labels=k == 0 or side_by_side == 1)
            axes.set_title(title, pad=10)
        return figure

    spoken = "; ".join(
        f"{title.lower()}: " + ", ".join(f"{v.label} {r.ratio:.2f} times" for _, v, r in present)
        for title, present in panels
    )
    return both(draw, "speed", f"Ratios to {result.variants[0].label}. {spoken}.")


def parts_of(result: CompareResult) -> list[str]:
    """The parts of the models that hold parameters, in the order in which they first appear."""
    return list(dict.fromkeys(part for v in result.variants for part, n in v.params_by_part.items() if n))


def params_plot(result: CompareResult) -> Plot | None:
    """Parameters by part, one stacked bar a line."""
    parts = parts_of(result)
    if not parts:
        return None

    def draw(width: int) -> Figure:
        figure, (axes,) = new_figure(width, 44 * len(result.variants) + 50, 1)
        _stacked(axes, result.variants, parts)
        return figure

    spoken = "; ".join(
        f"{v.label}: " + ", ".join(f"{part} {v.params_by_part[part]:,}" for part in parts if v.params_by_part.get(part))
        for v in result.variants
    )
    return both(draw, "params", f"Parameters by part. {spoken}.")


# --- drawing ----------------------------------------------------------------------------------------------------------


def _intervals(
    axes: Axes, result: CompareResult, rows: Sequence[tuple[int, VariantResult, Diff]], narrow: bool
) -> None:
    base = result.variants[0].val_loss
    scale = 100 / abs(base.mean or 1.0)
    axes.axvspan(-100 * result.margin, 100 * result.margin, color=BAND, lw=0)
    axes.axvline(0, color="#b00000", lw=1.5)
    edge = blended_transform_factory(axes.transAxes, axes.transData)
    for y, (i, variant, diff) in enumerate(rows):
        colour = colour_at(i)
        seeds = [
            scale * (a - b) for a, b in zip(variant.val_loss.per_seed, base.per_seed) if a is not None and b is not None
        ]
        axes.scatter(seeds, [y + 0.22] * len(seeds), s=26, color=colour, alpha=0.55, lw=0, zorder=2)
        if diff.ci95 is not None:
            axes.plot([scale * x for x in diff.ci95], [y, y], color=colour, lw=4, zorder=3)
        axes.plot(100 * (diff.relative or 0.0), y, "o", ms=10, mfc=GROUND, mec=colour, mew=3, zorder=4)
        top = y - (0.5 if narrow else 0.33)
        axes.text(0, top, variant.label, transform=edge, family="monospace", va="center", fontsize=11 if narrow else 12)
        note = f"{percent(diff.relative)} · {diff.verdict}"
        x, y_note, align = (0, y - 0.28, "left") if narrow else (1, top, "right")
        axes.text(x, y_note, note, transform=edge, ha=align, va="center", color=MUTED if narrow else INK)
    axes.set_ylim(len(rows) - 0.5, -0.75 if narrow else -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -150 * result.margin), max(high, 150 * result.margin))
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x) + " %"))
    axes.set_xlabel("← better", loc="left")
    beside = ("axes fraction", axes.xaxis.label)
    axes.annotate("worse →", (1, 0), xycoords=beside, ha="right", va="bottom", color=MUTED)


def _curves(axes: Axes, curves: Sequence[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> None:
    """Lines with bands. The first steps, where every loss falls from the same height, may run out of the top."""
    lows, highs = [], []
    for i, (steps, mean, sd) in curves:
        if len(steps) < 2:
            continue
        (line,) = axes.plot(steps, mean, color=colour_at(i), lw=1.8, zorder=3 if i else 2)
        if (dash := dash_at(i)) is not None:
            line.set_dashes(dash)
        axes.fill_between(steps, mean - sd, mean + sd, color=colour_at(i), alpha=0.16, lw=0)
        shown = steps >= steps[0] + 0.08 * (steps[-1] - steps[0])
        lows.append((mean - sd)[shown].min())
        highs.append((mean + sd)[shown].max())
    low, high = min(lows), max(highs)
    room = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    axes.grid(axis="y")
    axes.margins(x=0.01)


def _veins(axes: Axes, variant: int, bands: Sequence[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> None:
    """One line a layer in the variant's colour, stronger with depth; the first and the last are named at their ends."""
    for depth, (_, (steps, mean, _)) in enumerate(bands):
        strength = 1.0 if len(bands) == 1 else 0.5 + 0.5 * depth / (len(bands) - 1)
        axes.plot(steps, mean, color=colour_at(variant), alpha=strength, lw=1.8)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    named = bands if len(bands) == 1 else [bands[0], bands[-1]]
    ends = sorted((float(mean[-1]), steps[-1], _layer(name)) for name, (steps, mean, _) in named)
    # Two names stand a line of text apart where their curves end closer; the panel is about 185 pixels high.
    low, high = axes.get_ylim()
    apart = max(0.0, 14 - 185 * (ends[-1][0] - ends[0][0]) / (high - low)) / 2 if len(ends) > 1 else 0.0
    for (end, step, name), shift in zip(ends, (-apart, apart)):
        axes.annotate(name, (step, end), (5, shift), textcoords="offset points", va="center")


def _layer(name: str) -> str:
    """How a reader knows a module: `layer 3` for stack.blocks.3.ffn."""
    found = re.search(r"blocks\.(\d+)", name)
    return f"layer {found[1]}" if found else name


def _ratio_bars(
    axes: Axes, rows: Sequence[tuple[int, VariantResult, Ratio]], order: Sequence[int], labels: bool
) -> None:
    ends = []
    for i, variant, ratio in rows:
        y = order.index(i)
        high = ratio.ratio if ratio.hi is None else ratio.hi
        axes.barh(y, ratio.ratio, height=0.36, color=colour_at(i), alpha=0.85, lw=0)
        if ratio.lo is not None:
            axes.plot([ratio.lo, high], [y, y], color=INK, lw=1.6)
        note = f"{ratio.ratio:.2f}×"
        axes.annotate(note, (high, y), (7, 0), textcoords="offset points", va="center", zorder=5, bbox=ERASER)
        if labels:
            axes.text(0, y - 0.42, variant.label, family="monospace", va="center", fontsize=11, zorder=5, bbox=ERASER)
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
            axes.barh(y, n, left=left, height=0.42, color=f"#c0000{k % (N_SERIES + 2)}", ec=GROUND, lw=1)
            left += n
        axes.text(0, y - 0.42, variant.label, family="monospace", va="center", fontsize=11)
    axes.set_ylim(len(variants) - 0.5, -0.75)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _amount(x)))


def _band(curves: Sequence[Curve], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all runs reported, mean and standard deviation over the runs there (0 for a single run)."""
    return _spread([getattr(curve, name) for curve in curves])


def _spread(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_band`, of the series themselves."""
    runs = [dict(zip(s.step, s.loss)) for s in series if s.step]
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
