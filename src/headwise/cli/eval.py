"""`headwise eval`: the loss of a trained model on a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from headwise.cli.arguments import Parser, show
from headwise.train.settings import Settings

EXAMPLES = """
eval runs/gpt2 --data shakespeare
eval runs/gpt2 --data other.txt --split all --json
eval runs/gpt2 --quantise int4
"""


class EvalSettings(Settings):
    """What a model is evaluated on."""

    data: str = Field("shakespeare", description="shakespeare, a text file, folder, .jsonl, .parquet or hf:owner/name")
    text_column: str = Field("text", description="column that holds the text in .jsonl, .parquet and hf: data")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the text, at its end, that is the val split")
    split: Literal["val", "train", "all"] = Field(
        "val", description="what is evaluated: the last val_fraction of the data, what stands before it, or both"
    )
    seq_len: int | None = Field(None, ge=2, description="tokens of a window, default as the model was trained")
    batch_size: int | None = Field(None, ge=1, description="windows at once, default as many as suit the machine")
    quantise: Literal["int8", "int4"] | None = Field(
        None, description="also with the weights in int8 or int4, and what that costs"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")


def main(argv: Sequence[str]) -> int:
    parser = Parser("eval", "A trained model's loss over a whole split, in nats a token and bits a byte.", EXAMPLES)
    parser.add_argument("folder", type=Path, metavar="MODEL", help="a training run, or a model with its tokenizer")
    arguments = parser.read(argv, EvalSettings)
    settings = EvalSettings(**arguments.settings)

    from headwise.data import load_dataset, load_tokenizer
    from headwise.io.pretrained import load
    from headwise.model.quantise import quantise
    from headwise.train import evaluate
    from headwise.train.evaluation import EvalResult, together_over
    from headwise.train.job import resolve_device

    model = load(arguments.options.folder, device=resolve_device(settings.device))
    dataset = load_dataset(
        settings.data,
        load_tokenizer(arguments.options.folder),
        text_column=settings.text_column,
        val_fraction=settings.val_fraction,
    )
    parts = {"val": [dataset.val], "train": [dataset.train], "all": [dataset.train, dataset.val]}[settings.split]

    def measured() -> EvalResult:
        return together_over(
            [evaluate(model, tokens, seq_len=settings.seq_len, batch_size=settings.batch_size) for tokens in parts],
            [tokens.n_bytes for tokens in parts],
        )

    result = measured()
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits a byte"
    about = {"val": f"val, its last {settings.val_fraction:.0%}", "train": "train", "all": "all of it"}[settings.split]
    text = f"{result.nats:.4f} nats a token{bits}, over {result.n_tokens:,} tokens of {dataset.name} ({about})"
    record = {**asdict(result), "data": dataset.name, "split": settings.split}
    if settings.quantise is not None:
        quantise(model, settings.quantise)
        small = measured()
        text += f"\n{small.nats:.4f} nats a token in {settings.quantise}: {small.nats - result.nats:+.4f}"
        record |= {"quantised": {"scheme": settings.quantise, **asdict(small)}}
    show(arguments, record, lambda: print(text))
    return 0
