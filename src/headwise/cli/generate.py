"""`headwise generate`: text from a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from headwise.cli.arguments import Parser, print_json
from headwise.train.settings import Settings

EXAMPLES = """
generate runs/gpt2 --prompt 'ROMEO:'
generate runs/gpt2 --prompt 'To be' --max-new-tokens 500 --temperature 0.8 --top-k 40 --seed 7
"""


class GenerateSettings(Settings):
    """How text is drawn."""

    prompt: str = Field("\n", description="text to go on from, default a line break")
    max_new_tokens: int = Field(200, ge=1, description="tokens to write, if the text does not end before")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0 takes the likeliest token every time")
    top_k: int | None = Field(None, ge=1, description="draw from the k likeliest tokens only")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the likeliest tokens that make up p only")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the draws")
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")


def main(argv: Sequence[str]) -> int:
    parser = Parser("generate", "Text from a trained model, as it comes.", EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a training run, or a saved model with its tokenizer")
    arguments = parser.read(argv, GenerateSettings)
    settings = GenerateSettings(**arguments.settings)

    from headwise.data import load_tokenizer
    from headwise.generate import generate
    from headwise.io.pretrained import load
    from headwise.train.job import resolve_device

    model = load(arguments.options.folder, device=resolve_device(settings.device))
    tokenizer = load_tokenizer(arguments.options.folder / "tokenizer")

    before = settings.prompt  # written with the first piece, so that a prompt that fails leaves stdout empty

    def write(piece: str) -> None:
        nonlocal before
        sys.stdout.write(before + piece)
        sys.stdout.flush()
        before = ""

    options = settings.model_dump(exclude={"prompt", "device"})
    text = generate(model, tokenizer, settings.prompt, **options, on_text=None if arguments.options.json else write)
    if arguments.options.json:
        print_json({"prompt": settings.prompt, "text": text})
    else:
        write("\n")
    return 0
