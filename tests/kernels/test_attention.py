"""The attention kernels: the naive form against the formula, the fused form against the naive one, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

from headwise import kernels
from headwise.attention import Context
from headwise.kernels.attention import naive, sdpa
from headwise.model import build
from headwise.position.alibi import ALiBiEncoding, slopes
from headwise.registry import get_attention


def random_qkv(B: int, H: int, K: int, T: int, S: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B + 7 * H + 31 * T + S)
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, D)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_naive_form_is_the_formula_written_out_in_python() -> None:
    q, k, v = random_qkv(1, 4, 2, 3, 5, 2)
    y, weights = naive.attention(q, k, v, scale=0.5, causal=True)
    for h in range(4):
        for i in range(3):
            seen = range(5 - 3 + i + 1)
            scores = [math.exp(0.5 * sum(q[0, h, i, d] * k[0, h // 2, j, d] for d in range(2))) for j in seen]
            for d in range(2):
                expected = sum(s * v[0, h // 2, j, d] for s, j in zip(scores, seen)) / sum(scores)
                assert y[0, h, i, d].item() == pytest.approx(float(expected), rel=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 3, dtype=torch.float64))


@st.composite
def situations(draw: st.DrawFn) -> dict[str, object]:
    K = draw(st.integers(1, 3))
    T = draw(st.sampled_from([1, 2, 5, 255, 256, 257, 300]))
    causal = draw(st.booleans())
    return {
        "B": draw(st.integers(1, 2)),
        "K": K,
        "H": K * draw(st.integers(1, 3)),
        "T": T,
        "S": T + draw(st.sampled_from([0, 0, 1, 40])),
        "causal": causal,
        "window": draw(st.none() | st.integers(1, 400)),
        "segments": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "bool", "float", "row"])),
        "alibi": draw(st.booleans()),
    }


@given(situations())
def test_fused_form_equals_the_naive_one_in_every_situation(case: dict[str, int]) -> None:
    B, H, K, T, S = (case[name] for name in "BHKTS")
    q, k, v = (t.requires_grad_() for t in random_qkv(B, H, K, T, S, 4))
    shared: dict[str, object] = {"scale": 0.7, "causal": bool(case["causal"]), "window": case["window"]}
    if case["segments"]:
        keys = torch.arange(S).div(37, rounding_mode="floor").expand(B, S)
        shared["segments"] = (keys[:, S - T :], keys)
    if case["mask"] is not None:
        generator = torch.Generator().manual_seed(1)
        shared["attn_mask"] = {
            # A query's own key stays visible: a row with nothing to see has no softmax.
            "bool": (torch.rand(1, 1, T, S, generator=generator) > 0.3) | torch.eye(S, dtype=torch.bool)[S - T :],
            "float": torch.randn(1, H, T, S, generator=generator, dtype=torch.float64),
            "row": torch.randn(B, 1, 1, S, generator=generator, dtype=torch.float64),
        }[case["mask"]]  # type: ignore[index]
    encoding = ALiBiEncoding(torch.tensor(slopes(H), dtype=torch.float64), T, S)
    bias = {"bias_HTS": encoding.bias(q, 0, T)} if case["alibi"] else {}
    expected, _ = naive.attention(q, k, v, **shared, **bias)  # type: ignore[arg-type]
    if case["alibi"]:
        bias = {"bias_factors": encoding.bias_factors(q)} if case["causal"] else {"bias_rows": encoding.bias}
    actual = sdpa.attention(q, k, v, **shared, **bias)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (actual, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


WIDTHS = "d_model=16, n_layers=1, n_heads=2, vocab_size=11, max_seq_len=2048"


@pytest.mark.parametrize(
    "fields",
    [
        "position=none",
        "attention=mqa",
        "position=rope",
        "position=alibi",
        "position=alibi, attention=mqa",
        "attention=window(64)",
        "attention=w2",
        "attention=w2(sigma_dim=head_dim, tau=head, kv_heads=1), position=alibi",
        "attention=mla",
        "attention=mla(v_head_dim=24)",
        "architecture=encoder, position=alibi",
    ],
)
@pytest.mark.parametrize("segmented", [False, True])
def test_no_tensor_of_length_by_length_is_made_in_training(fields: str, segmented: bool) -> None:
    model, T = build(f"llama({WIDTHS}, {fields})"), 2048
    segments = torch.arange(T).div(1000, rounding_mode="floor")[None] if segmented else None
    with LargestTensor() as largest:
        model(torch.zeros(1, T, dtype=torch.long), segments=segments).sum().backward()
    # Blocks of rows hold at most ROWS × T numbers a head.
    assert largest.numel <= 2 * sdpa.ROWS * T, f"{largest.numel} numbers in one tensor; {T * T} is T×T"
    with torch.no_grad(), kernels.naive(), LargestTensor() as dense:
        model(torch.zeros(1, T, dtype=torch.long), segments=segments)
    assert dense.numel >= T * T, "the measure must see a score matrix where there is one"


def test_window_costs_by_its_width_not_by_the_length() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(T: int) -> int:
        attention = get_attention("window", d_model=16, n_heads=2, window=64)
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(1, T, 16), context=Context(causal=True))
        return counter.get_total_flops()

    assert flops(4096) <= 2.2 * flops(2048)


def test_weights_on_request_are_those_applied() -> None:
    attention = get_attention("gqa", d_model=16, n_heads=4, kv_heads=2)
    x = torch.randn(2, 7, 16)
    out, none = attention(x, context=Context(causal=True))
    same, weights = attention(x, context=Context(causal=True), return_attention_weights=True)
    assert none is None
    torch.testing.assert_close(same, out)
    assert weights.shape == (2, 4, 7, 7)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))


def test_dropout_acts_in_training_only() -> None:
    attention = get_attention("softmax", d_model=16, n_heads=2, dropout=0.5)
    x = torch.randn(1, 9, 16)
    assert not torch.equal(attention(x)[0], attention(x)[0])
    attention.eval()
    assert torch.equal(attention(x)[0], attention(x)[0])
