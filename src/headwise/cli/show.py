"""`headwise show`: what architectures are made of and what they cost, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field

from headwise.cli.arguments import Parser, read_lines, show
from headwise.errors import together
from headwise.lab.render import quantity
from headwise.spec import ModelSpec, count
from headwise.spec.grammar import to_yaml
from headwise.train.settings import Settings

EXAMPLES = """
show gpt2 llama 'llama(attention=gqa(kv_heads=2))'
show 'llama(size="7b")' --context 4096
show my-model.yaml --size 10m --json
show llama --model.attention.kind window --model.attention.window 256 --yaml
show models/SmolLM2-135M runs/vein
"""


class ShowSettings(Settings):
    """What the counts are taken at."""

    size: str | None = Field(None, description="parameters of lines without widths, default 1m")
    context: int | None = Field(
        None, ge=1, description="tokens in the context that FLOPs and cache are counted at, default max_seq_len"
    )


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "show",
        "Parameters by part, FLOPs a token and KV cache of architectures, side by side. Nothing is built.",
        EXAMPLES,
        model_flags=True,
    )
    parser.add_argument(
        "lines",
        nargs="+",
        metavar="LINE",
        help="a line, a YAML file, or the folder or GGUF file of a model",
    )
    parser.add_argument("--yaml", action="store_true", help="print the lines as YAML instead")
    arguments = parser.read(argv, ShowSettings)
    lines = arguments.options.lines
    specs, settings = together(lambda: read_lines(lines, arguments.flags), lambda: ShowSettings(**arguments.settings))
    if arguments.flags:
        lines = [str(spec) for spec in specs]
    if arguments.options.yaml:
        print("---\n".join(to_yaml(spec) for spec in specs), end="")
        return 0
    specs = [spec.resolve(size=settings.size, max_seq_len=settings.context) for spec in specs]
    facts = [_facts(line, spec, settings.context) for line, spec in zip(lines, specs)]
    show(arguments, facts, lambda: _print(facts))
    return 0


def _facts(line: str, spec: ModelSpec, context: int | None) -> dict[str, Any]:
    return {"line": line, "resolved": str(spec), **asdict(count(spec, context))}


def _print(facts: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    for each in facts:
        table.add_column(Text(each["line"]), justify="right", overflow="fold")
    parts = list(dict.fromkeys(part for each in facts for part in each["params_by_part"]))
    for part in parts:
        table.add_row(f"  {part}", *(quantity(each["params_by_part"].get(part, 0)) for each in facts))
    table.add_row(Text("parameters", style="bold"), *(f"{each['params']:,}" for each in facts), end_section=True)
    if any(each["active_params"] < each["params"] for each in facts):
        table.add_row("active for a token", *(f"{each['active_params']:,}" for each in facts), end_section=True)
    rows = {
        "forward FLOPs a token": "flops_per_token",
        "training FLOPs a token": "train_flops_per_token",
        "at a context of": "context",
    }
    for label, name in rows.items():
        table.add_row(label, *(quantity(each[name]) for each in facts))
    table.add_row("KV cache a token", *(quantity(each["kv_bytes_per_token"], "B") for each in facts))
    table.add_row("KV cache in all", *(quantity(each["kv_cache_bytes"], "B") for each in facts))
    console.print(table)
    for each in facts:
        console.print(Text(each["resolved"], style="dim"), soft_wrap=True)
