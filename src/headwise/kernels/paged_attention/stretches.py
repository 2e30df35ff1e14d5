"""Paged attention on a CPU, where a gathered copy of the cache would triple the memory that is read.

Blocks of a sequence that lie side by side in the pool are one stretch of keys, which is looked at in place: a sequence
that grew alone is a single stretch and costs what a contiguous cache does. Of several stretches, short ones are put
together to pieces of at most `PIECE` tokens, since a call for each costs more than the copy of one; the pieces are met
one by one (`kernels.attention.pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.kernels.attention import block, pieces, sdpa

Stretch = tuple[int, int]  # slots start…stop−1 of the pool; slot = block · block_size + offset
PIECE = 1024
ROWS = 64  # queries that meet several stretches at once: bounds their scores to ROWS × S


def stretches_of(block_table: Sequence[int], length: int, block_size: int) -> list[Stretch]:
    """Where the first `length` tokens of a block table lie, neighbours joined."""
    found: list[Stretch] = []
    for at in range(0, length, block_size):
        start = block_table[at // block_size] * block_size
        stop = start + min(block_size, length - at)
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def cut(stretches: Sequence[Stretch], low: int, high: int) -> list[Stretch]:
    """The part that holds tokens low…high−1."""
    found, at = [], 0
    for start, stop in stretches:
        first, last = max(start, start + low - at), min(stop, start + high - at)
        if first < last:
            found.append((first, last))
        at += stop - start
    return found


def put_together(stretches: Sequence[Stretch]) -> list[list[Stretch]]:
    """Neighbours in the text, as many as `PIECE` tokens have room for; a longer stretch stands alone."""
    pieces: list[list[Stretch]] = []
    room = 0
    for start, stop in stretches:
        room -= stop - start
        if room < 0:
            pieces.append([])
            room = PIECE - (stop - start)
        pieces[-1].append((start, stop))
    return pieces


def take(held_KN: Tensor, piece: Sequence[Stretch]) -> Tensor:
    """The slots of a piece, [K,n,·]: where they lie, if that is in one stretch."""
    parts = [held_KN[:, start:stop] for start, stop in piece]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def attention(
    q_HTE: Tensor,
    k_KNE: Tensor,
    v_KND: Tensor,
    stretches: Sequence[Stretch],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    bias_factors: tuple[Tensor, Tensor] | None = None,
    key_bias_HS: Tensor | None = None,
) -> Tensor:
    """One row's queries [H,T,E] against its tokens in a pool of N slots, keys [K,N,E] and values [K,N,D].

    Returns:
        [H,T,D].
    """
    T, S = q_HTE.shape[1], sum(stop - start for start, stop in stretches)
    low = pieces.first_seen(T, S, window)
    seen = put_together(cut(stretches, low, S))
    scores: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_H": sink_H}
    if len(seen) == 1:
        mask = None
        q, k, v = q_HTE[None], take(k_KNE, seen[0])[None], take(v_KND, seen[0])[None]
        if key_bias_HS is not None:
            mask = key_bias_HS[:, None, low:S]
        if bias_factors is not None:
            bias_factors = bias_factors[0], bias_factors[1][..., low:S, :]
        if T > 1:
            return sdpa.attention(q, k, v, window=window, bias_factors=bias_factors, attn_mask=mask, **scores)[0]
        if bias_factors is not None:  # for one query cheaper than a dimension more of all keys
            mask = (bias_factors[0] @ bias_factors[1].transpose(-1, -2)).to(q.dtype)
        return block.attend(q, k, v, None if mask is None else mask[None], **scores)[0]
    outputs = []
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        high = S - T + stop
        first = pieces.first_seen(stop - start, high, window)
        found, factors = put_together(cut(stretches, first, high)), None
        if bias_factors is not None:
            factors = bias_factors[0][..., start:stop, :], bias_factors[1]
        outputs.append(
            pieces.attention(
                q_HTE[None, :, start:stop],
                (take(k_KNE, piece) for piece in found), (take(v_KND, piece) for piece in found), first, high,
                window=window, bias_factors=factors,
                mask_HTS=None if key_bias_HS is None else key_bias_HS[:, None, first:high], **scores,
            )[0]
        )  # fmt: skip
    return torch.cat(outputs, 1)
