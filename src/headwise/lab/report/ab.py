"""The report of an A/B of distillation: one HTML file in the style of a comparison's, the verdict first."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headwise.lab import render
from headwise.lab.ab import words
from headwise.lab.ab.markdown import NAMES, parts_of
from headwise.lab.ab.result import CKAS, COSINES, MEASURES, ABResult, Alignment
from headwise.lab.claims import CLAIMS, findings
from headwise.lab.report import ENVIRONMENT_NAMES, plots, svg, template

# Colours of a claim's outcome: those of the verdict that is read in the same way.
BADGES = {"confirmed": "better", "refuted": "worse", "inconclusive": "undecided"}
PANEL = 210  # pixels in height


def report_html(result: ABResult) -> str:
    """The report as text; the same result always gives the same text."""
    figures = {
        "intervals": plots.interval_plot(result),
        "losses": plots.loss_plot(result),
        "gaps": plots.gap_plot(result),
        "cosine": layer_plot(result, COSINES, "cosine"),
        "cka": layer_plot(result, CKAS, "cka"),
        "course": course_plot(result),
    }
    verdicts = [v.diff.verdict for v in result.variants if v.diff is not None]
    return (
        template("ab.html.j2").render(
            r=result,
            baseline=result.variants[0],
            variants=result.variants,
            rivals=result.variants[1:],
            pairs=list(zip(result.variants, result.arms, strict=True)),
            figures={name: None if p is None else Markup(p.wide + p.narrow) for name, p in figures.items()},
            names=ENVIRONMENT_NAMES,
            noun="Arm",
            headline=words.headline(result),
            tally=[(name, verdicts.count(name)) for name in render.MARKS if name in verdicts],
            marks=render.MARKS,
            badges=BADGES,
            phrase=lambda variant: render.phrase(result, variant),
            findings=findings(result),
            claims=CLAIMS,
            parts=parts_of(result),
            measures={name: NAMES[name] for name in MEASURES if any(name in arm.alignment for arm in result.arms)},
            likeness=words.likeness,
            reach=words.reach,
            own=words.own_and_shuffled,
            contrast=words.contrast,
            series=svg.series_name,
            dash=svg.dash_of,
            n_part_colours=0,
        )
        + "\n"
    )


def layer_plot(result: ABResult, measures: Sequence[str], name: str) -> svg.Plot | None:
    """Likeness layer by layer, a panel an arm and measure: with the own teacher, with shuffled ones, and the gap."""
    panels = [
        (i, arm.arm, NAMES[measure], arm.alignment[measure])
        for i, arm in enumerate(result.arms)
        for measure in measures
        if measure in arm.alignment
    ]
    if not panels:
        return None
    figures = [x for *_, a in panels for x in (*a.layers, *a.shuffled_layers) if x is not None]
    low, high = min(0.0, *figures), max(1.0, *figures)

    def draw(width: int) -> Figure:
        side_by_side = 2 if width == svg.WIDE else 1
        rows = -(-len(panels) // side_by_side)
        figure, all_axes = svg.new_figure(width, PANEL * rows, len(panels), side_by_side)
        for axes, (i, arm, title, alignment) in zip(all_axes, panels):
            _layers(axes, i, alignment)
            axes.set_ylim(low - 0.05, high + 0.05)
            axes.set_title(f"{arm}\n{title}", pad=8, fontsize=11)
            axes.set_xlabel("layer")
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        return figure

    spoken = "; ".join(f"{arm}, {title.lower()}: {words.own_and_shuffled(a)}" for _, arm, title, a in panels)
    return svg.both(draw, name, f"Likeness of student and projected teacher by layer, in brackets shuffled. {spoken}.")


def course_plot(result: ABResult) -> svg.Plot | None:
    """The cosine while training goes on, mean over layers, keys and values apart, with its control."""
    panels = [
        (i, arm.arm, NAMES[measure], arm.alignment[measure])
        for i, arm in enumerate(result.arms)
        for measure in COSINES
        if measure in arm.alignment and len(arm.alignment[measure].course.step) > 1
    ]
    if not panels:
        return None

    def draw(width: int) -> Figure:
        side_by_side = 2 if width == svg.WIDE else 1
        rows = -(-len(panels) // side_by_side)
        figure, all_axes = svg.new_figure(width, PANEL * rows, len(panels), side_by_side)
        for axes, (i, arm, title, alignment) in zip(all_axes, panels):
            for series, style in ((alignment.course, "-"), (alignment.shuffled_course, ":")):
                axes.plot(series.step, series.loss, style, color=svg.colour_at(i), lw=1.8)
            axes.grid(axis="y")
            axes.set_title(f"{arm}\n{title}", pad=8, fontsize=11)
            axes.set_xlabel("step")
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        return figure

    spoken = "; ".join(
        f"{arm}, {title.lower()}: from {a.course.loss[0]:.3f} to {a.course.loss[-1]:.3f}" for _, arm, title, a in panels
    )
    return svg.both(draw, "course", f"Cosine with the own and with shuffled teachers against the step. {spoken}.")


def _layers(axes: Axes, index: int, alignment: Alignment) -> None:
    colour = svg.colour_at(index)
    known = [
        (layer, own, other)
        for layer, (own, other) in enumerate(zip(alignment.layers, alignment.shuffled_layers))
        if own is not None and other is not None
    ]
    layers, own, other = (list(each) for each in zip(*known)) if known else ([], [], [])
    axes.fill_between(layers, other, own, color=colour, alpha=0.16, lw=0)
    axes.plot(layers, own, color=colour, lw=1.8, marker="o", ms=5)
    axes.plot(layers, other, ":", color=colour, lw=1.8, marker="o", ms=5, mfc=svg.GROUND)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
