"""Fields that all attention kinds share, each as the change of weights that it amounts to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headwise.attention import Attention, Context
from headwise.errors import SpecError
from headwise.model import build
from headwise.registry import get_attention
from headwise.spec import parse


def tokens(T: int = 40) -> Tensor:
    return torch.randn(2, T, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(kind: str, **fields: object) -> Attention:
    """A layer in float64 whose every parameter is drawn."""
    attention = get_attention(kind, d_model=32, n_heads=4, **fields).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return attention


KINDS = ["softmax", "window", "gated", "strided", "tva", "mla", "gla", "retention"]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_as_if_the_queries_were_larger(kind: str) -> None:
    needs = {"window": {"window": 9}, "strided": {"stride": 5}, "tva": {"rank": 3}}.get(kind, {})
    plain, scaled = (layer(kind, **needs, **more) for more in ({}, {"scale": 0.9}))
    scaled.load_state_dict(plain.state_dict())
    plain.wq.weight.mul_(0.9 / plain.scale)
    x = tokens()
    context = Context(causal=True)
    torch.testing.assert_close(scaled(x, context=context)[0], plain(x, context=context)[0])


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [True, "full"])
def test_queries_and_keys_are_normed_head_by_head_or_all_together(qk_norm: bool | str) -> None:
    attention, x = layer("softmax", kv_heads=2, qk_norm=qk_norm), tokens()
    q, k, _ = attention._heads(x, Context())
    for mine, wide, norm in ((q, attention.wq(x), attention.q_norm), (k, attention.wk(x), attention.k_norm)):
        parts = wide.unflatten(-1, (-1, 8)) if qk_norm is True else wide
        wanted = parts * (parts.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        torch.testing.assert_close(mine.transpose(1, 2).flatten(2), wanted.view_as(wide))


def test_norms_over_queries_and_keys_have_the_models_epsilon() -> None:
    model = build("llama(attention=softmax(qk_norm=true), norm=rmsnorm(eps=0.01))")
    assert model.stack.blocks[0].attention.q_norm.eps == 0.01
    with pytest.raises(SpecError, match=r"attention\.qk_norm: 'all' given; allowed: true, false, full"):
        parse("llama(attention=softmax(qk_norm=all))")


@pytest.mark.parametrize("kind", ["w2", "linear", "deltanet", "gated_deltanet"])
def test_kinds_without_a_scale_refuse_one(kind: str) -> None:
    with pytest.raises(SpecError, match=rf"attention\.scale: 0\.5 given, but {kind} does not multiply"):
        parse(f"llama(d_model=32, n_heads=4, attention={kind}(scale=0.5))")
