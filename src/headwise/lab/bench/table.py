"""A benchmark in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise.lab.bench.result import BenchResult, Point, crossover_words
from headwise.lab.render import NONE, quantity

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(result: BenchResult) -> Table:
    """A row a kind: time against torch's own at every length, where it becomes faster, its memory at the longest."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    s = result.settings
    passes = "forward and backward" if s["backward"] else "forward"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        title=Text(f"{result.subject}, {s['level']}, {passes}: time × torch's own (seconds for torch's own)"),
        caption=Text(
            f"{s['batch_size']} × {s['n_heads']} heads of width {s['head_dim']}, {s['dtype']}, "
            f"{result.environment.device}, {s['threads']} threads, {s['rounds']} rounds; "
            f"peak: memory of a step at {result.lengths[-1]:,} tokens"
        ),
    )
    table.add_column("Kind", overflow="fold")
    for length in result.lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    table.add_column("Faster")
    table.add_column("Peak", justify="right", no_wrap=True)
    for row in result.rows:
        points = [row.at(length) for length in result.lengths]
        cells = [_cell(point, own=row is result.rows[0]) for point in points]
        last = points[-1]
        peak = NONE if last is None else quantity(last.peak_bytes, "B")
        # Text, not markup: a call may hold square brackets.
        table.add_row(*(Text(cell) for cell in (row.label, *cells, crossover_words(row), peak)))
    return table


def _cell(point: Point | None, *, own: bool) -> str:
    if point is None or point.median is None:
        return NONE
    if own:
        return f"{1000 * point.median:.3g} ms" if point.median < 1 else f"{point.median:.3g} s"
    if point.ratio is None:
        return NONE
    spread = (
        "" if point.ratio.lo is None or point.ratio.hi is None else f"\n±{(point.ratio.hi - point.ratio.lo) / 2:.2f}"
    )
    return f"{point.ratio.ratio:.2f}×{spread}"
