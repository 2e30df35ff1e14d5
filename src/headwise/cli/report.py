"""`headwise report`: the report of a comparison, built again from its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.cli.arguments import Parser, show

EXAMPLES = """
report runs/first
report runs/first --json
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser("report", "Build report.html and result.csv of a comparison again from its result.json.", EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of `headwise compare`")
    arguments = parser.read(argv)
    folder: Path = arguments.options.folder

    from headwise.lab.report import build_report
    from headwise.lab.result import CompareResult

    result = CompareResult.load(folder)
    result.to_csv(folder / "result.csv")
    report = build_report(result, folder)
    show(arguments, {"report": str(report)}, lambda: print(f"report: {report}"))
    return 0
