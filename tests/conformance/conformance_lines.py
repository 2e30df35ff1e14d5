"""The lines the conformance suite runs: every example of every registered mechanism, every order, every preset."""

from __future__ import annotations

import torch

from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.registry import FAMILIES
from headwise.spec import list_presets, parse

WIDTHS = "d_model=32, n_layers=2, n_heads=4, vocab_size=61, max_seq_len=1100"


def mechanism_lines(*families: str) -> list[str]:
    """One line for each example of each registered kind of some families, in a small Llama."""
    lines = []
    for family in families:
        registry = FAMILIES[family]
        for kind in registry.list():
            examples = [e for e in registry.get(kind).spec.examples if registry.spec(parse_call(e)).kind == kind]
            lines += [f"llama({WIDTHS}, {family}={example})" for example in examples or [kind]]
    return lines


def parse_call(text: str) -> object:
    from headwise.spec.grammar import read_value

    return read_value(text)


ORDERS = ("pre", "post", "sandwich", "reordered", "parallel", "parallel_two_norms")
CAUSAL = [
    *mechanism_lines(*FAMILIES),
    *(f"gpt2({WIDTHS}, order={order})" for order in ORDERS),
    f"llama({WIDTHS.replace('n_heads=4', 'n_heads=6')}, attention=softmax(head_dim=8), "
    "position=alibi(scale=0.4, rounded=true))",
    f"llama({WIDTHS}, attention=pattern(window(8), softmax), position=pattern(rope, none), ffn=pattern(swiglu, mlp), "
    "logit_softcap=4.0)",
    *(f"{preset}({WIDTHS})" for preset in list_presets() if parse(preset).architecture == "decoder"),
]
BIDIRECTIONAL = [
    *(line.replace("llama(", "llama(architecture=encoder, ", 1) for line in mechanism_lines("attention", "position")),
    f"gpt1({WIDTHS}, architecture=encoder)",
]
ENCODER_DECODER = [
    f"transformer({WIDTHS})",
    f"llama({WIDTHS}, architecture=encoder_decoder, attention=gqa(kv_heads=2))",
]


def model_of(line: str, *, std: float = 0.2) -> LanguageModel:
    """A small model with weights large enough that attention is far from uniform, in evaluation mode."""
    return build(parse(line).replace(init_std=std), seed=1).eval()


def tokens(*shape: int, seed: int = 0, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def extra_inputs(model: LanguageModel, batch: int, seed: int = 5) -> dict[str, torch.Tensor]:
    """What an encoder–decoder reads."""
    return {"encoder_ids": tokens(batch, 23, seed=seed)} if model.spec.architecture == "encoder_decoder" else {}
