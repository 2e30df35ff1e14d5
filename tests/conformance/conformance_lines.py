"""The lines the conformance suite runs: every example of every registered mechanism, every order, every preset."""

from __future__ import annotations

import torch

from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.registry import FAMILIES
from headwise.spec import list_presets, parse

WIDTHS = "d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=1100"
ONE_HEAD = WIDTHS.replace("n_heads=4", "n_heads=1")
# What stands around a mechanism where the price of a line counts.
PLAIN = {"norm": "layernorm", "ffn": "mlp(relu)", "order": "parallel"}


def examples(family: str, *, last: bool = False) -> dict[type, list[str]]:
    """The examples of each registered kind of a family, or its bare name; kinds of one class stand together. `last` is
    the last of a kind alone, the one with most settings of its own.
    """
    registry, found = FAMILIES[family], dict[type, list[str]]()
    for kind in registry.list():
        spec = registry.get(kind).spec
        own = [e for e in spec.examples if registry.spec(parse_call(e)).kind == kind]
        found.setdefault(spec, []).extend((own or [kind])[-1 if last else 0 :])
    return found


def mechanism_lines(*families: str) -> list[str]:
    """One line for each example of each registered kind of some families, in a small Llama. Norms and feed-forwards see
    tokens one by one, so one head does beside them."""
    return [
        f"llama({WIDTHS if family in ('attention', 'position') else ONE_HEAD}, {family}={example})"
        for family in families
        for of_class in examples(family).values()
        for example in of_class
    ]


def stacked_lines(*families: str, last: bool = False) -> list[str]:
    """The same examples with those of one class as the layers of one model, for what costs much by the model."""
    lines = []
    for family in families:
        for of_class in examples(family, last=last).values():
            fields = {**PLAIN, family: of_class[0] if len(of_class) == 1 else f"pattern({', '.join(of_class)})"}
            widths = WIDTHS.replace("n_layers=2", f"n_layers={len(of_class)}")
            lines.append(f"llama({widths}, {', '.join(f'{name}={value}' for name, value in fields.items())})")
    return lines


def one_layer(line: str) -> str:
    """A line without the second of two layers that are alike: for what is a matter of one layer."""
    return line if "pattern(" in line else line.replace("n_layers=2", "n_layers=1")


def parse_call(text: str) -> object:
    from headwise.spec.grammar import read_value

    return read_value(text)


ORDERS = ("pre", "post", "sandwich", "reordered", "parallel", "parallel_two_norms")
COMBINED = [
    *(f"gpt2({WIDTHS}, order={order})" for order in ORDERS),
    f"llama({WIDTHS.replace('n_heads=4', 'n_heads=6')}, attention=softmax(head_dim=8), "
    "position=alibi(scale=0.4, rounded=true))",
    f"llama({WIDTHS}, attention=pattern(window(8), softmax), position=pattern(rope, none), ffn=pattern(swiglu, mlp), "
    "logit_softcap=4.0)",
    *(f"{preset}({WIDTHS})" for preset in list_presets() if parse(preset).architecture == "decoder"),
]
ENCODER = [f"gpt1({WIDTHS}, architecture=encoder)"]
ENCODER_DECODER = [
    f"transformer({WIDTHS})",
    f"llama({WIDTHS}, architecture=encoder_decoder, attention=gqa(kv_heads=2))",
]


def as_encoders(lines: list[str]) -> list[str]:
    return [line.replace("llama(", "llama(architecture=encoder, ", 1) for line in lines]


CAUSAL = [*mechanism_lines(*FAMILIES), *COMBINED]
BIDIRECTIONAL = [*as_encoders(mechanism_lines("attention", "position")), *ENCODER]
STACKED = [
    *stacked_lines(*FAMILIES),
    # What is compiled of a mechanism's settings is as above: here is what sees later tokens too.
    *as_encoders(stacked_lines("attention", "position", last=True)),
    *map(one_layer, [*COMBINED, *ENCODER, *ENCODER_DECODER]),
]


def model_of(line: str, *, std: float = 0.2) -> LanguageModel:
    """A small model with weights large enough that attention is far from uniform, in evaluation mode."""
    return build(parse(line).replace(init_std=std), seed=1).eval()


def tokens(*shape: int, seed: int = 0, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def extra_inputs(model: LanguageModel, batch: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """What an encoder–decoder reads."""
    return {"encoder_ids": tokens(batch, 23, seed=seed)} if model.spec.architecture == "encoder_decoder" else {}
