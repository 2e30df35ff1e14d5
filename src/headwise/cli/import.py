"""`headwise import`: a published model as a folder of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from headwise.cli.arguments import Parser, show
from headwise.cli.outcome import new_folder
from headwise.train.settings import Settings

EXAMPLES = """
import models/SmolLM2-135M --out runs/smollm2
import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2 --dtype bfloat16
import models/Qwen3-0.6B --out runs/qwen3 --check
"""


class ImportSettings(Settings):
    """What is made of the model."""

    out: Path | None = Field(None, description="the new folder, default runs/import-TIME")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision of the weights, default the one they are stored in"
    )
    check: bool = Field(False, description="look at every weight, and refuse NaN and infinity")


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "import",
        "Write a published model as a folder of headwise, with its tokenizer. Other commands take published models as\n"
        "they are too; the folder is for keeping one, with its line.",
        EXAMPLES,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder, or a GGUF file")
    arguments = parser.read(argv, ImportSettings)
    settings = ImportSettings(**arguments.settings)
    out = settings.out or new_folder("import")

    import torch

    from headwise.exchange import import_model

    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    moved = import_model(arguments.options.model, out, dtype=dtype, check=settings.check)
    show(arguments, moved.as_json(), lambda: print(moved))
    return 0
