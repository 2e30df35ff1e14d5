"""The attention kinds that keep a state: what they refuse, what they cache, and how each goes about its tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headwise.attention import Context
from headwise.attention.linear import FEATURES
from headwise.attention.recurrence import resets
from headwise.cache import RecurrentCache
from headwise.dims import Dims
from headwise.errors import HeadwiseError, SpecError
from headwise.kernels.linear_attention import FLOOR
from headwise.model import build
from headwise.registry import get_attention
from headwise.spec import count, parse

KINDS = ["linear", "retention", "gla", "deltanet", "gated_deltanet"]
WIDTHS = {"d_model": 16, "n_heads": 4}


def layer(kind: str, **fields: object) -> torch.nn.Module:
    return get_attention(kind, **WIDTHS, **fields).double().eval()


def x_of(T: int, B: int = 2) -> Tensor:
    return torch.randn(B, T, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_state_cannot_do_is_refused_in_one_line(kind: str) -> None:
    attention, x = layer(kind), x_of(3)
    with pytest.raises(HeadwiseError, match=f"{kind} takes no attn_mask"):
        attention(x, torch.zeros(3, 3))
    with pytest.raises(HeadwiseError, match=f"{kind} does no cross-attention"):
        attention(x, memory_BSC=x)
    with pytest.raises(SpecError, match=rf"position: alibi adds to scores, and {kind} has none"):
        parse(f"llama(d_model=16, n_heads=4, attention={kind}, position=alibi)")
    with pytest.raises(SpecError, match="has no attention weights to drop"):
        get_attention(kind, **WIDTHS, dropout=0.1)
    parse(f"llama(d_model=16, n_heads=4, attention={kind}, dropout=0.1)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_cache_is_one_state_in_float32_whatever_the_length(kind: str, kv_heads: int) -> None:
    spec = parse(f"llama(attention={kind}(kv_heads={kv_heads}), d_model=16, n_heads=4, n_layers=2, vocab_size=7)")
    model = build(spec, dtype=torch.bfloat16).eval()
    for T in (1, 40):
        cache = model.new_cache()
        with torch.no_grad():
            model(torch.zeros(1, T, dtype=torch.long), cache=cache)
        counts = count(spec, context=T)
        assert counts.kv_bytes_per_token == 0
        assert counts.kv_cache_bytes == cache.n_bytes
        for each in cache.layers:
            assert isinstance(each, RecurrentCache)
            assert each.state is not None
            assert {t.dtype for t in each.state} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_encoder_takes_the_mean_of_both_directions(kind: str) -> None:
    """Of what the state gives: norm and gate come after."""
    attention, x = layer(kind), x_of(9)
    attention.read_out = lambda y_BHTD, x_BTC: y_BHTD.transpose(1, 2).flatten(2)
    there = attention(x, context=Context(causal=True))[0]
    back = attention(x.flip(1), context=Context(causal=True))[0].flip(1)
    torch.testing.assert_close(attention(x)[0], (there + back) / 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURES)
def test_weights_of_linear_attention_are_those_applied(feature_map: str, causal: bool) -> None:
    attention, x = layer("linear", feature_map=feature_map, kv_heads=2), x_of(7)
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5]])
    context = Context(causal=causal, segments=(numbers, numbers))
    out, weights = attention(x, context=context, return_attention_weights=True)
    v_BHTD = attention.wv(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(attention.wo((weights @ v_BHTD).transpose(1, 2).flatten(2)), out)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    assert (weights >= 0).all()
    assert not weights[0, :, 3:, :3].any()
    if causal:
        assert torch.equal(weights.triu(1), torch.zeros_like(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_weights_returns_none(kind: str) -> None:
    assert (layer(kind)(x_of(3), return_attention_weights=True)[1] is None) == (kind != "linear")


def test_taylor_features_are_the_polynomial() -> None:
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)
    s = q @ k.T / 4
    torch.testing.assert_close(FEATURES["taylor"](q) @ FEATURES["taylor"](k).T, 1 + s + s**2 / 2)


@pytest.mark.parametrize("feature_map", FEATURES)
def test_keys_and_queries_far_from_zero_divide_by_no_zero(feature_map: str) -> None:
    attention = get_attention("linear", **WIDTHS, feature_map=feature_map)
    for size in (0.0, 1e3, -1e3):
        with torch.no_grad():
            attention.wq.weight.fill_(size)
            attention.wk.weight.fill_(size)
        assert attention(x_of(5).float().abs())[0].isfinite().all()


def test_heads_of_retention_forget_at_their_rates() -> None:
    attention = layer("retention")
    assert [math.exp(d) for d in attention.log_decays] == pytest.approx([1 - 2.0 ** (-5 - h) for h in range(4)])


def test_the_gate_of_gla_starts_near_one_and_ends_at_its_floor() -> None:
    attention, x = layer("gla", gate_rank=3), x_of(5)
    with torch.no_grad():
        attention.w_decay_out.bias.zero_()
        attention.w_decay_out.weight.zero_()
        assert attention.gates(x)[0].exp().unique().item() == pytest.approx(0.5 ** (1 / 16))
        attention.w_decay_out.bias.fill_(-1e4)
        assert attention.gates(x)[0].unique().item() == FLOOR
        assert attention(x)[0].isfinite().all()


def test_deltanet_keys_have_length_one() -> None:
    attention = layer("deltanet")
    key = attention.place(torch.randn(1, 4, 5, 4, dtype=torch.float64), Context().encoding)
    torch.testing.assert_close(key.norm(dim=-1), torch.ones(1, 4, 5, dtype=torch.float64), atol=1e-4, rtol=0)


def test_gated_deltanet_starts_with_heads_of_many_memories() -> None:
    attention = layer("gated_deltanet")
    with torch.no_grad():
        attention.w_alpha.weight.zero_()
    log_decay = attention.gates(x_of(1))[1][0, :, 0]
    torch.testing.assert_close(log_decay, -0.01 * torch.linspace(1, 16, 4, dtype=torch.float64), atol=1e-6, rtol=1e-5)


def test_a_state_begins_anew_where_the_segment_changes() -> None:
    every = torch.tensor([[-1, -1, 0, 0, 1, 0]])
    assert resets((every, every))[0].tolist() == [False, False, True, False, True, True]  # type: ignore[index]
    assert resets((every[:, 2:], every))[0].tolist() == [True, False, True, True]  # type: ignore[index]
    assert resets((every[:, 3:], every))[0].tolist() == [False, True, True]  # type: ignore[index]
    assert resets(None) is None


def test_dims_give_the_state_its_size() -> None:
    dims = Dims(d_model=64, n_heads=4)
    sizes = {
        "linear": 4 * 16 * 17,
        "linear(taylor)": 4 * 153 * 17,
        "linear(feature_dim=8, kv_heads=2)": 2 * 8 * 17,
        "retention": 4 * 16 * 16,
        "deltanet(head_dim=8)": 4 * 8 * 8,
    }
    for call, size in sizes.items():
        assert parse(f"llama(attention={call})").attention.state_numbers(dims) == size
