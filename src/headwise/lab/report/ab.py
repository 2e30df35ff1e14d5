"""The report of an A/B of distillation: one HTML file in the style of a comparison's, the verdict first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    """Likeness layer by layer, a panel an arm: with the own teacher, with shuffled ones, and the gap between."""
    panels = _panels(result, measures)
    if not panels:
        return None
    alignments = [alignment for *_, each in panels for alignment in each.values()]
    figures = [x for a in alignments for x in (*a.layers, *a.shuffled_layers) if x is not None]
    limits = (min(0.0, *figures) - 0.05, max(1.0, *figures) + 0.05)

    def fill(axes: Axes, index: int, measured: dict[str, Alignment]) -> None:
        for measure, alignment in measured.items():
            own, other = (_known(layers) for layers in (alignment.layers, alignment.shuffled_layers))
            _lines(axes, index, measure, own, other)
            axes.fill_between(own[0], other[1], own[1], color=svg.colour_at(index), alpha=0.12, lw=0)
        axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")

    text = f"Likeness of student and teacher by layer, in brackets with shuffled teachers. {_spoken(panels)}."
    return _drawn(panels, name, text, fill)


def course_plot(result: ABResult) -> svg.Plot | None:
    """The cosine while training goes on, mean over layers, with its control, a panel an arm."""
    panels = [
        (i, arm, long)
        for i, arm, measured in _panels(result, COSINES)
        if (long := {name: a for name, a in measured.items() if len(a.course.step) > 1})
    ]
    if not panels:
        return None

    ends = [x for *_, each in panels for a in each.values() for x in (*a.course.loss, *a.shuffled_course.loss)]
    limits = (min(0.0, *ends) - 0.05, max(1.0, *ends) + 0.05)

    def fill(axes: Axes, index: int, measured: dict[str, Alignment]) -> None:
        for measure, a in measured.items():
            own, other = ((series.step, series.loss) for series in (a.course, a.shuffled_course))
            _lines(axes, index, measure, own, other)
        axes.set_ylim(*limits)
        axes.set_xlabel("step")

    text = f"Cosine with the own and with shuffled teachers against the step. At the end: {_spoken(panels)}."
    return _drawn(panels, "course", text, fill)


# --- drawing ----------------------------------------------------------------------------------------------------------

Panel = tuple[int, str, dict[str, Alignment]]
Line = tuple[Sequence[int], Sequence[float]]
# Keys, values and outputs are told apart by marks: one line a measure and arm, in the arm's colour.
MARKS = {"k": "o", "v": "s", "output": "D"}


def _panels(result: ABResult, measures: Sequence[str]) -> list[Panel]:
    """Place, name and what was measured, of every arm of which something was."""
    found = [
        (i, arm.arm, {name: arm.alignment[name] for name in measures if name in arm.alignment})
        for i, arm in enumerate(result.arms)
    ]
    return [panel for panel in found if panel[2]]


def _drawn(
    panels: Sequence[Panel], name: str, text: str, fill: Callable[[Axes, int, dict[str, Alignment]], None]
) -> svg.Plot:
    def draw(width: int) -> Figure:
        side_by_side = min(2, len(panels)) if width == svg.WIDE else 1
        figure, all_axes = svg.new_figure(width, PANEL * -(-len(panels) // side_by_side), len(panels), side_by_side)
        for axes, (i, arm, measured) in zip(all_axes, panels):
            fill(axes, i, measured)
            axes.grid(axis="y")
            axes.set_title(arm, pad=8, family="monospace", fontsize=11)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        return figure

    return svg.both(draw, name, text)


def _lines(axes: Axes, index: int, measure: str, own: Line, other: Line) -> None:
    """With the own teacher, solid and filled; with shuffled ones, dotted and hollow."""
    colour, mark = svg.colour_at(index), MARKS[measure.partition("_")[2]]
    axes.plot(*own, "-", color=colour, lw=1.6, marker=mark, ms=5)
    axes.plot(*other, ":", color=colour, lw=1.6, marker=mark, ms=5, mfc=svg.GROUND)


def _known(layers: Sequence[float | None]) -> Line:
    """The layers that have a figure, and those."""
    known = [(layer, value) for layer, value in enumerate(layers) if value is not None]
    return [layer for layer, _ in known], [value for _, value in known]


def _spoken(panels: Sequence[Panel]) -> str:
    return "; ".join(
        f"{arm}: " + ", ".join(f"{NAMES[name].lower()} {words.own_and_shuffled(a)}" for name, a in measured.items())
        for _, arm, measured in panels
    )
