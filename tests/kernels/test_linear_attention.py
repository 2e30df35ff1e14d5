"""Linear attention's kernels: the definition against the formula, and every other form against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from recurrent_inputs import assert_same, in_pieces, log_decays, qkv, random, random_resets, situations
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from headwise.kernels import linear_attention as kernel
from headwise.kernels.linear_attention import FLOOR, chunked, naive, streamed

DECAYS = ["none", "constant", "head", "dimension"]


@pytest.mark.parametrize("decay", DECAYS)
def test_the_definition_is_the_sum_written_out_in_python(decay: str) -> None:
    B, H, K, T, E, D = 1, 4, 2, 5, 4, 3
    q, k, v = qkv(B, H, K, T)
    log_decay = log_decays(decay, B, K, T)
    y, state = naive.recurrent(q, k, v, log_decay=log_decay)
    for h in range(H):
        for i in range(T):
            expected = [0.0] * D
            for j in range(i + 1):
                for e in range(E):
                    kept = 1.0
                    for t in range(j + 1, i + 1):
                        if log_decay is not None:
                            at = log_decay[0, h // 2, min(t, log_decay.shape[2] - 1)]
                            kept *= math.exp((at[e] if at.dim() else at).item())
                    for d in range(D):
                        expected[d] += (q[0, h, i, e] * kept * k[0, h // 2, j, e] * v[0, h // 2, j, d]).item()
            assert y[0, h, i].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    torch.testing.assert_close(q[0, 0, -1] @ state[0, 0], y[0, 0, -1])


@given(situations(DECAYS, [1, 2, 16, 32, None]))
def test_all_forms_are_equal_in_every_situation(case: dict[str, Any]) -> None:
    B, H, K, T = (case[name] for name in "BHKT")
    q, k, v = qkv(B, H, K, T)
    decay = log_decays(case["decay"], B, K, T)
    state = random(B, K, 4, 3, seed=7).requires_grad_() if case["state"] else None
    resets = random_resets(B, T) if case["resets"] else None
    leaves = [x for x in (q, k, v, decay, state) if x is not None]
    more = {"log_decay": decay, "resets_BT": resets, "state_BKED": state}
    expected = naive.recurrent(q, k, v, **more)
    assert_same(chunked.chunked(q, k, v, **more, chunk=case["chunk"]), expected, leaves)
    assert_same(kernel.linear_attention(q, k, v, **more), expected, leaves)
    if state is None and case["decay"] != "dimension":
        y, scores = naive.parallel(q, k, v, log_decay=decay, resets_BT=resets)
        assert_same((y,), expected[:1], leaves)
        torch.testing.assert_close(scores @ v.repeat_interleave(H // K, 1), y)


@given(st.sampled_from([1, 2, 17, 64, 65, 130]), st.booleans(), st.integers(1, 3))
def test_the_bidirectional_sum_is_that_of_all_pairs(T: int, resets: bool, group: int) -> None:
    q, k, v = leaves = qkv(2, 2 * group, 2, T)
    starts = random_resets(2, T) if resets else None
    expected, scores = naive.parallel(q, k, v, resets_BT=starts, causal=False)
    assert_same((naive.bidirectional(q, k, v, resets_BT=starts),), (expected,), leaves)
    if starts is not None:
        assert_same((chunked.bidirectional(q, k, v, resets_BT=starts),), (expected,), leaves)
    if T == 130 and not resets:
        assert (scores != 0).all()


@given(situations(["none"], [1, 2, 16, 32]), st.sampled_from([1, 4, 64]))
def test_weights_that_sum_to_one(case: dict[str, Any], at_once: int) -> None:
    """All forms of the mean against the sum of values by weights that sum to 1, with gradients of state and state."""
    B, H, K, T = (case[name] for name in "BHKT")
    q, k, v = leaves = [x.detach().exp().requires_grad_() for x in qkv(B, H, K, T)]
    resets = random_resets(B, T) if case["resets"] else None
    expected, scores = naive.parallel(q, k, v, resets_BT=resets)
    expected = expected / scores.sum(-1, keepdim=True)
    assert_same(naive.normalised(q, k, v, resets_BT=resets)[:1], (expected,), leaves)
    state = random(B, K, 4, 4, seed=7).exp().requires_grad_() if case["state"] else None
    every = leaves + ([] if state is None else [state])
    more = {"resets_BT": resets, "state_BKED": state}
    whole = naive.normalised(q, k, v, **more)
    assert_same(chunked.normalised(q, k, v, **more), whole, every)
    assert_same(kernel.normalised(q, k, v, **more), whole, every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "AT_ONCE", at_once)
        assert_same(streamed.normalised(q, k, v, **more, chunk=case["chunk"]), whole, every)


def test_a_query_that_shares_next_to_no_feature_with_any_key_is_divided_by_a_constant() -> None:
    """So one that shares none gets zeros; the constant has no gradient."""
    q, k, v = (x.detach().abs() for x in qkv(1, 2, 1, 70))
    q[:, :, 3], k[:, :, :2] = 0, 0
    q[:, :, 5] *= 1e-14
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y, state = kernel.normalised(q, k, v)
    assert (y[:, :, [0, 1, 3]] == 0).all()
    assert_same((y, state), naive.normalised(q, k, v), leaves)


def test_keys_and_values_of_the_bidirectional_mean_count_once() -> None:
    q, k, v = leaves = [x.detach().abs().requires_grad_() for x in qkv(2, 4, 2, 70)]
    for resets in (None, random_resets(2, 70)):
        sums, scores = naive.parallel(q, k, v, resets_BT=resets, causal=False)
        expected = (sums / scores.sum(-1, keepdim=True),)
        assert_same((kernel.bidirectional(q, k, v, resets_BT=resets),), expected, leaves)


@given(st.sampled_from(DECAYS), st.integers(1, 99), st.booleans())
def test_a_text_in_two_pieces_is_the_text(decay: str, cut: int, resets: bool) -> None:
    B, H, K, T = 2, 2, 1, 100
    q, k, v = qkv(B, H, K, T)
    log_decay, starts = log_decays(decay, B, K, T), random_resets(B, T) if resets else None
    expected, last = chunked.chunked(q, k, v, log_decay=log_decay, resets_BT=starts)
    pieces = in_pieces(kernel.linear_attention, [q, k, v], cut, log_decay, starts)
    torch.testing.assert_close(pieces, (expected, last), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_passes_a_reset_not_even_a_bit(decay: str) -> None:
    B, H, K, T, start = 1, 2, 2, 200, 77
    q, k, v = (x.detach().float() for x in qkv(B, H, K, T))
    log_decay = log_decays(decay, B, K, T)
    log_decay = log_decay.detach().float() if log_decay is not None else None
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[:, start] = True
    y, state = chunked.chunked(q, k, v, log_decay=log_decay, resets_BT=resets)
    k[:, :, :start] *= -3e4
    v[:, :, :start] += 1e6
    changed, changed_state = chunked.chunked(q, k, v, log_decay=log_decay, resets_BT=resets)
    assert torch.equal(changed[:, :, start:], y[:, :, start:])
    assert torch.equal(changed_state, state)
    assert not torch.equal(changed[:, :, :start], y[:, :, :start])


@pytest.mark.parametrize("decay", ["head", "dimension"])
@pytest.mark.parametrize("resets", [False, True])
def test_the_strongest_decay_leaves_all_numbers_finite_and_right(decay: str, resets: bool) -> None:
    """Every token at the floor: exponentials of a chunk reach e^80 and, above the diagonal, infinity."""
    B, H, K, T = 1, 2, 2, 100
    starts = random_resets(B, T) if resets else None
    found = []
    for dtype, form in ((torch.float64, naive.recurrent), (torch.float32, chunked.chunked)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv(B, H, K, T))
        shape = (B, K, T, 4) if decay == "dimension" else (B, K, T)
        log_decay = torch.full(shape, FLOOR, dtype=dtype, requires_grad=True)
        y, state = form(q, k, v, log_decay=log_decay, resets_BT=starts)
        grads = torch.autograd.grad((y * y).sum() + state.sum(), [q, k, v, log_decay])
        found.append([x.double() for x in (y, state, *grads)])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_one_strong_decay_does_not_blur_the_weak_ones_after_it() -> None:
    """Sums of logarithms in float32 would: −1000 and a hundredth share no bits there."""
    q, k, v = (x.detach().abs() for x in qkv(1, 1, 1, 64))
    log_decay = torch.full((1, 1, 64), -0.01, dtype=torch.float64)
    log_decay[..., 3] = -1e4
    exact, _ = naive.recurrent(q, k, v, log_decay=log_decay)
    ours, _ = chunked.chunked(q.float(), k.float(), v.float(), log_decay=log_decay.float())
    torch.testing.assert_close(ours.double(), exact, atol=0, rtol=1e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_definition_has_the_gradients_of_its_values(decay: str) -> None:
    q, k, v = qkv(2, 2, 1, 5)
    log_decay, state = log_decays(decay, 2, 1, 5), random(2, 1, 4, 3).requires_grad_()
    resets = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)

    def recurrent(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *decay: Tensor) -> tuple[Tensor, Tensor]:
        log_decay = decay[0] if decay else None
        return naive.recurrent(q, k, v, log_decay=log_decay, resets_BT=resets, state_BKED=state)

    assert torch.autograd.gradcheck(recurrent, (q, k, v, state, *([] if log_decay is None else [log_decay])))


@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_compile_to_one_graph(decay: str) -> None:
    B, H, K, T = 1, 2, 1, 40
    q, k, v = qkv(B, H, K, T)
    shared = {"log_decay": log_decays(decay, B, K, T), "resets_BT": random_resets(B, T), "chunk": 16}
    torch._dynamo.reset()
    compiled = torch.compile(chunked.chunked, backend="aot_eager_default_partitioner", fullgraph=True)
    assert_same(compiled(q, k, v, **shared), chunked.chunked(q, k, v, **shared), [q, k, v])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 70])
def test_a_state_stays_in_float32(dtype: torch.dtype, T: int) -> None:
    q, k, v = (x.detach().to(dtype) for x in qkv(1, 2, 1, T))
    y, state = kernel.linear_attention(q, k, v)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    exact, _ = naive.recurrent(q.float(), k.float(), v.float())
    torch.testing.assert_close(y, exact.to(dtype), atol=0, rtol=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel.linear_attention(q, k, v)[1], state)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("resets", [False, True])
def test_time_and_memory_grow_with_the_length(decay: str, resets: bool) -> None:
    def cost(T: int) -> tuple[int, int]:
        q, k, v = qkv(1, 1, 1, T)
        starts = random_resets(1, T) if resets else None
        with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
            y, _ = chunked.chunked(q, k, v, log_decay=log_decays(decay, 1, 1, T), resets_BT=starts)
            y.sum().backward()
        return largest.numel, counter.get_total_flops()

    (short, few), (long, many) = cost(4096), cost(8192)  # whole groups of chunks
    assert long == 2 * short
    assert many <= 2 * few
