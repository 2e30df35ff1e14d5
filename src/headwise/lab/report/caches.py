"""The report of `headwise bench cache`: one HTML file that needs nothing else."""

from __future__ import annotations

from headwise.lab.bench.cache_table import COLUMNS, about, cells
from headwise.lab.bench.caches import CacheResult
from headwise.lab.report import ENVIRONMENT_NAMES, template


def report_html(result: CacheResult) -> str:
    """The report as text; the same result always gives the same text."""
    environment = [(ENVIRONMENT_NAMES.get(n, n), v) for n, v in result.environment if v not in ("", None)]
    return (
        template("caches.html.j2").render(
            r=result,
            about=about(result),
            columns=COLUMNS,
            rows=[cells(result, row) for row in result.rows],
            environment=environment,
            marks=(),
            n_part_colours=0,
        )
        + "\n"
    )
