"""`headwise resume`: what was stopped goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.cli.arguments import Parser, say
from headwise.cli.outcome import tell_ab, tell_comparison, tell_run
from headwise.train.folder import RunFolder

EXAMPLES = """
resume runs/gpt2
resume runs/compare-20250131-120000
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "resume",
        "Go on with a training run, a distillation or a comparison, to the same bits as if it had never stopped.",
        EXAMPLES,
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="the --out of `headwise train`, `compare` or `distill`",
    )
    arguments = parser.read(argv)
    folder: Path = arguments.options.folder
    if (folder / "compare.json").exists():
        from headwise.lab.compare import resume_comparison

        return tell_comparison(arguments, resume_comparison(folder, progress=True), folder)
    if (folder / "ab.json").exists():
        from headwise.lab.ab import resume_ab

        return tell_ab(arguments, resume_ab(folder, progress=True), folder)
    if RunFolder(folder).is_distilled:
        from headwise.distill import resume as go_on

        tell_run(arguments, go_on(folder, say=say, warn=say))
        return 0
    from headwise.train import resume

    tell_run(arguments, resume(folder, warn=say))
    return 0
