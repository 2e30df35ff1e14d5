"""The delta rule's kernels: what the definition does to a state, and the chunked form against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from recurrent_inputs import assert_same, in_pieces, log_decays, qkv, random, random_resets, situations
from torch import Tensor

from headwise.kernels import delta_rule as kernel
from headwise.kernels.delta_rule import chunked, naive
from headwise.kernels.linear_attention import naive as linear

DECAYS = ["none", "constant", "head"]


def inputs(B: int, H: int, K: int, T: int, E: int = 4, D: int = 3) -> list[Tensor]:
    """Queries, unit keys, values, and step sizes of 0 … 1."""
    q, k, v = (x.detach() for x in qkv(B, H, K, T, E, D))
    beta = (2 * random(B, K, T, seed=3)).sigmoid()
    return [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta)]


@given(st.integers(0, 30), st.floats(0, 1))
def test_a_step_goes_beta_of_the_way_to_the_new_value(seed: int, beta: float) -> None:
    """And what is held under keys at right angles to it stays."""
    state, v = random(1, 1, 4, 3, seed=seed), random(1, 1, 1, 3, seed=seed + 1)
    k, other = torch.linalg.qr(random(4, 2, seed=seed + 2))[0].T[:, None, None, None]
    _, after = naive.recurrent(k, k, v, torch.full((1, 1, 1), beta, dtype=torch.float64), state_BKED=state)
    torch.testing.assert_close(k @ after, (1 - beta) * (k @ state) + beta * v)
    torch.testing.assert_close(other @ after, other @ state)


def test_with_keys_at_right_angles_it_is_linear_attention() -> None:
    q, _, v, beta = inputs(1, 2, 2, 4)
    k = torch.linalg.qr(random(2, 4, 4))[0][None]
    expected = linear.recurrent(q, k, v * beta[..., None])
    torch.testing.assert_close(naive.recurrent(q, k, v, beta), expected)
    torch.testing.assert_close(chunked.chunked(q, k, v, beta), expected)


@given(situations(DECAYS, [1, 2, 16, 32, 64]))
def test_both_forms_are_equal_in_every_situation(case: dict[str, Any]) -> None:
    B, H, K, T = (case[name] for name in "BHKT")
    leaves = inputs(B, H, K, T)
    more = {
        "log_decay": log_decays(case["decay"], B, K, T),
        "state_BKED": random(B, K, 4, 3, seed=7).requires_grad_() if case["state"] else None,
    }
    every = leaves + [x for x in more.values() if x is not None]
    more["resets_BT"] = random_resets(B, T) if case["resets"] else None
    expected = naive.recurrent(*leaves, **more)
    assert_same(chunked.chunked(*leaves, **more, chunk=case["chunk"]), expected, every)
    assert_same(kernel.delta_rule(*leaves, **more), expected, every)


@given(st.sampled_from(DECAYS), st.integers(1, 99), st.booleans())
def test_a_text_in_two_pieces_is_the_text(decay: str, cut: int, resets: bool) -> None:
    B, H, K, T = 2, 2, 1, 100
    xs = inputs(B, H, K, T)
    log_decay, starts = log_decays(decay, B, K, T), random_resets(B, T) if resets else None
    expected, last = chunked.chunked(*xs, log_decay=log_decay, resets_BT=starts)
    pieces = in_pieces(kernel.delta_rule, xs, cut, log_decay, starts)
    torch.testing.assert_close(pieces, (expected, last), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_passes_a_reset_not_even_a_bit(decay: str) -> None:
    B, H, K, T, start = 1, 2, 2, 200, 77
    q, k, v, beta = (x.detach().float() for x in inputs(B, H, K, T))
    log_decay = log_decays(decay, B, K, T)
    log_decay = log_decay.detach().float() if log_decay is not None else None
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[:, start] = True
    y, state = chunked.chunked(q, k, v, beta, log_decay=log_decay, resets_BT=resets)
    v[:, :, :start] += 1e6
    changed, changed_state = chunked.chunked(q, k, v, beta, log_decay=log_decay, resets_BT=resets)
    assert torch.equal(changed[:, :, start:], y[:, :, start:])
    assert torch.equal(changed_state, state)
    assert not torch.equal(changed[:, :, :start], y[:, :, :start])


def test_equal_keys_and_strong_decays_leave_all_numbers_finite_and_right() -> None:
    """The same key at every token makes the triangular system as full as it gets; some tokens forget everything."""
    found = []
    for dtype, form in ((torch.float64, naive.recurrent), (torch.float32, chunked.chunked)):
        q, k, v, beta = (x.detach().to(dtype) for x in inputs(1, 2, 2, 150))
        xs = [x.contiguous().requires_grad_() for x in (q, k[:, :, :1].expand_as(k), v, torch.ones_like(beta))]
        log_decay = torch.full((1, 2, 150), -0.01, dtype=dtype)
        log_decay[..., ::20] = -1e4
        log_decay.requires_grad_()
        y, state = form(*xs, log_decay=log_decay)
        grads = torch.autograd.grad((y * y).sum() + state.sum(), [*xs, log_decay])
        found.append([x.double() for x in (y, state, *grads)])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_definition_has_the_gradients_of_its_values(decay: str) -> None:
    xs = inputs(2, 2, 1, 5)
    log_decay, state = log_decays(decay, 2, 1, 5), random(2, 1, 4, 3).requires_grad_()
    resets = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)

    def recurrent(
        q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *decay: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_decay = decay[0] if decay else None
        return naive.recurrent(q, k, v, beta, log_decay=log_decay, resets_BT=resets, state_BKED=state)

    assert torch.autograd.gradcheck(recurrent, (*xs, state, *([] if log_decay is None else [log_decay])))


@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_compile_to_one_graph(decay: str) -> None:
    xs = inputs(1, 2, 1, 40)
    shared = {"log_decay": log_decays(decay, 1, 1, 40), "resets_BT": random_resets(1, 40), "chunk": 16}
    torch._dynamo.reset()
    compiled = torch.compile(chunked.chunked, backend="aot_eager_default_partitioner", fullgraph=True)
    assert_same(compiled(*xs, **shared), chunked.chunked(*xs, **shared), xs)


@pytest.mark.parametrize("T", [1, 70])
def test_a_state_stays_in_float32(T: int) -> None:
    xs = [x.detach().bfloat16() for x in inputs(1, 2, 1, T)]
    y, state = kernel.delta_rule(*xs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernel.delta_rule(*xs)[1], state)
