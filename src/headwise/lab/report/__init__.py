"""The report of a comparison: one HTML file that needs nothing else, on a screen, a phone or paper, light or dark.

It holds no script and its content security policy forbids it to load anything; all text of the result is escaped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from headwise.lab import render
from headwise.lab.report import plots, svg
from headwise.lab.result import CompareResult

FILE_NAME = "report.html"
ENVIRONMENT_NAMES = {
    "python": "Python",
    "torch": "PyTorch",
    "headwise": "Headwise",
    "cpu": "CPU",
    "cores": "Cores",
    "os": "System",
}


def build_report(result: CompareResult, out: str | Path) -> Path:
    """Write the report to `out` (a folder, which gets `report.html`, or a file ending in .html); returns its path.

    Written whole or not at all. Raises headwise.io.atomic.WriteError where it cannot be written.
    """
    from headwise.io.atomic import write_text

    path = Path(out)
    if path.suffix != ".html":
        path = path / FILE_NAME
    write_text(path, report_html(result))
    return path


def report_html(result: CompareResult) -> str:
    """The report as text; the same result always gives the same text."""
    figures = {
        "intervals": plots.interval_plot(result),
        "losses": plots.loss_plot(result),
        "gaps": plots.gap_plot(result),
        "eps": plots.eps_plot(result),
        "speed": plots.speed_plot(result),
        "params": plots.params_plot(result),
    }
    return (
        template("report.html.j2").render(
            r=result,
            baseline=result.variants[0],
            variants=result.variants,
            rivals=result.variants[1:],
            figures={name: None if p is None else Markup(p.wide + p.narrow) for name, p in figures.items()},
            parts=plots.parts_of(result),
            n_part_colours=svg.N_SERIES + 2,
            names=ENVIRONMENT_NAMES,
            headline=_headline(result),
            tally=_tally(result),
            noun="Line",
            marks=render.MARKS,
            phrase=lambda variant: render.phrase(result, variant),
            series=svg.series_name,
            dash=svg.dash_of,
        )
        + "\n"
    )


def template(name: str) -> Template:
    """A template of this folder; a name that it does not know is an error, not an empty place."""
    environment = Environment(
        loader=PackageLoader("headwise.lab.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        loss=render.loss,
        signed=render.signed,
        percent=render.percent,
        p_value=render.p_value,
        quantity=render.quantity,
        ratio=render.ratio,
        duration=render.duration,
        interval=render.interval,
        setting=_setting,
        breakable=breakable,
    )
    return environment.get_template(name)


def _headline(result: CompareResult) -> str:
    rivals, base = result.variants[1:], result.variants[0].label
    if len(rivals) != 1:
        return f"{len(rivals)} architectures against {base}"
    diff = rivals[0].diff
    if diff is None or diff.verdict == "undecided":
        return f"{rivals[0].label} against {base}: undecided"
    return f"{rivals[0].label} is {diff.verdict} {'to' if diff.verdict == 'equivalent' else 'than'} {base}"


def _tally(result: CompareResult) -> list[tuple[str, int]]:
    """How many variants got each verdict, without those that none got."""
    verdicts = [v.diff.verdict for v in result.variants if v.diff is not None]
    return [(name, verdicts.count(name)) for name in render.MARKS if name in verdicts]


def breakable(line: str) -> Markup:
    """A line that may be broken after its brackets, commas and equals signs rather than within a name."""
    return Markup("<wbr>").join(escape(piece) for piece in re.split(r"(?<=[(,=])", line))


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
