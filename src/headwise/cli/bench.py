"""`headwise bench`: time and memory of mechanisms against length, next to torch's own attention."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.cli.arguments import Parser, print_json, show
from headwise.lab.bench.run import SUBJECTS, BenchEstimate, bench, estimate
from headwise.lab.bench.settings import BenchSettings

EXAMPLES = """
bench attention --lengths 512:4096
bench attention --kinds 'softmax,window(256),gqa(kv_heads=2)' --lengths 512:16384 --out runs/windows
bench attention --kinds all --level layer --no-backward --dry-run
bench attention --device cuda --dtype bfloat16 --lengths 1024:65536 --peers
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "bench",
        "Time and memory of every kind against length, in turn with torch's own scaled_dot_product_attention, and the\n"
        "length from which each is faster. The folder --out gets report.html and result.json.",
        EXAMPLES,
    )
    parser.add_argument("subject", metavar="SUBJECT", help=f"what is measured: {', '.join(SUBJECTS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and do nothing")
    arguments = parser.read(argv, BenchSettings)
    settings = BenchSettings(**arguments.settings)
    if arguments.options.dry_run:
        found: BenchEstimate = estimate(arguments.options.subject, settings)
        show(arguments, found.as_json(), lambda: print(found))
        return 0
    result = bench(arguments.options.subject, settings, progress=True)
    status = int(all(not point.seconds for row in result.rows[1:] for point in row.points))
    if arguments.options.json:
        print_json(result.model_dump(mode="json"))
        return status
    from rich.console import Console

    from headwise.lab.bench.table import rich_table

    console = Console()
    console.print(rich_table(result))
    if settings.out is not None:
        where = settings.out / "report.html"
        console.print(f"report: {where}", markup=False, highlight=False, soft_wrap=True)
    return status
