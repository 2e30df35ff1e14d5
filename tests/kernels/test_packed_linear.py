"""Weights of few bits: how far they may be from the matrix, and the packed kernels against the readable form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.kernels.packed_linear import linear, naive, packed

SCHEMES = ("int8", 32, 64, 128)
BF16 = 2.0**-8  # what rounding to bfloat16 may change, relatively, with room


def quantised(weight_NK: Tensor, scheme: str | int) -> tuple[Tensor, Tensor]:
    return naive.quantise_int8(weight_NK) if scheme == "int8" else naive.quantise_int4(weight_NK, int(scheme))


@given(
    n=st.integers(1, 9), k=st.integers(1, 150), scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 1e-30, 0.02, 1e4]), shift=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_no_weight_moves_by_more_than_half_a_step(
    n: int, k: int, scheme: str | int, seed: int, size: float, shift: float
) -> None:
    """Of any shape and size; a step is the range over 15, or the largest over 127, and scales are rounded besides."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = size * (torch.randn(n, k, generator=generator) + shift)
    codes, scales = quantised(weight_NK, scheme)
    error_NK = (naive.dequantise(codes, scales, k) - weight_NK).abs()
    largest_N1 = weight_NK.abs().amax(1, keepdim=True)
    if scheme == "int8":
        step_NK = (largest_N1 / 127).expand(n, k)
    else:
        step_NK = (scales[..., 0].float().repeat_interleave(int(scheme), 0)[:k]).T
    # A rounded zero moves a whole group, and a scale rounded down leaves the ends of the range outside.
    assert bool((error_NK <= 0.5 * step_NK + 2 * BF16 * largest_N1 + 1e-36).all())


@given(n=st.integers(1, 9), k=st.integers(1, 70), seed=st.integers(0, 9))
def test_codes_are_four_bits_two_a_byte(n: int, k: int, seed: int) -> None:
    codes_NK = torch.randint(0, 16, (n, 2 * k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    joined = naive.join_codes(codes_NK)
    assert joined.shape == (n, k)
    assert torch.equal(naive.split_codes(joined), codes_NK)


def test_a_group_of_one_number_is_kept_exactly_but_for_its_rounding() -> None:
    weight_NK = torch.tensor([[0.5] * 32 + [-0.25] * 32])
    assert torch.equal(naive.dequantise(*naive.quantise_int4(weight_NK, 32), 64), weight_NK)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 3, 30, 120])
@pytest.mark.parametrize("n", [64, 192])
def test_the_packed_kernels_compute_the_readable_product(scheme: str | int, rows: int, n: int) -> None:
    """Few rows go through the kernels, many through weights spread out: inputs are rounded to bfloat16 either way."""
    codes, scales = quantised(torch.randn(n, 256), scheme)
    if not packed.fits(codes, scales, 256):
        pytest.fail("this machine has no packed kernels for a shape that every x86 CPU serves")
    x = torch.randn(2, rows, 256)
    wanted = naive.linear(x.bfloat16().double(), codes, scales)
    given = linear(x, packed.pack(codes), scales, in_order=True)
    assert given.dtype == x.dtype
    assert given.shape == (2, rows, n)
    assert (given - wanted).norm() <= BF16 * wanted.norm()


# torch's own, as its compiler loads
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_compiled_is_the_readable_product_without_rounding(dtype: torch.dtype) -> None:
    codes, scales = quantised(torch.randn(192, 256), "int8")
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((1, 1, 256), (2, 1, 256)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            given = compiled(x, packed.pack(codes), scales, in_order=True)
        wanted = naive.linear(x.double(), codes, scales)
        assert given.dtype == dtype
        assert given.shape == wanted.shape
        exact = shape[0] == 1 and dtype == torch.float32
        assert (given - wanted).norm() <= (1e-6 if exact else BF16) * wanted.norm()


@pytest.mark.parametrize("scheme", ["int8", 32])
@pytest.mark.parametrize("n", [64, 192])
def test_packing_can_be_undone(scheme: str | int, n: int) -> None:
    codes, _ = quantised(torch.randn(n, 128), scheme)
    order = packed.pack(codes)
    assert order.shape == codes.shape
    assert order.is_contiguous()
    assert torch.equal(packed.unpack(order), codes)


@pytest.mark.parametrize(("n", "k", "scheme"), [(65, 64, 32), (64, 72, 32), (64, 40, "int8"), (64, 96, 64)])
def test_shapes_that_the_kernels_read_wrongly_are_not_given_to_them(n: int, k: int, scheme: str | int) -> None:
    """torch's int8 kernel reads past the end of rows that are no multiple of its vectors, and crashed."""
    assert not packed.fits(*quantised(torch.randn(n, k), scheme), k)


def test_gradients_reach_what_is_multiplied() -> None:
    codes, scales = naive.quantise_int4(torch.randn(64, 64), 32)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x, packed.pack(codes), scales, in_order=True).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, naive.dequantise(codes, scales, 64).sum(0).expand(3, 64))
