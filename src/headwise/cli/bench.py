"""`headwise bench`: time and memory of mechanisms against length, and what caches cost on a mix of requests."""

from __future__ import annotations

from collections.abc import Sequence

from headwise.cli.arguments import Parser, print_json, show
from headwise.errors import SettingsError, one_of
from headwise.lab.bench.run import BenchEstimate, bench, estimate
from headwise.lab.bench.settings import BenchSettings

EXAMPLES = """
bench attention --lengths 512:4096
bench attention --kinds 'softmax,window(256),gqa(kv_heads=2)' --lengths 512:16384 --out runs/windows
bench attention --kinds all --level layer --no-backward --dry-run
bench attention --device cuda --dtype bfloat16 --lengths 1024:65536 --peers
"""


CACHE_EXAMPLES = """
bench cache
bench cache --max-len 4096 --shared 0.9 --shared-prefix 1024 --out runs/caches
bench cache --line 'llama(attention=mla)' --block-size 64 --json
"""
SUBJECTS = ("attention", "cache")


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "cache":
        return _cache(argv)
    parser = Parser(
        "bench",
        "Time and memory of every kind against length, in turn with torch's own scaled_dot_product_attention, and the\n"
        "length from which each is faster. The folder --out gets report.html and result.json.\n"
        "`headwise bench cache --help` has what caches cost: waste, sharing and bytes a token on a mix of requests.",
        EXAMPLES,
    )
    parser.add_argument("subject", metavar="SUBJECT", help=f"what is measured: {', '.join(SUBJECTS)}")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and do nothing")
    arguments = parser.read(argv, BenchSettings)
    if arguments.options.subject not in SUBJECTS:
        raise SettingsError(one_of(arguments.options.subject, SUBJECTS, "subject"))
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


def _cache(argv: Sequence[str]) -> int:
    from headwise.lab.bench.cache_table import rich_table
    from headwise.lab.bench.caches import bench_cache
    from headwise.lab.bench.traffic import CacheSettings

    parser = Parser(
        "bench cache",
        "What each kind of cache reserves, wastes and shares while requests of many lengths pass through it.\n"
        "The folder --out gets report.html and result.json.",
        CACHE_EXAMPLES,
    )
    arguments = parser.read(argv[1:], CacheSettings)
    settings = CacheSettings(**arguments.settings)
    result = bench_cache(settings)

    def table() -> None:
        from rich.console import Console

        console = Console()
        console.print(rich_table(result))
        if settings.out is not None:
            where = settings.out / "report.html"
            console.print(f"report: {where}", markup=False, highlight=False, soft_wrap=True)

    show(arguments, result.model_dump(mode="json"), table)
    return 0
