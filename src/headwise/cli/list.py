"""`headwise list`: everything that a line can be made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headwise.cli import COMMANDS
from headwise.cli.arguments import Parser, show
from headwise.errors import SettingsError, one_of
from headwise.registry import FAMILIES, Registry
from headwise.spec.presets import PRESETS

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("preset", *FAMILIES, "command")
EXAMPLES = """
list
list attention
list preset --json
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser("list", "What a line can be made of, plug-ins included: names, and a line about each.", EXAMPLES)
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"only these: {', '.join(KINDS)}")
    arguments = parser.read(argv)
    kind = arguments.options.kind
    if kind is not None and kind not in KINDS:
        raise SettingsError(one_of(kind, KINDS, "kind"))
    kinds = [kind] if kind else KINDS
    found = {kind: entries(kind) for kind in kinds}
    show(arguments, found if kind is None else found[kind], lambda: _print(found))
    return 0


def entries(kind: str) -> list[dict[str, Any]]:
    """Everything of a kind: `name`, `summary` and other names for it (`aliases`)."""
    if kind == "preset":
        return [
            {"name": name, "summary": preset.summary, "aliases": [], "sizes": list(preset.sizes)}
            for name, preset in sorted(PRESETS.items())
        ]
    if kind == "command":
        return [{"name": name, "summary": summary, "aliases": []} for name, summary in COMMANDS.items()]
    registry = FAMILIES[kind]
    return [
        {"name": name, "summary": registry.get(name).summary, "aliases": _aliases(registry, name)}
        for name in registry.list()
    ]


def _aliases(registry: Registry, kind: str) -> list[str]:
    return [alias.name for alias in registry.aliases().values() if alias.kind == kind]


def _print(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console

    console = Console()
    for kind, rows in found.items():
        with console.capture() as captured:
            console.print(_table(kind, rows))
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _table(kind: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=kind, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        text = row["summary"]
        if row["aliases"]:
            text += f" (also: {', '.join(row['aliases'])})"
        if row.get("sizes"):
            text += f" (sizes: {', '.join(row['sizes'])})"
        table.add_row(Text(f"  {row['name']}", style="cyan"), Text(text))
    return table
