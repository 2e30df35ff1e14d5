"""The figures on the pages of docs/mechanisms: `python benchmarks/mechanisms.py [--json] [--save] [TABLE …]`

Every time is a ratio to the first row of its table, measured in turn with it on one thread, as the median of the
rounds and its interval; memory is what a forward pass keeps for the backward pass, counted exactly. `--save` writes
docs/figures/mechanisms.json, from which the pages are filled when the documentation is built.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path

import torch

import figures
from common import machine
from tables import Table, markdown

FIGURES = Path(__file__).parent.parent / "docs" / "figures" / "mechanisms.json"


def tables() -> dict[str, Callable[[], Table]]:
    """Every table by name, from each module of `figures` that has some."""
    names = [f"figures.{info.name}" for info in pkgutil.iter_modules(figures.__path__)]
    found = [getattr(importlib.import_module(name), "TABLES", {}) for name in names]
    return {name: each for made in found for name, each in made.items()}


def main() -> None:
    found = tables()
    parser = argparse.ArgumentParser(description="The figures on the pages of docs/mechanisms.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"only these: {', '.join(found)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--save", action="store_true", help="keep the tables in docs/figures/mechanisms.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(found):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    torch.set_num_threads(1)
    kept = json.loads(FIGURES.read_text(encoding="utf-8"))
    if arguments.save and arguments.tables and kept["machine"]["cpu"] != machine()["cpu"]:
        parser.error(f"the kept tables are of {kept['machine']['cpu']}; on another machine save all of them")
    made = {name: found[name]() for name in arguments.tables or found}
    result = {"command": "python benchmarks/mechanisms.py", "machine": machine(), "tables": made}
    if arguments.save:
        latest = json.loads(FIGURES.read_text(encoding="utf-8"))  # another table may have been saved meanwhile
        together = {"tables": (latest["tables"] if arguments.tables else {}) | made}
        FIGURES.write_text(json.dumps(result | together, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print("\n".join(f"{name}\n{markdown(each)}" for name, each in made.items()))


if __name__ == "__main__":
    main()
