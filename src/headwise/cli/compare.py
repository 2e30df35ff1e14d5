"""`headwise compare`: architectures trained under fair conditions, and what may be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.cli.arguments import Parser, read_lines, show
from headwise.cli.outcome import new_folder, tell_comparison
from headwise.errors import together
from headwise.lab.compare import compare
from headwise.lab.settings import CompareSettings

EXAMPLES = """
compare gpt2 llama 'llama(attention=gqa(kv_heads=2))' --data shakespeare --seeds 6 --steps 300 --out runs/first
compare gpt2 'gpt2(position=rope)' --lr-grid 3e-4,1e-3,3e-3
compare llama 'llama(ffn=geglu)' --size 5m --steps 2000 --match flops --dry-run
compare gpt2 llama --model.d_model 256 --match time
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "compare",
        "Train every line on several seeds and judge each against the first, the baseline. All see the same batches\n"
        "in the same order. The folder --out (default runs/compare-TIME) gets report.html, result.json, result.csv;\n"
        "the same command goes on where a stopped one was, also with more --seeds.",
        EXAMPLES,
        model_flags=True,
    )
    parser.add_argument(
        "lines", nargs="+", metavar="LINE", help="an architecture: a line or a YAML file; the first is the baseline"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and do nothing")
    arguments = parser.read(argv, CompareSettings)
    lines, settings = together(
        lambda: read_lines(arguments.options.lines, arguments.flags),
        lambda: CompareSettings(**{"out": new_folder("compare"), **arguments.settings}),
    )
    if not arguments.flags:
        lines = arguments.options.lines  # as they were written, which is how they are shown
    if arguments.options.dry_run:
        from headwise.lab.estimate import estimate_comparison

        estimate = estimate_comparison(lines, CompareSettings(**arguments.settings))
        show(arguments, estimate.as_json(), lambda: print(estimate))
        return 0
    result = compare(lines, settings, progress=True)
    return tell_comparison(arguments, result, Path(settings.out or ""))
