"""The same in chunks: matrix products inside a chunk, one state handed from chunk to chunk. O(T) in time and memory.

What the carried state gives a chunk, what its own tokens give one another, and what it hands on:

    y_i = reach_i q_i S + Σ_{j ≤ i} pair_ij (q_i·k_j) v_j        S' = carry S + Σ_j tail_j k_j v_jᵀ

(`kernels/chunks.py` has the four factors).

With a decay for each key dimension (GLA) pair_ij differs from dimension to dimension, so it goes into queries and keys:
q_i e^(b_i) and k_j e^(−b_j). Both exponentials must be float32 numbers, which is why a chunk is short there and a
token's log decay has a floor (`FLOOR`): e^(±16·5) is within range. Counting b from the chunk's middle would allow twice
the length, and let a later token change the rounding of an earlier one's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.kernels.chunks import causal_part, decays, grouped, over_chunks, runs, scaled, ungrouped
from headwise.kernels.linear_attention.naive import divided, with_one

CHUNK = 64  # fastest of 32, 64, 128, 256 at 64 dimensions a head: states and scores cost alike
VECTOR_CHUNK = 16
FLOOR = -5.0
GROUP = 64  # chunks whose states are summed at once


def chunked(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    log_decay: Tensor | None = None,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.recurrent`, in float32 or float64; a decay a key dimension must not be under e^FLOOR.

    Args:
        chunk: tokens in a chunk; None: what measured fastest.
    """
    by_dimension = log_decay is not None and log_decay.dim() == 4
    chunk = chunk or (VECTOR_CHUNK if by_dimension else CHUNK)
    form = _by_dimension if by_dimension else _by_head
    return over_chunks(form, (q_BHTE, k_BKTE, v_BKTD), log_decay, resets_BT, state_BKED, chunk)


def normalised(
    q_BHTE: Tensor,
    k_BKTE: Tensor,
    v_BKTD: Tensor,
    *,
    resets_BT: Tensor | None = None,
    state_BKED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive.normalised`, in float32 or float64."""
    y_BHTD, state = chunked(q_BHTE, k_BKTE, with_one(v_BKTD), resets_BT=resets_BT, state_BKED=state_BKED)
    return divided(y_BHTD), state


def _in_chunks(xs: tuple[Tensor, ...], chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    q_BHTE, k_BKTE, v_BKTD = xs
    k_BKNcE, v_BKNcD = (x.unflatten(2, (-1, chunk)) for x in (k_BKTE, v_BKTD))
    return grouped(q_BHTE, k_BKTE.shape[1], chunk), k_BKNcE, v_BKNcD


def _by_head(
    xs: tuple[Tensor, ...], log_decay: Tensor | None, resets_BT: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """No decay, or one a head."""
    q, k, v = _in_chunks(xs, chunk)
    pair, reach, tail, carry = decays(log_decay, resets_BT, chunk, k.dtype) or (None,) * 4
    added = (k if tail is None else k * tail).transpose(-1, -2) @ v
    before, state = handed_on(added, carry, state)
    scores = causal_part(q @ k.transpose(-1, -2), pair, chunk)
    return ungrouped(scores @ v + scaled(q, reach, chunk) @ before, chunk), state


def _by_dimension(
    xs: tuple[Tensor, ...], log_decay: Tensor | None, resets_BT: Tensor | None, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """A decay a key dimension."""
    assert log_decay is not None
    q, k, v = _in_chunks(xs, chunk)
    # A product with ones below the diagonal: `cumsum` would turn the tensor round twice for its gradient.
    b_BKNcE = k.new_ones(chunk, chunk).tril() @ log_decay.unflatten(2, (-1, chunk))
    end = b_BKNcE[:, :, :, -1:]
    read = scaled(q, b_BKNcE.exp(), chunk)
    scores = read @ (k * (-b_BKNcE).exp()).transpose(-1, -2)
    carry, tail = end.transpose(-1, -2).exp(), (end - b_BKNcE).exp()
    if resets_BT is None:
        # Selected, not multiplied: above the diagonal the exponentials may overflow.
        scores = causal_part(scores, None, chunk)
    else:
        found = runs(resets_BT, chunk)
        apart = scores.unflatten(3, (-1, chunk)).masked_fill(~found.pair.unsqueeze(3), 0)
        scores = apart.flatten(3, 4)
        carry, tail, read = carry * found.carry, tail * found.tail, scaled(read, found.reach, chunk)
    added = (k * tail).transpose(-1, -2) @ v
    before, state = handed_on(added, carry, state)
    return ungrouped(scores @ v + read @ before, chunk), state


def handed_on(added_BKNED: Tensor, carry: Tensor | None, state_BKED: Tensor | None) -> tuple[Tensor, Tensor]:
    """S_{n+1} = carry_n S_n + added_n: the state before every chunk [B,K,N,E,D], and the last one [B,K,E,D].

    Without decay these are sums over the chunks before, made by one product with a triangle of ones for `GROUP` chunks
    at a time: `cumsum` is slower, for its gradient turns the tensor round twice, and so is a loop.
    """
    state = torch.zeros_like(added_BKNED[:, :, 0]) if state_BKED is None else state_BKED
    N, shape = added_BKNED.shape[2], added_BKNED.shape[3:]
    states: list[Tensor] = []
    if carry is None:
        for added in added_BKNED.split(GROUP, 2):
            below = torch.ones(added.shape[2], added.shape[2], dtype=added.dtype, device=added.device).tril(-1)
            before = (below @ added.flatten(3)).unflatten(3, shape)
            states.append(before if state_BKED is None and not states else before + state[:, :, None])
            state = states[-1][:, :, -1] + added[:, :, -1]
        return torch.cat(states, 2) if len(states) > 1 else states[0], state
    for factor, added in zip(carry.expand(*carry.shape[:2], N, -1, -1).unbind(2), added_BKNED.unbind(2)):
        states.append(state)
        state = torch.addcmul(added, factor, state)
    return torch.stack(states, 2), state


def bidirectional(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, *, resets_BT: Tensor) -> Tensor:
    """As `naive.bidirectional`, in linear time: what comes up to a token and what comes from it on, itself once."""
    # Against the reading order a run begins at its last token: behind it, the next one begins.
    ends_BT = torch.cat([torch.zeros_like(resets_BT[:, :1]), resets_BT[:, 1:].flip(1)], 1)
    y_BHTD, _ = chunked(q_BHTE, k_BKTE, v_BKTD, resets_BT=resets_BT)
    back_BHTD, _ = chunked(q_BHTE.flip(2), k_BKTE.flip(2), v_BKTD.flip(2), resets_BT=ends_BT)
    q_BKGTE = q_BHTE.unflatten(1, (k_BKTE.shape[1], -1))
    own_BKGT1 = (q_BKGTE * k_BKTE.unsqueeze(2)).sum(-1, keepdim=True)
    return y_BHTD + back_BHTD.flip(2) - (own_BKGT1 * v_BKTD.unsqueeze(2)).flatten(1, 2)
