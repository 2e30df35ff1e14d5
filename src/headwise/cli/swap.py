"""`headwise swap`: other mechanisms in a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from headwise.cli.arguments import Parser, show
from headwise.cli.outcome import new_folder
from headwise.lab.swap import SwapSettings, plan_swap, swap_saved

EXAMPLES = """
swap runs/llama --ffn 'vft(rank=16)' --layers 0-2 --out runs/vein
swap runs/gpt2 --attention 'gqa(kv_heads=2)' --out runs/gqa
swap runs/llama --attention 'tva(rank=8)' --ffn 'vft(rank=16)' --dry-run
train --init-from runs/vein --steps 200 --lr 3e-4
"""


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "swap",
        "Put other mechanisms into some or all layers of a trained model. They start from the weights they replace;\n"
        "everything else stays as it is. The folder --out gets the new model and its tokenizer.",
        EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="MODEL", help="a training run, or a model with its tokenizer")
    parser.add_argument("--dry-run", action="store_true", help="say what the model would be, and do nothing")
    arguments = parser.read(argv, SwapSettings)
    folder: Path = arguments.options.folder
    settings = SwapSettings(**{"out": new_folder("swap"), **arguments.settings})
    if arguments.options.dry_run:
        plan = plan_swap(folder, settings)
        show(arguments, plan.as_json(), lambda: print(plan))
        return 0
    result = swap_saved(folder, settings)

    def render() -> None:
        print(result)
        print(f"in {result.out}; train it on: headwise train --init-from {result.out}")

    show(arguments, result.as_json(), render)
    return 0
