"""Fields of a whole model, each held against what it says it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.attention import Context
from headwise.errors import SpecError
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

WIDTHS = "d_model=32, n_layers=1, n_heads=4, vocab_size=61, max_seq_len=64, init_std=0.3"


def model_of(fields: str) -> LanguageModel:
    """A small Llama in float64 whose every parameter is drawn, norms too."""
    model = build(f"llama({WIDTHS}, {fields})", seed=1).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def ids() -> Tensor:
    return torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_logits_are_bent_by_the_soft_cap_and_no_further() -> None:
    plain, capped = model_of("order=pre"), model_of("logit_softcap=2.0")
    logits = plain(ids())
    assert logits.abs().max() > 4
    torch.testing.assert_close(capped(ids()), 2 * torch.tanh(logits / 2))
    assert parse("gpt2").logit_softcap is None


def parts(model: LanguageModel) -> tuple[Tensor, object, object, object]:
    """The embedded tokens, and the only block's attention, its norms and feed-forward."""
    block = model.stack.blocks[0]
    encoding = model.stack.positions[0].encode(torch.arange(20), 20, 8)

    def attend(x: Tensor) -> Tensor:
        return block.attention(x, context=Context(causal=True, encoding=encoding))[0]

    return model.embedding(ids()), block, attend, lambda x: model.head(model.stack.final_norm(x))


@torch.no_grad()
def test_parallel_parts_can_have_a_norm_each() -> None:
    model = model_of("order=parallel_two_norms")
    x, block, attend, finish = parts(model)
    x = x + attend(block.attention_norm(x)) + block.ffn(block.ffn_norm(x))
    torch.testing.assert_close(model(ids()), finish(x))
    with pytest.raises(SpecError, match="order: parallel_two_norms is for decoders and encoders; allowed: pre, post"):
        parse("transformer(order=parallel_two_norms)")


@torch.no_grad()
def test_reordered_norms_stand_behind_the_parts() -> None:
    model = model_of("order=reordered")
    x, block, attend, finish = parts(model)
    x = x + block.attention_norm(attend(x))
    x = x + block.ffn_norm(block.ffn(x))
    torch.testing.assert_close(model(ids()), finish(x))
