"""Patterns of blocks: each block of queries meets the blocks of keys on its list, copied side by side.

Blocks with lists of about one length go through the fused kernel together, as if they were sequences of a batch;
shorter lists are filled up with nothing. So time and memory are in proportion to the lists, not to T².
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.kernels.attention.block import attend
from headwise.kernels.segments import Pattern
from headwise.kernels.sparse_attention.naive import draws

# Blocks go through the kernel together where the shortest list has at least this share of the longest one's length.
ALIKE = 0.75


def bigbird(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    causal: bool,
    window: int,
    global_tokens: int,
    random_blocks: int,
    block_size: int,
    seed: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the pattern `naive.bigbird`; the queries are the last T of S positions (all, where not causal).

    Returns:
        [B,H,T,D].
    """
    T, S = q_BHTE.shape[2], k_BKSE.shape[2]
    if not causal and global_tokens >= S:
        return attend(q_BHTE, k_BKSE, v_BKSD, scale=scale, dropout=dropout)
    n_blocks = -(-S // block_size)
    linked: list[set[int]] = [set(draws(n, random_blocks, seed)) for n in range(n_blocks)]
    if not causal:
        for n in range(n_blocks):
            for m in draws(n, random_blocks, seed):
                linked[m].add(n)
    lists = []
    for n in range((S - T) // block_size, n_blocks):
        low = max(0, n * block_size - window + 1) // block_size
        high = n if causal else min(n_blocks - 1, ((n + 1) * block_size + window - 2) // block_size)
        at_start = range(min(high if causal else n_blocks - 1, (global_tokens - 1) // block_size) + 1)
        lists.append((linked[n], sorted({*range(low, high + 1), *at_start} - linked[n])))

    def near_or_global(i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() < window) | (j < global_tokens)

    y = attention(
        q_BHTE, k_BKSE, v_BKSD, [(sorted(whole), part) for whole, part in lists], near_or_global,
        block_size=block_size, causal=causal, scale=scale, dropout=dropout,
    )  # fmt: skip
    if causal or not global_tokens:
        return y
    first = attend(q_BHTE[:, :, :global_tokens], k_BKSE, v_BKSD, scale=scale, dropout=dropout)
    return torch.cat([first, y[:, :, global_tokens:]], 2)


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    lists: list[tuple[list[int], list[int]]],
    pattern: Pattern,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of each block of queries to the blocks on its list.

    Args:
        q_BHTE: queries, the last T of S positions.
        k_BKSE: keys.
        v_BKSD: values.
        lists: for each block that holds queries, in order: the blocks of keys it sees whole (as far as it is causal),
            and those where `pattern` says which. A query must see at least one key.
        pattern: which keys a query sees, by positions.

    Returns:
        [B,H,T,D].
    """
    (B, H, T, _), S, device = q_BHTE.shape, k_BKSE.shape[2], q_BHTE.device
    before = (S - T) % block_size if len(lists) > 1 else 0
    rows = block_size if len(lists) > 1 else T
    # Rows that fill up the first block and the last are copies of their neighbours as far as positions go.
    filled = F.pad(q_BHTE, (0, 0, before, len(lists) * rows - before - T))
    q_BHNRE = filled.unflatten(2, (len(lists), rows))
    i_NR = (torch.arange(len(lists) * rows, device=device) - before).clamp(0, T - 1).unflatten(0, (-1, rows)) + S - T

    sizes = [len(whole) + len(part) for whole, part in lists]
    order = sorted(range(len(lists)), key=sizes.__getitem__, reverse=True)
    groups: list[list[int]] = []
    for n in order:
        if not groups or sizes[n] < ALIKE * sizes[groups[-1][0]]:
            groups.append([])
        groups[-1].append(n)
    parts = []
    for group in groups:
        size = sizes[group[0]]
        chosen = [[*lists[n][0], *lists[n][1], *[-1] * (size - sizes[n])] for n in group]
        whole = [[True] * len(lists[n][0]) + [False] * (size - len(lists[n][0])) for n in group]
        block_NM1 = torch.tensor(chosen, device=device)[..., None]
        j_NW = (block_NM1 * block_size + torch.arange(block_size, device=device)).flatten(1)
        there = (j_NW >= 0) & (j_NW < S)
        i, j = i_NR[group, :, None], j_NW.clamp(0, S - 1)[:, None]
        mask_NRW = torch.tensor(whole, device=device).repeat_interleave(block_size, 1)[:, None] | pattern(i, j)
        mask_NRW = mask_NRW & there[:, None]
        if causal:
            mask_NRW = mask_NRW & (j <= i)
        q = _fold(q_BHNRE[:, :, group])
        k, v = (_fold(x.index_select(2, j.flatten()).unflatten(2, (len(group), -1))) for x in (k_BKSE, v_BKSD))
        y = attend(q, k, v, mask_NRW[:, None], scale=scale, dropout=dropout)
        parts.append(y.unflatten(1, (B, H)).permute(1, 2, 0, 3, 4))
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)
    return torch.cat(parts, 2).index_select(2, back).flatten(2, 3)[:, :, before : before + T]


def _fold(x_BHNRD: Tensor) -> Tensor:
    """[B,H,N,R,D] → [N,B·H,R,D]."""
    return x_BHNRD.permute(2, 0, 1, 3, 4).flatten(1, 2)
