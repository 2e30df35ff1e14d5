"""The report of a benchmark: one HTML file that needs nothing else, in the style of a comparison's."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from headwise.lab import render
from headwise.lab.bench.result import BenchResult, Point, crossover_words
from headwise.lab.report import ENVIRONMENT_NAMES, svg, template

FigureOf = Callable[[Point], float | None]


def report_html(result: BenchResult) -> str:
    """The report as text; the same result always gives the same text."""
    passes = "forward and backward" if result.settings["backward"] else "forward"
    figures = {
        "ratio": _plot(result, "ratio", _ratio, f"Time, {passes}, × torch’s own", "×"),
        "seconds": _plot(result, "seconds", lambda p: p.median, f"Seconds, {passes}", "s"),
        "peak": _plot(result, "peak", lambda p: _positive(p.peak_bytes), "Peak memory of a step", "B"),
        "kept": _plot(result, "kept", lambda p: _positive(p.kept_bytes), "Bytes kept for the backward pass", "B"),
    }
    return (
        template("bench.html.j2").render(
            r=result,
            passes=passes,
            headline=_headline(result),
            figures={name: None if plot is None else Markup(plot.wide + plot.narrow) for name, plot in figures.items()},
            crossover=crossover_words,
            environment=[(ENVIRONMENT_NAMES.get(n, n), v) for n, v in result.environment if v not in ("", None)],
            skipped=[(row, p) for row in result.rows for p in row.points if p.skipped],
            series=svg.series_name,
            dash=svg.dash_of,
            marks=(),
            n_part_colours=0,
        )
        + "\n"
    )


def _headline(result: BenchResult) -> str:
    rivals = sum(row.source == "headwise" for row in result.rows)
    kinds = "1 kind" if rivals == 1 else f"{rivals} kinds"
    return f"{kinds} of {result.subject} at {result.lengths[0]:,} to {result.lengths[-1]:,} tokens"


def _ratio(point: Point) -> float | None:
    return None if point.ratio is None else point.ratio.ratio


def _positive(value: float | None) -> float | None:
    """A logarithmic axis has no place for nothing."""
    return value if value else None


def _plot(result: BenchResult, name: str, figure_of: FigureOf, title: str, unit: str) -> svg.Plot | None:
    """One figure against length, both logarithmic, a line a row."""
    lines = []
    for i, row in enumerate(result.rows):
        points = [(p.length, y) for p in row.points if (y := figure_of(p)) is not None]
        if points:
            lines.append((i, row.label, points))
    if not lines:
        return None

    def draw(width: int) -> Figure:
        figure, (axes,) = svg.new_figure(width, 420, 1)
        for i, _, points in lines:
            (line,) = axes.plot(*zip(*points), color=svg.colour_at(i), lw=1.8, marker="o", ms=4, zorder=3)
            if (dash := svg.dash_at(i)) is not None:
                line.set_dashes(dash)
        _log_axes(axes, result.lengths, unit, every=1 if width == svg.WIDE else 2)
        if unit == "×":  # where all are about as fast, their differences should not fill the picture
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.5), max(high, 2.0))
        axes.set_title(title, pad=10)
        axes.set_xlabel("tokens")
        return figure

    ends = "; ".join(f"{label} {points[-1][1]:.3g} at {points[-1][0]:,}" for _, label, points in lines)
    return svg.both(draw, name, f"{title}, against the number of tokens. At the longest: {ends}.")


def _log_axes(axes: Axes, lengths: list[int], unit: str, every: int) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(lengths[::-every][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _amount(y, unit)))
    axes.grid(axis="y")


def _amount(value: float, unit: str) -> str:
    if unit == "×":
        return f"{value:g}×"
    if unit == "s":
        return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
    return render.quantity(value, unit)
