"""Which command is meant, and what becomes of its errors. Nothing heavy is imported here."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from headwise import __version__
from headwise.errors import HeadwiseError, one_of

# Command → one line about it, in the order of a first day with headwise. The file is cli/<command>.py.
COMMANDS = {
    "list": "what a line can be made of: presets, attention, position, norm, ffn",
    "show": "parameters, FLOPs and cache of architectures, side by side",
    "compare": "train architectures under fair conditions and judge the difference",
    "bench": "time and memory of mechanisms against length",
    "report": "build the report of a comparison again",
    "train": "train one architecture",
    "resume": "go on with a training run or a comparison that was stopped",
    "generate": "text from a trained model",
    "swap": "other mechanisms in a trained model, started from the weights they replace",
    "distill": "a student learns from a teacher's keys, values, hidden states and predictions",
    "eval": "the loss of a trained model on a text",
    "import": "a published model as a folder of headwise",
    "export": "a model in the form of the tools that people serve with",
}

INTRO = """\
A workbench for Transformer architectures: one line of text is one architecture.

usage: headwise COMMAND …
"""

EXAMPLES = """\
examples:
  headwise list attention
  headwise show gpt2 llama 'llama(attention=gqa(kv_heads=2))'
  headwise compare gpt2 llama --data shakespeare --seeds 6 --steps 300 --out runs/first

`headwise COMMAND --help` has every setting of a command.\
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or what the error asks for, with one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except HeadwiseError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Who read our output has enough, as in `headwise list | head -1`. Nothing is left to say, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"headwise {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _fail(one_of(command, COMMANDS, "command"), 2)
    try:
        return int(importlib.import_module(f"headwise.cli.{command}").main(rest))
    except SystemExit as end:  # argparse, after --help
        return int(end.code or 0)


def overview() -> str:
    """What `headwise --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"{INTRO}\ncommands:\n{commands}\n\n{EXAMPLES}"


def _fail(text: str, status: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return status
