"""Tables of measured figures: numbers with a kind, kept as JSON and shown as Markdown. Needs no torch."""

from __future__ import annotations

from typing import Any

# A table: {"title": …, "columns": [[key, heading, kind], …], "rows": [{key: value}, …]}.
# A value is a text, None, or a number in the unit of its kind; of kind "ratio" also [median, lowest, highest].
Table = dict[str, Any]


def table(title: str, *columns: tuple[str, str, str], rows: list[dict[str, Any]]) -> Table:
    """A table from its columns (key, heading, kind) and rows."""
    return {"title": title, "columns": [list(column) for column in columns], "rows": rows}


def shown(value: Any, kind: str) -> str:
    """One cell: `ratio` 1.23× (1.20–1.31), `bytes` 12.3 MB, `error` 1.2e-06, `number` 0.123, `count` 1,234; a text of
    kind `text` or `text right` as it is.
    """
    if value is None:
        return "–"
    if kind == "ratio":
        median, low, high = value
        spread = "" if low is None else f" ({low:.2f}–{high:.2f})"
        return f"{median:.2f}×{spread}"
    if kind == "bytes":
        for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= scale:
                return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value / scale:,.0f} {unit}"
        return f"{value:.0f} B"
    if kind == "error":
        return f"{value:.1e}"
    if kind == "number":
        return f"{value:.3g}"
    if kind == "count":
        return f"{value:,}"
    return str(value)


def markdown(made: Table) -> str:
    """The table in Markdown, all but text to the right; its title, if it has one, is a line above."""
    columns = made["columns"]
    lines = [
        "| " + " | ".join(heading for _, heading, _ in columns) + " |",
        "|" + "|".join("---" if kind == "text" else "--:" for _, _, kind in columns) + "|",
    ]
    for row in made["rows"]:
        lines.append("| " + " | ".join(shown(row.get(key), kind) for key, _, kind in columns) + " |")
    title = f"{made['title']}\n\n" if made["title"] else ""
    return title + "\n".join(lines) + "\n"
