"""Many prompts from a file, answers into another: a line of JSON each.

A line of the source has `prompt` (text) or `messages` (a conversation for the model's chat template), and may have an
`id`. A line of the result has `line` (counted from 1), `id`, and the fields of `Generation.as_json`. Results stand in
the order in which they ended. Run again with the same files, only lines without a result are answered: a run that was
stopped goes on. Line n draws by the seed and n, whatever the others are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headwise.errors import DataError, HeadwiseError, SettingsError, short
from headwise.generate.chat import chat_ids
from headwise.generate.request import Request
from headwise.generate.writer import Writer


@dataclass
class Tally:
    """How far a file is.

    Attributes:
        lines: lines that ask for something.
        finished: those with a result, `earlier` of them from an earlier run.
        tokens: new tokens of this run.
        problems: line number → why it has no result.
    """

    lines: int = 0
    earlier: int = 0
    finished: int = 0
    tokens: int = 0
    problems: dict[int, str] = field(default_factory=dict)


def complete_file(
    writer: Writer,
    source: Path,
    out: Path,
    request: Request,
    *,
    settings: str = "",
    on_progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Answer every line of `source` into `out`.

    Args:
        writer: the model, and how it writes.
        source, out: the files.
        request: what holds for every line; its prompt and index are the line's own.
        settings: whatever else the answers depend on; a file begun with other settings is not gone on with.
        on_progress: called after every line.

    Raises:
        DataError: a file cannot be read.
        SettingsError: `out` holds something else, or results of other lines or settings.

    A line that cannot be answered is a problem of that line's, see `Tally`.
    """
    asked = {n: line for n, line in enumerate(_lines(source), 1) if line.strip()}
    keys = {n: hashlib.sha256(f"{line}\n{settings}".encode()).hexdigest()[:16] for n, line in asked.items()}
    done = _finished(out, keys)
    tally = Tally(len(asked), len(done), len(done))

    def tell() -> None:
        if on_progress is not None:
            on_progress(tally)

    waiting: list[tuple[int, Any, Request]] = []
    for n, line in asked.items():
        try:
            if n not in done:
                waiting.append((n, *_request(writer, line, request, n)))
        except HeadwiseError as error:
            tally.problems[n] = str(error)
    with out.open("a", encoding="utf-8") as file:
        tell()
        for place, found in writer.answers([each for _, _, each in waiting]):
            n, name, _ = waiting[place]
            if isinstance(found, HeadwiseError):
                tally.problems[n] = str(found)
            else:
                best, *others = (each.as_json() for each in found)
                more = {"others": others} if others else {}
                kept = {} if name is None else {"id": name}
                file.write(json.dumps({"line": n, "key": keys[n], **kept, **best, **more}) + "\n")
                file.flush()
                tally.finished += 1
                tally.tokens += sum(len(each.token_ids) for each in found)
            tell()
    return tally


def _request(writer: Writer, line: str, request: Request, n: int) -> tuple[Any, Request]:
    """What line number `n` asks for, and its id."""
    about = _parsed(line)
    prompt = about["prompt"] if "prompt" in about else chat_ids(writer.tokenizer, about["messages"])
    return about.get("id"), replace(request, prompt=prompt, index=n)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is no UTF-8 text (byte {error.start:,})") from None


def _parsed(line: str) -> dict[str, Any]:
    wanted = 'wanted is an object with "prompt" or "messages"'
    try:
        about = json.loads(line)
    except ValueError as error:
        raise DataError(f"is no JSON ({error}); {wanted}") from None
    if not isinstance(about, dict) or ("prompt" in about) == ("messages" in about):
        raise DataError(f"{wanted}, not {short(about)}")
    if not isinstance(about.get("prompt", ""), str):
        raise DataError(f"prompt: given {short(about['prompt'])}, should be text")
    if not isinstance(about.get("messages", []), list):
        raise DataError(f"messages: given {short(about['messages'])}, should be a list")
    return about


def _finished(out: Path, keys: dict[int, str]) -> set[int]:
    """The lines that have a result; what a stopped run left of a last one is cut off."""
    if not out.exists():
        return set()
    done, held = set(), out.read_bytes()
    whole = held.rfind(b"\n") + 1
    for number, text in enumerate(held[:whole].splitlines(), 1):
        try:
            record = json.loads(text)
            n, key = int(record["line"]), record["key"]
        except (ValueError, KeyError, TypeError):
            raise SettingsError(
                f"out: line {number} of {out} is no result of this command; choose another file"
            ) from None
        if keys.get(n) != key:
            raise SettingsError(
                f"out: {out} has results of other lines or settings (its line {number}); choose another file, or "
                "delete this one"
            )
        done.add(n)
    if whole < len(held):
        with out.open("r+b") as file:
            file.truncate(whole)
    return done
