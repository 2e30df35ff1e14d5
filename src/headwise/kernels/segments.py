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
    return index - (index * _begins(segments_BS)).cummax(dim=1).values


def _begins(segments_BS: Tensor) -> Tensor:
    """Where another segment begins than that of the token before: boolean [B,S]."""
    begins = torch.ones_like(segments_BS, dtype=torch.bool)
    begins[:, 1:] = segments_BS[:, 1:] != segments_BS[:, :-1]
    return begins


def runs(segments_BS: Tensor) -> list[list[tuple[int, int]]] | None:
    """Where each row's segments begin and end, as (start, stop); None where one goes on after another."""
    (B, S), begins = segments_BS.shape, _begins(segments_BS)
    rows: list[dict[int, int]] = [{} for _ in range(B)]  # where each segment begins
    for row, start, segment in torch.cat([begins.nonzero(), segments_BS[begins][:, None]], 1).tolist():
        if segment in rows[row]:
            return None
        rows[row][segment] = start
    return [list(zip(row.values(), [*list(row.values())[1:], S])) for row in rows]


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
