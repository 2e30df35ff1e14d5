"""What `generate` shows: one text as it comes, a conversation, or how far a file is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.cli.arguments import print_json, say
from headwise.errors import Interrupted, SettingsError

if TYPE_CHECKING:
    from headwise.generate import Generation, Request
    from headwise.generate.chat import Chat
    from headwise.generate.jsonl import Tally
    from headwise.generate.writer import Writer

OnText = Callable[[str], None] | None


def tell(write: Callable[[OnText], list[Generation]], about: dict[str, Any], as_json: bool) -> int:
    """The texts that `write` makes: piece by piece behind the prompt, or as JSON with what is known `about` them."""
    from headwise.generate.request import InterruptedGeneration

    prompt = before = about.get("prompt", "")  # shown with the first piece: one that fails leaves stdout empty
    begun = False

    def show(piece: str) -> None:
        nonlocal before, begun
        sys.stdout.write(before + piece)
        sys.stdout.flush()
        before, begun = "", True

    started, status = time.perf_counter(), 0
    try:
        found = write(None if as_json else show)
    except InterruptedGeneration as stopped:
        found, status = [stopped.result], Interrupted.exit_code
    except Exception:
        if begun:  # what went wrong is told on a line of its own
            show("\n")
        raise
    seconds = time.perf_counter() - started
    best, *others = found
    n_tokens = sum(len(each.token_ids) for each in found)
    if as_json:
        more = {"others": [each.as_json() for each in others]} if others else {}
        print_json({**about, **best.as_json(), **more, "seconds": seconds, "tokens_per_s": n_tokens / seconds})
        return status
    if best.score is None:
        show("\n")
    for n, each in enumerate(found if best.score is not None else []):  # a search has all its texts at once
        show(f"{prompt if n else ''}{each.text}\n")
    if best.drafted:
        rate = best.accepted / best.drafted
        say(f"{best.accepted} of {best.drafted} proposed tokens taken ({rate:.0%}); {n_tokens / seconds:.1f} tokens/s")
    if status:
        raise Interrupted("interrupted")
    return 0


def converse(chat: Chat, turn: str | None, as_json: bool) -> int:
    """The answer to one turn, from stdin where it is not given; or, in a terminal, a conversation."""
    typed = turn is None and sys.stdin.isatty()
    if typed and as_json:
        raise SettingsError("--json shows one turn; give it with --prompt, with --prompt-file or on stdin")
    for each in _typed() if typed else [sys.stdin.read().strip() if turn is None else turn]:
        status = tell(lambda on_text, each=each: [chat.say(each, on_text)], {"turn": each}, as_json)  # type: ignore[misc]
        if status:
            return status
    return 0


def _typed() -> Iterator[str]:
    """Turns as they are typed, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lines can then be edited)
    say("Ctrl-D ends the conversation")
    while True:
        try:
            turn = input("> ").strip()
        except EOFError:
            print()
            return
        if turn:
            yield turn


def write_file(writer: Writer, source: Path, out: Path, request: Request, settings: str, as_json: bool) -> int:
    """Answer a file of prompts, with a bar on stderr in a terminal. Lines without an answer make the status 1."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from headwise.generate.jsonl import complete_file

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    started = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("")

        def follow(tally: Tally) -> None:
            rate = f"{tally.tokens / (time.perf_counter() - started):.1f} tokens/s"
            progress.update(task, total=tally.lines, completed=tally.finished, description=rate)

        try:
            tally = complete_file(writer, source, out, request, settings=settings, on_progress=follow)
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; the same command goes on with the lines that {out} lacks") from None
    seconds = time.perf_counter() - started
    problems = [{"line": n, "error": problem} for n, problem in sorted(tally.problems.items())]
    for each in problems:
        say(f"error: {source} line {each['line']}: {each['error']}")
    if as_json:
        print_json({**asdict(tally), "problems": problems, "seconds": seconds, "out": str(out)})
    else:
        before = f", {tally.earlier} of them from before" if tally.earlier else ""
        print(f"{tally.finished} of {tally.lines} lines in {out}{before}; {tally.tokens / seconds:.1f} tokens/s")
    return int(bool(problems))
