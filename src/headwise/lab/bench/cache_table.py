"""What caches cost, in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headwise.lab.bench.caches import CacheResult, CacheRow
from headwise.lab.render import quantity

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("Kind", "A token's place", "A token, in all", "At most", "Waste", "Shared", "Requests in the same memory")


def cells(result: CacheResult, row: CacheRow) -> tuple[str, ...]:
    """A row of the table; the last cell says how many times as many requests fit as with preallocation."""
    return (
        row.label,
        quantity(row.token_bytes, "B"),
        quantity(row.bytes_per_token, "B"),
        quantity(row.peak_bytes, "B"),
        f"{100 * row.waste:.1f} %",
        f"{100 * row.sharing:.1f} %",
        f"{result.rows[0].bytes_per_token / row.bytes_per_token:.2f}×",
    )


def about(result: CacheResult) -> str:
    """What passed through, in a sentence."""
    s = result.settings
    return (
        f"{s['requests']} requests, {s['batch_size']} at once, prompts of {s['prompt_tokens']:g} and answers of "
        f"{s['new_tokens']:g} tokens on average, at most {s['max_len']:,}; {100 * s['shared']:.0f} % of the prompts "
        f"begin with the same {s['shared_prefix']} tokens; keys and values in bfloat16"
    )


def rich_table(result: CacheResult) -> Table:
    """A row a kind."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption=Text(about(result)))
    for n, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if n else "left")
    for row in result.rows:
        table.add_row(*(Text(cell) for cell in cells(result, row)))
    return table
