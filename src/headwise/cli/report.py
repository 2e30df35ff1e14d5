"""`headwise report`: the report of a comparison or an A/B, built again from its result."""

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
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of `headwise compare` or `distill ab`")
    arguments = parser.read(argv)
    folder: Path = arguments.options.folder

    report = _ab(folder) if (folder / "ab.json").exists() else _comparison(folder)
    show(arguments, {"report": str(report)}, lambda: print(f"report: {report}"))
    return 0


def _comparison(folder: Path) -> Path:
    from headwise.lab.report import build_report
    from headwise.lab.result import CompareResult

    result = CompareResult.load(folder)
    result.to_csv(folder / "result.csv")
    return build_report(result, folder)


def _ab(folder: Path) -> Path:
    from headwise.lab.ab import ABResult
    from headwise.lab.ab.run import save

    return save(ABResult.load(folder), folder)
