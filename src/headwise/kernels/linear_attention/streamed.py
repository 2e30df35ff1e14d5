"""Linear attention without decay on a CPU, its weights brought to a sum of 1: `chunked` with a backward pass by hand.

A few chunks at a time go all the way from features to outputs, so that what lies between stays in the processor's
caches; autograd would write each of those tensors to memory for the whole length, and read it back. Kept for the
backward pass are the inputs, the outputs, the sums of the weights n, and the state before every chunk; scores are made
anew. With V' = [V, 1], a chunk's scores A, the state S before it, and dS, the gradient of the state after it,

    y_i = Σ_j A_ij v_j / n_i      G_i = [dy_i, −dy_i·y_i] / n_i      dA = tril(G V'ᵀ)
    dQ = dA K + G Sᵀ      dK = dAᵀ Q + V' dSᵀ      dV' = Aᵀ G + K dS      dS ← dS + Qᵀ G

with the factors of `kernels/chunks.py` where the state starts anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from headwise.kernels.chunks import Reach, decays, grouped, over_chunks, scaled, ungrouped, without_autocast
from headwise.kernels.linear_attention.chunked import CHUNK
from headwise.kernels.linear_attention.naive import LEAST, with_one

AT_ONCE = 32  # chunks times heads: each of their tensors is half a MiB at 64 features


def normalised(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `naive.normalised`, in float32 or float64; differentiable once."""
    return over_chunks(_step, (q_BHTE, k_BKTE, v_BKTD), None, resets_BT, state_BKED, chunk)


def _step(
    xs: tuple[Tensor, ...], log_decay: Tensor | None, resets_BT: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    q, k, v = xs
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3] + 1)
    y, state = _Normalised.apply(q, k, v, state, decays(log_decay, resets_BT, chunk, k.dtype), chunk)
    return y, state


class _Normalised(torch.autograd.Function):
    """Whole chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, factors: Reach | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        (B, H, T, _), D = q.shape, v.shape[3]
        y, total = _like(q, D), q.new_empty(B, H, T, 1)
        states = []
        for here in _spans(q, chunk):
            q_rows, k_rows, v_rows = _rows(q, k, v, here, chunk)
            pair, reach, tail, carry = _of(factors, here, chunk)
            added = (k_rows if tail is None else k_rows * tail).mT @ v_rows
            before, state = _handed_on(added, carry, state, range(added.shape[2]))
            states.append(before)
            sums = _causal(q_rows @ k_rows.mT, pair, chunk) @ v_rows
            sums = ungrouped(_plus(sums, scaled(q_rows, reach, chunk), before), chunk)
            torch.clamp_min(sums[..., D:], LEAST, out=total[:, :, here])
            torch.div(sums[..., :D], total[:, :, here], out=y[:, :, here])
        ctx.save_for_backward(q, k, v, y, total, *states)
        ctx.factors, ctx.chunk = factors, chunk
        return y, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy.device):  # which the caller of `backward` may have switched on again
            return _Normalised._gradients(ctx, dy, dstate)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, total, *states = ctx.saved_tensors
        chunk, D = ctx.chunk, v.shape[3]
        dq, dk, dv = (_like(x, x.shape[3]) for x in (q, k, v))
        for here, before in zip(reversed(_spans(q, chunk)), reversed(states)):
            q_rows, k_rows, v_rows = _rows(q, k, v, here, chunk)
            pair, reach, tail, carry = _of(ctx.factors, here, chunk)
            dsums = dy.new_empty(*dy.shape[:2], here.stop - here.start, D + 1)
            torch.div(dy[:, :, here], total[:, :, here], out=dsums[..., :D])
            torch.sum(dsums[..., :D] * y[:, :, here], -1, keepdim=True, out=dsums[..., D:])
            dsums[..., D:] *= -(total[:, :, here] > LEAST).to(dy.dtype)
            d_rows = grouped(dsums, k.shape[1], chunk)
            added = scaled(q_rows, reach, chunk).mT @ d_rows
            after, dstate = _handed_on(added, carry, dstate, reversed(range(added.shape[2])))
            scores = _causal(q_rows @ k_rows.mT, pair, chunk)
            dscores = _causal(d_rows @ v_rows.mT, pair, chunk)
            dq_rows, dk_rows, dv_rows = dscores @ k_rows, dscores.mT @ q_rows, scores.mT @ d_rows
            if tail is None:
                _plus(dk_rows, v_rows, after.mT)
                _plus(dv_rows, k_rows, after)
                _plus(dq_rows, d_rows, before.mT)
            else:
                dq_rows += scaled(d_rows @ before.mT, reach, chunk)
                dk_rows += tail * (v_rows @ after.mT)
                dv_rows += tail * (k_rows @ after)
            dq[:, :, here] = ungrouped(dq_rows, chunk)
            dk[:, :, here] = dk_rows.flatten(2, 3)
            dv[:, :, here] = dv_rows[..., :D].flatten(2, 3)
        return dq, dk, dv, dstate, None, None


def _spans(q_BHTE: Tensor, chunk: int) -> list[slice]:
    """The tokens that are worked on together, one span after another."""
    B, H, T, _ = q_BHTE.shape
    length = chunk * max(1, AT_ONCE // (B * H))
    return [slice(start, min(start + length, T)) for start in range(0, T, length)]


def _rows(q: Tensor, k: Tensor, v: Tensor, here: slice, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Their queries, keys and values with a one, in chunks, each in one piece, as matrix products want them."""
    k_rows, v_rows = (x[:, :, here].unflatten(2, (-1, chunk)) for x in (k, v))
    return grouped(q[:, :, here], k.shape[1], chunk).contiguous(), k_rows.contiguous(), with_one(v_rows)


def _of(factors: Reach | None, here: slice, chunk: int) -> tuple[Tensor | None, ...]:
    if factors is None:
        return (None,) * 4
    return tuple(factor[:, :, here.start // chunk : here.stop // chunk] for factor in factors)


def _handed_on(
    added_BKNED: Tensor, carry: Tensor | None, state_BKED: Tensor, order: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """The state that reaches each chunk, and the one that leaves the last, taking the chunks in this order."""
    reaching = torch.empty_like(added_BKNED)
    for n in order:
        reaching[:, :, n] = state_BKED
        state_BKED = added_BKNED[:, :, n] + (state_BKED if carry is None else carry[:, :, n] * state_BKED)
    return reaching, state_BKED


def _causal(scores: Tensor, pair: Tensor | None, chunk: int) -> Tensor:
    """As `causal_part`, in place where it can be."""
    if pair is not None:
        return scaled(scores, pair, chunk)
    scores.unflatten(3, (-1, chunk)).tril_()
    return scores


def _plus(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x += a @ b, in one pass."""
    x.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return x


def _like(x_BHTE: Tensor, D: int) -> Tensor:
    """[B,H,T,D], unset, a token's heads side by side in memory, which is how layers hand them over and want them."""
    B, H, T, _ = x_BHTE.shape
    return x_BHTE.new_empty(B, T, H, D).transpose(1, 2)
