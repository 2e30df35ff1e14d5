"""Segments of a row of tokens: documents packed side by side, padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Which keys at positions j a query at i may see, both counted from the start of their segment; broadcasts.
Pattern = Callable[[Tensor, Tensor], Tensor]
# The same for the queries start…stop-1 of a pass and all keys: boolean, broadcast to [B,1,rows,S].
Keep = Callable[[int, int], Tensor]


def segment_positions(segments_BS: Tensor) -> Tensor:
    """Positions that start again at 0 with every run of one segment: int64 [B,S] → [B,S]."""
    index = torch.arange(segments_BS.shape[1], device=segments_BS.device).expand_as(segments_BS)
    starts = torch.ones_like(segments_BS, dtype=torch.bool)
    starts[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    return index - (index * starts).cummax(dim=1).values


def runs(segments_BS: Tensor) -> list[list[tuple[int, int]]] | None:
    """Where each row's segments begin and end, as (start, stop); None where one goes on after another."""
    rows = []
    for row in segments_BS.tolist():
        starts = [0, *(i for i in range(1, len(row)) if row[i] != row[i - 1])]
        if len({row[i] for i in starts}) < len(starts):
            return None
        rows.append(list(zip(starts, [*starts[1:], len(row)])))
    return rows


def keep_by(
    pattern: Pattern,
    T: int,
    S: int,
    segments: tuple[Tensor, Tensor] | None,
    device: torch.device,
    positions: Tensor | None = None,
) -> Keep:
    """What a pattern keeps of S keys for the last T of their positions; segments are (queries [B,T], keys [B,S]).

    `positions`, int64 [S] or [B,S], are the keys' places in their segments where they do not simply follow each other.
    """
    if positions is None:
        positions = torch.arange(S, device=device) if segments is None else segment_positions(segments[1])
    if positions.dim() == 2:
        positions = positions[:, None]

    def keep(start: int, stop: int) -> Tensor:
        return pattern(positions[..., S - T + start : S - T + stop, None], positions[..., None, :])

    return keep
