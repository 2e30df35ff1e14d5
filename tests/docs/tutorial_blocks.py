"""Takes a Markdown page apart into blocks, and runs them in order, Python in one namespace, bash beside it.

A block is {"language", "code", "line", "file"}: with a `file` its code is written there instead. A comment before a
block says how it differs in the tests:

    <!-- test: seeds=6→1, steps=300→3 -->    settings, as keywords or flags; training is then made small in all else too
    <!-- test: -e .→--quiet . -->            any other text to exchange; each piece must be there
    <!-- test: file my_module.py -->         a file to write, not code to run
    <!-- test: skip -->
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"(?:^<!-- test: (?P<how>.*?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
RUNS = ("python", "bash")
# What makes training a matter of seconds, for `train` and, with more, for `compare`.
SMALL: dict[str, dict[str, str | int | float]] = {"train": {"size": "20k", "batch_size": 2, "val_fraction": 0.01}}
SMALL["compare"] = {**SMALL["train"], "measure_rounds": 0, "workers": 1}


def blocks_of(page: Path) -> list[dict[str, Any]]:
    """The blocks of a page that run or are written, with the differences worked in."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for found in BLOCK.finditer(text):
        how, code = found["how"] or "", found["code"]
        line = text[: found.start("code")].count("\n") + 1
        file = how.removeprefix("file ") if how.startswith("file ") else None
        if how == "skip" or (file is None and found["language"] not in RUNS):
            continue
        if how and file is None:
            code = changed(code, how, f"{page.name}:{line}")
        blocks.append({"language": found["language"], "code": code, "line": line, "file": file})
    return blocks


def changed(code: str, how: str, where: str) -> str:
    """A block as the tests run it."""
    for piece in how.split(", "):
        old, arrow, new = piece.partition("→")
        assert arrow, f"{where}: {piece!r} has no → in it"
        setting = re.fullmatch(r"(\w+)=(\S+)", old)
        if setting:
            pattern = rf"({setting[1]}=|--{setting[1].replace('_', '-')} ){re.escape(setting[2])}\b"
            code, times = re.subn(pattern, lambda match, new=new: match[1] + new, code)  # type: ignore[misc]
        else:
            times = code.count(old)
            code = code.replace(old, new)
        assert times, f"{where}: no {old!r} to exchange in the block"
    return made_small(code)


def made_small(code: str) -> str:
    """A block whose trainings take SMALL settings, where it does not give them itself."""
    for command, small in SMALL.items():
        flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in small.items())
        code = re.sub(rf"^(headwise {command}\b)", rf"\1{flags}", code, flags=re.MULTILINE)
    if "hw." not in code:
        return code
    tree = ast.parse(code)
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("hw.train", "hw.compare"):
            given = {keyword.arg for keyword in call.keywords}
            small = SMALL[ast.unparse(call.func).removeprefix("hw.")]
            call.keywords += [ast.keyword(name, ast.Constant(v)) for name, v in small.items() if name not in given]
    return ast.unparse(tree)


def run(blocks: list[dict[str, Any]], page: str) -> int:
    """Run them up to the first that fails; the status is 0 if none did."""
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    for block in blocks:
        if block["file"] is not None:
            Path(block["file"]).write_text(block["code"], encoding="utf-8")
        elif block["language"] == "python":
            padded = "\n" * (block["line"] - 1) + block["code"]  # so that a traceback names the page's line
            exec(compile(padded, page, "exec"), namespace)
        else:
            sys.stdout.flush()
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]])
            if done.returncode:
                print(f"{page}:{block['line']}: bash block ended with {done.returncode}")
                return 1
    return 0
