"""Runs the blocks of a tutorial in order, Python in one namespace, bash beside it: `tutorial_blocks.py < blocks.json`

A block is {"language", "code", "line", "file"}: with a `file` its code is written there instead. Also what takes a
Markdown page apart into blocks; a comment before a block says how it differs in the tests:

    <!-- test: --steps 300→--steps 3; --seeds 6→--seeds 2 -->    text to exchange, each piece must be there
    <!-- test: file my_module.py -->                             a file to write, not code to run
    <!-- test: skip -->
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"(?:^<!-- test: (?P<how>.*?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
RUNS = ("python", "bash")


def blocks_of(page: Path) -> list[dict[str, Any]]:
    """The blocks of a page that run or are written, with the differences worked in."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for found in BLOCK.finditer(text):
        how, code = found["how"] or "", found["code"]
        line = text[: found.start("code")].count("\n") + 1
        file = how.removeprefix("file ") if how.startswith("file ") else None
        if how == "skip" or (file is None and found["language"] not in RUNS):
            continue
        for change in how.split("; ") if how and file is None else ():
            old, arrow, new = change.partition("→")
            assert arrow, f"{page.name}:{line}: {change!r} has no → in it"
            assert old in code, f"{page.name}:{line}: no {old!r} to exchange in the block"
            code = code.replace(old, new)
        blocks.append({"language": found["language"], "code": code, "line": line, "file": file})
    return blocks


def run(blocks: list[dict[str, Any]], page: str) -> None:
    """Run them; the first that fails ends the process with its error."""
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    for block in blocks:
        if block["file"] is not None:
            Path(block["file"]).write_text(block["code"], encoding="utf-8")
        elif block["language"] == "python":
            padded = "\n" * (block["line"] - 1) + block["code"]  # so that a traceback names the page's line
            exec(compile(padded, page, "exec"), namespace)
        else:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block["code"]])
            if done.returncode:
                sys.exit(f"{page}:{block['line']}: bash block ended with {done.returncode}")


if __name__ == "__main__":
    sys.path.insert(0, "")
    about = json.load(sys.stdin)
    run(about["blocks"], about["page"])
