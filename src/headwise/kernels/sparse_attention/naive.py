"""Which keys a query sees: one definition a pattern.

Each takes the positions i of the queries and j of the keys, counted from the start of their document, as integer
tensors that broadcast, and gives booleans. In a decoder j ≤ i holds besides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window(i: Tensor, j: Tensor, *, window: int, dilation: int = 1, sink_tokens: int = 0) -> Tensor:
    """Every `dilation`-th of the near keys, `window` of them with the query's own on each side; and the first ones."""
    distance = (i - j).abs()
    return ((distance < window * dilation) & (distance % dilation == 0)) | (j < sink_tokens)


def strided(i: Tensor, j: Tensor, *, stride: int) -> Tensor:
    """The nearest `stride` keys, and every `stride`-th beyond (Child et al. 2019)."""
    distance = (i - j).abs()
    return (distance < stride) | (distance % stride == 0)


def longformer(i: Tensor, j: Tensor, *, window: int, global_tokens: int) -> Tensor:
    """The nearest `window` keys; the first tokens see all and are seen by all (Beltagy et al. 2020)."""
    return ((i - j).abs() < window) | (i < global_tokens) | (j < global_tokens)


def bigbird(
    i: Tensor, j: Tensor, *, window: int, global_tokens: int, random_blocks: int, block_size: int, seed: int
) -> Tensor:
    """As `longformer`, and the blocks that the query's block drew, or that drew it (Zaheer et al. 2020).

    The last dimension of j holds all keys, so positions are below its size.
    """
    blocks = range(-(-j.shape[-1] // block_size))
    linked = torch.zeros(len(blocks), len(blocks), dtype=torch.bool, device=j.device)
    for n in blocks:
        for m in draws(n, random_blocks, seed):
            linked[n, m] = linked[m, n] = True
    near_or_global = longformer(i, j, window=window, global_tokens=global_tokens)
    return near_or_global | linked[i // block_size, j // block_size]


def draws(block: int, count: int, seed: int) -> list[int]:
    """`count` different blocks before `block`, all of them where there are fewer, each set as likely as any other.

    A function of its arguments alone, so that it is the same in every layer, at every length and in decoding. Floyd's
    way to draw a subset, with numbers from SplitMix64's mixing.
    """
    count, drawn = min(count, block), []
    for n, last in enumerate(range(block - count, block)):
        mixed = (seed * 0x9E3779B97F4A7C15 + block * 0xD1342543DE82EF95 + n * 0xDA942042E4DD58B5 + 1) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        chosen = (mixed ^ (mixed >> 31)) % (last + 1)
        drawn.append(last if chosen in drawn else chosen)
    return drawn
