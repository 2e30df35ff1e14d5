"""The linear map by oneDNN: the same numbers as torch's, and only where nothing needs a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from headwise.kernels import linear as kernel
from headwise.kernels.linear import LARGE, linear
from headwise.linear import Linear


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN would be asked, also where torch has none."""
    made = []
    monkeypatch.setattr(kernel, "_pointwise", lambda x, weight, bias, *_: made.append(1) or F.linear(x, weight, bias))
    return made


@given(
    rows=st.sampled_from([(), (0,), (1,), (1, 1), (3, 1), (2, 0), (2, 5), (40,)]),
    n=st.sampled_from([1, 64, 333]),
    width=st.sampled_from([LARGE // 64, LARGE // 333 + 5, 7]),
    bias=st.booleans(),
    strided=st.sampled_from(["no", "weight", "x"]),
    seed=st.integers(0, 99),
)
def test_equals_torchs_product_for_any_shape_and_layout(rows, n, width, bias, strided, seed):
    torch.manual_seed(seed)
    weight = torch.randn(width, n).t() if strided == "weight" else torch.randn(n, width)
    x = torch.randn(*rows, 2 * width)[..., ::2] if strided == "x" else torch.randn(*rows, width)
    b = torch.randn(n) if bias else None
    with torch.inference_mode():
        ours, torchs = linear(x, weight, b), F.linear(x, weight, b)
    exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert ours.shape == torchs.shape
    assert (ours - exact).abs().sum() <= 3 * (torchs - exact).abs().sum() + 1e-6 * exact.abs().sum()


def test_large_maps_in_inference_ask_onednn(calls):
    layer = Linear(256, LARGE // 256)
    with torch.inference_mode():
        layer(torch.randn(2, 256))
    assert calls


@pytest.mark.parametrize("situation", ["training", "no_grad", "small", "double", "autocast", "bfloat16"])
def test_everywhere_else_torch_computes(calls, situation):
    layer = Linear(256, 4 if situation == "small" else LARGE // 256)
    x = torch.randn(2, 256)
    if situation in ("double", "bfloat16"):
        dtype = getattr(torch, situation.replace("double", "float64"))
        layer, x = layer.to(dtype), x.to(dtype)
    if situation == "training":
        layer(x).sum().backward()
        assert layer.weight.grad is not None
    elif situation == "no_grad":
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    else:
        with torch.inference_mode(), torch.autocast("cpu", enabled=situation == "autocast"):
            assert layer(x).dtype == (torch.bfloat16 if situation in ("autocast", "bfloat16") else layer.weight.dtype)
    assert not calls


def test_torchs_compiler_is_given_torchs_product():
    """It takes oneDNN's operator from its own patterns alone and stopped at a bare assertion where we had written it.
    In training it could not ask for the mode of inference, and each large map cut the program in two."""
    layer, programs = Linear(256, LARGE // 256), []

    def keep(program, _):
        programs.append(program.print_readable(print_output=False))
        return program.forward

    compiled = torch.compile(layer, backend=keep, fullgraph=True)
    with torch.inference_mode():
        compiled(torch.randn(2, 256))
    compiled(torch.randn(2, 256)).sum().backward()
    assert len(programs) == 2
    assert all("linear" in program and "mkldnn" not in program for program in programs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_in_a_compiled_step_is_the_same_product(monkeypatch, bias, dtype):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    weight, b = torch.randn(70, 33, dtype=dtype), torch.randn(70, dtype=dtype) if bias else None
    x = torch.randn(66, dtype=dtype)[::2].view(1, 1, 33)
    with torch.inference_mode():
        given = linear(x, weight, b)
    wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
    assert given.dtype == dtype
    torch.testing.assert_close(given, wanted.to(dtype))  # rounded once


def test_one_row_needs_torchs_product_where_gradients_or_autocast_are_wanted(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer, x = Linear(64, 64, bias=False), torch.randn(1, 64)
    with torch.no_grad(), torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.expand(64, 64))
