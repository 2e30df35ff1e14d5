"""What recurrences in chunks share: how much of what lies before reaches a token, inside a chunk and across its edges.

A chunk of c tokens knows its own pairs of tokens, the state S that the tokens before it left, and the state that it
leaves itself. With a decay a_t a token and b_i = Σ_{t ≤ i} log a_t counted from the chunk's start:

    pair_ij = a_{j+1} … a_i = e^(b_i − b_j)    how much of token j token i still sees, j ≤ i
    reach_i = e^(b_i)                          how much of the carried state token i sees
    tail_j  = e^(b_c − b_j)                    how much of token j the chunk hands on
    carry   = e^(b_c)                          how much of the carried state it hands on

Where the state starts anew at some token, tokens fall into runs. Pairs of different runs do not see each other, the
carried state reaches only the run that was current when the chunk began, and only the run current at the chunk's end is
handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from headwise.kernels import naive_wanted


class Reach(NamedTuple):
    """The four factors of every chunk, with batch and heads in front, broadcastable: [·,·,N,c,c], [·,·,N,c,1],
    [·,·,N,c,1] and [·,·,N,1,1]. Booleans from `runs`, numbers from `decays`.
    """

    pair: Tensor
    reach: Tensor
    tail: Tensor
    carry: Tensor


def runs(resets_BT: Tensor, chunk: int) -> Reach:
    """Who sees whom where the state starts anew before the tokens of `resets_BT`, boolean, T a multiple of `chunk`."""
    run_BNc = resets_BT.cumsum(1).unflatten(1, (-1, chunk))
    last_BN = run_BNc[..., -1]
    # The carried state is of the run of the token before the chunk; what came before the first token counts as run 0.
    before_BN = torch.cat([torch.zeros_like(last_BN[:, :1]), last_BN[:, :-1]], 1)
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=resets_BT.device).tril()
    return Reach(
        pair=((run_BNc[..., :, None] == run_BNc[..., None, :]) & causal)[:, None],
        reach=(run_BNc == before_BN[..., None])[:, None, ..., None],
        tail=(run_BNc == last_BN[..., None])[:, None, ..., None],
        carry=(last_BN == before_BN)[:, None, :, None, None],
    )


def decays(log_decay: Tensor | None, resets_BT: Tensor | None, chunk: int, dtype: torch.dtype) -> Reach | None:
    """The factors of a decay a head: `log_decay` ≤ 0, [·,·,T], or [·,·,1] where it is the same at every token.

    The sums b are made in float64: one strong decay in a chunk would take the last bits of all weak ones after it.

    Returns:
        None where nothing decays and no state starts anew.
    """
    found = runs(resets_BT, chunk) if resets_BT is not None else None
    if log_decay is None:
        return None if found is None else Reach(*(mask.to(dtype) for mask in found))
    steps = log_decay.double()
    steps = steps.expand(*steps.shape[:-1], chunk) if steps.shape[-1] == 1 else steps
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=steps.device).tril()
    b = causal.double() @ steps.unflatten(-1, (-1, chunk))[..., None]  # [·,·,N,c,1]
    end = b[..., -1:, :]
    apart = b - b.transpose(-1, -2)
    # Masked before the exponential: above the diagonal it may overflow, and 0·∞ would poison the gradient.
    made = Reach(
        apart.masked_fill(~causal, -torch.inf).to(dtype).exp(), *(e.exp().to(dtype) for e in (b, end - b, end))
    )
    return made if found is None else Reach(*(number * mask for number, mask in zip(made, found)))


def grouped(q_BHTE: Tensor, kv_heads: int, chunk: int) -> Tensor:
    """Queries in chunks, those of one key/value head below one another: [B,H,T,E] → [B,K,N,G·c,E], G = H/K."""
    q_BKGNcE = q_BHTE.unflatten(2, (-1, chunk)).unflatten(1, (kv_heads, -1))
    return q_BKGNcE.transpose(2, 3).flatten(3, 4)


def ungrouped(y_BKNRD: Tensor, chunk: int) -> Tensor:
    """Back from `grouped`: [B,K,N,G·c,D] → [B,H,T,D]."""
    return y_BKNRD.unflatten(3, (-1, chunk)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def scaled(x: Tensor, factor: Tensor | None, chunk: int) -> Tensor:
    """The rows of `grouped` queries (or their scores) times a factor [·,·,N,c,·] of their tokens."""
    return x if factor is None else (x.unflatten(3, (-1, chunk)) * factor.unsqueeze(3)).flatten(3, 4)


def causal_part(scores_BKNRc: Tensor, pair: Tensor | None, chunk: int) -> Tensor:
    """Scores of `grouped` queries with the keys of their chunk, times `pair`; without it those not of later keys."""
    if pair is not None:
        return scaled(scores_BKNRc, pair, chunk)
    return scores_BKNRc.unflatten(3, (-1, chunk)).tril().flatten(3, 4)


Recurrence = Callable[..., tuple[Tensor, Tensor]]


def by_what_suits(
    recurrent: Recurrence, chunked: Recurrence, *xs: Tensor, dtype: torch.dtype, **more: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`recurrent` inside `kernels.naive()` and for one token, else `chunked`; in float32 at least, autocast or not.

    Args:
        xs: queries [B,H,T,E] and what else the recurrence has of the tokens.
        dtype: of the first result; the second, a state, stays as wide as it was computed: it adds up over all tokens.
        more: passed on as it is.
    """
    wide = torch.promote_types(dtype, torch.float32)
    form = recurrent if naive_wanted() or xs[0].shape[2] == 1 else chunked
    with without_autocast(xs[0].device):
        y_BHTD, state_BKED = form(*(x.to(wide) for x in xs), **more)
    return y_BHTD.to(dtype), state_BKED


Step = Callable[[tuple[Tensor, ...], Tensor | None, Tensor | None, Tensor | None, int], tuple[Tensor, Tensor]]


def over_chunks(
    step: Step,
    xs: tuple[Tensor, ...],
    log_decay: Tensor | None,
    resets_BT: Tensor | None,
    state_BKED: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Run `step` on the tokens of all whole chunks, then on those left over, which are a chunk of their own.

    Padding them to a whole chunk would let the state decay past the last token.

    Args:
        step: from tensors of some tokens, their decays and resets, the state before them and the chunk's length to y
            [B,H,T,D] and the state after them.
        xs: [·,·,T,…], cut at the same tokens as the decays (unless those are the same at every token) and resets.
    """
    T = xs[0].shape[2]
    leftover = T % chunk if chunk < T else 0
    if leftover == 0:
        return step(xs, log_decay, resets_BT, state_BKED, min(chunk, T))
    whole, ys = T - leftover, []
    for tokens, length in ((slice(whole), chunk), (slice(whole, T), leftover)):
        steps = log_decay[:, :, tokens] if log_decay is not None and log_decay.shape[2] == T else log_decay
        resets = resets_BT[:, tokens] if resets_BT is not None else None
        y_BHTD, state_BKED = step(tuple(x[:, :, tokens] for x in xs), steps, resets, state_BKED, length)
        ys.append(y_BHTD)
    assert state_BKED is not None
    return torch.cat(ys, 2), state_BKED


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside it matrix products keep their dtype: a state that adds up over all tokens needs float32."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
