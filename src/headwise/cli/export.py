"""`headwise export`: a model in the form of the tools that people serve with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from headwise.cli.arguments import Parser, show
from headwise.cli.outcome import new_folder
from headwise.train.settings import Settings

EXAMPLES = """
export runs/llama --out exported/llama
export runs/vein --format hf-code --out exported/vein
export runs/llama --format gguf-q8_0 --out exported/llama.gguf
"""


class ExportSettings(Settings):
    """What is made of the model."""

    out: Path | None = Field(None, description="the new folder or .gguf file, default runs/export-TIME")
    format: str = Field(
        "hf",
        description="hf: as the class of transformers that computes the same, for vLLM, llama.cpp's converter and "
        "others; hf-code: any line, with its own code, for transformers alone; gguf, gguf-f16 and gguf-q8_0: for "
        "llama.cpp, in the weights' own precision, in half or in 8 bits",
    )
    check: bool = Field(False, description="look at every weight, and refuse NaN and infinity")


def main(argv: Sequence[str]) -> int:
    parser = Parser("export", "Write a model as what other tools take, its tokenizer included.", EXAMPLES)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a training run, or a model in any form")
    arguments = parser.read(argv, ExportSettings)
    settings = ExportSettings(**arguments.settings)
    out = settings.out or new_folder("export")

    from headwise.exchange import export_model

    moved = export_model(arguments.options.model, out, format=settings.format, check=settings.check)
    show(arguments, moved.as_json(), lambda: print(moved))
    return 0
