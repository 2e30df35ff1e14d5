"""What `train` and `resume` say at their end, and the folders that commands choose when they are told none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.cli.arguments import Arguments, print_json

if TYPE_CHECKING:
    from headwise.lab.ab.result import ABResult
    from headwise.lab.result import CompareResult
    from headwise.train import TrainResult


def new_folder(command: str) -> Path:
    """A folder of its own under runs/, named by command and time."""
    stem = Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return path


def tell_run(arguments: Arguments, result: TrainResult) -> None:
    """The figures of a finished run."""
    figures = {**result.figures(), "out": None if result.out is None else str(result.out)}
    if arguments.options.json:
        print_json(figures)
        return
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits a byte"
    print(f"validation loss {result.val_loss:.4f} nats a token{bits}")
    print(
        f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.1f} s: {result.tokens_per_s:,.0f} a second"
    )
    for remark in result.remarks():
        print(remark)
    print(f"in {result.out}; text from it: headwise generate {result.out}")


def tell_comparison(arguments: Arguments, result: CompareResult, out: Path) -> int:
    """The verdict, in a table and in words. The exit status is 1 where a line has no finished run at all."""
    return _tell_verdict(arguments, result, out, result.verdict_lines)


def tell_ab(arguments: Arguments, result: ABResult, out: Path) -> int:
    """As `tell_comparison`, with what the likeness of student and teacher is worth, and the claims."""
    from headwise.lab.ab.words import sentences

    return _tell_verdict(arguments, result, out, lambda: sentences(result))


def _tell_verdict(arguments: Arguments, result: CompareResult, out: Path, sentences: Callable[[], list[str]]) -> int:
    status = int(any(variant.val_loss.mean is None for variant in result.variants))
    if arguments.options.json:
        print_json({**result.model_dump(mode="json"), "out": str(out)})
        return status
    from rich.console import Console

    from headwise.lab.result import render_table

    console = Console()
    console.print()
    console.print(render_table(result))
    console.print()
    for sentence in sentences():
        console.print(sentence, markup=False, highlight=False)
    for run in result.failed_runs:
        console.print(f"failed: {run.label}, seed {run.seed}: {run.error}", markup=False, highlight=False, style="red")
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return status
