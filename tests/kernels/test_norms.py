"""Norms and activations against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from headwise.registry import get_ffn, get_norm


def test_rmsnorm_has_unit_mean_square_and_no_mean_taken_out() -> None:
    x = 3 + 10 * torch.randn(50, 64, dtype=torch.float64)
    y = get_norm("rmsnorm", d_model=64).double()(x)
    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(y, x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt())


def test_layernorm_has_zero_mean_and_unit_variance() -> None:
    x = 3 + 10 * torch.randn(50, 64, dtype=torch.float64)
    y = get_norm("layernorm", d_model=64).double()(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(50, dtype=torch.float64))
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(50, dtype=torch.float64))


def test_rmsnorm_in_half_precision_is_computed_in_float32() -> None:
    """300² overflows float16; in float32 it does not."""
    y = get_norm("rmsnorm", d_model=64).half()(torch.full((1, 64), 300.0, dtype=torch.float16))
    torch.testing.assert_close(y, torch.ones(1, 64, dtype=torch.float16))


def test_weights_stored_as_their_distance_from_one() -> None:
    plain, offset = (get_norm("rmsnorm", d_model=64, unit_offset=each) for each in (False, True))
    x = torch.randn(50, 64)
    assert torch.equal(plain(x), offset(x))
    torch.nn.init.normal_(offset.weight)
    torch.testing.assert_close(offset(x), plain(x) * (1 + offset.weight))
    half = offset.bfloat16()(x.bfloat16())
    torch.testing.assert_close(half, (plain(x.bfloat16().float()) * (1 + offset.weight.float())).bfloat16())


def test_layernorm_without_bias_has_none() -> None:
    assert get_norm("layernorm", d_model=8, bias=False).bias is None


GATES = {
    "glu": torch.sigmoid,
    "bilinear": lambda x: x,
    "reglu": F.relu,
    "geglu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "geglu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "swiglu": lambda x: x * torch.sigmoid(x),
}


@pytest.mark.parametrize("kind", GATES)
def test_gated_feed_forwards_are_their_formula(kind: str) -> None:
    ffn = get_ffn(kind, d_model=12).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = (GATES[kind](x @ ffn.w_gate.weight.T) * (x @ ffn.w_up.weight.T)) @ ffn.w_out.weight.T
    torch.testing.assert_close(ffn(x), expected)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("gelu", GATES["geglu"]),
        ("gelu_tanh", GATES["geglu_tanh"]),
        ("silu", GATES["swiglu"]),
        ("relu2", lambda x: x.clamp(min=0) ** 2),
    ],
)
def test_plain_feed_forward_is_its_formula(activation: str, formula: object) -> None:
    ffn = get_ffn("mlp", d_model=12, activation=activation, bias=True).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = F.linear(formula(F.linear(x, ffn.w_in.weight, ffn.w_in.bias)), ffn.w_out.weight, ffn.w_out.bias)  # type: ignore[operator]
    torch.testing.assert_close(ffn(x), expected)


def test_gated_width_keeps_the_parameters_of_a_plain_one() -> None:
    """8d/3 rounded up to a multiple of 8: 1024 at d = 384 (document 001)."""
    assert get_ffn("swiglu", d_model=384).w_out.in_features == 1024
    plain, gated = (sum(p.numel() for p in get_ffn(k, d_model=384).parameters()) for k in ("mlp", "swiglu"))
    assert plain == gated
