"""The strided pattern: a query's nearest keys, and every stride-th beyond, under one softmax.

The sequence is written in rows of `stride` tokens. The near keys of a row lie in its own row and the one before; the
far keys of a token are its column. So the near scores are products of rows with rows, [stride, 2·stride] each, and the
far scores products of columns with themselves, [T/stride, T/stride] each: O(T·(stride + T/stride)) in all. Both stand
side by side in one softmax. It is done again in the backward pass, for some rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwise.kernels.attention.block import attend

# Numbers of scores, a head, that are in memory at one time.
SCORES = 2**18


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSD: Tensor,
    *,
    stride: int,
    causal: bool,
    scale: float,
    segments: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the pattern `naive.strided`; the queries are the last T of S positions.

    Returns:
        [B,H,T,D].
    """
    (H, T), (K, S), device = q_BHTE.shape[1:3], k_BKSE.shape[1:3], q_BHTE.device
    L = min(stride, S)
    if T == 1 and causal:
        far = S - 1 - L * torch.arange(1, (S - 1) // L + 1, device=device)
        seen = torch.cat([far, torch.arange(S - L, S, device=device)])
        k, v = k_BKSE.index_select(2, seen), v_BKSD.index_select(2, seen)
        own = None if segments is None else (segments[1][:, seen] == segments[0])[:, None, None]
        return attend(q_BHTE, k, v, own, scale=scale, dropout=dropout)
    # Rows are counted from the end, and filled up at the start with keys that nobody sees.
    n_q, n_k = -(-T // L), -(-S // L)
    q_BHNLE = F.pad(q_BHTE, (0, 0, n_q * L - T, 0)).unflatten(2, (n_q, L))
    k_BKNLE, v_BKNLD = (F.pad(x, (0, 0, n_k * L - S, 0)).unflatten(2, (n_k, L)) for x in (k_BKSE, v_BKSD))
    there_BNL = (torch.arange(n_k * L, device=device) >= n_k * L - S).unflatten(0, (n_k, L))[None]
    keys_BNL = None
    if segments is not None:
        # Filled-up keys have a segment of their own by `there`, whatever number stands here.
        keys_BNL = F.pad(segments[1], (n_k * L - S, 0)).unflatten(1, (n_k, L))
    queries_BNL = None if keys_BNL is None or segments is None else keys_BNL[:, n_k - n_q :]

    offsets = (-1, 0) if causal else (-1, 0, 1)  # the rows that hold a row's near keys, counted from its own

    def near_rows(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
        """The rows around each of the query rows start…stop-1 side by side: […, rows, len(offsets)·L, …]."""
        first, last = n_k - n_q + start - 1, n_k - n_q + stop + (0 if causal else 1)
        low, high = max(0, first), min(n_k, last)
        pad = [0, 0] * (x.dim() - 1 - dim) + [low - first, last - high]
        x = F.pad(x.narrow(dim, low, high - low), pad)
        return torch.cat([x.narrow(dim, 1 + o, stop - start) for o in offsets], dim + 1)

    def some(q_BHNLE: Tensor, k_BKNLE: Tensor, v_BKNLD: Tensor, start: int, stop: int) -> Tensor:
        n, G, at = stop - start, H // K, n_k - n_q + start
        far = min(n_k, at + n) if causal else n_k
        q_BKNGLE = q_BHNLE[:, :, start:stop].unflatten(1, (K, G)).transpose(2, 3)
        near_k, near_v = near_rows(k_BKNLE, 2, start, stop), near_rows(v_BKNLD, 2, start, stop)
        near = q_BKNGLE.flatten(3, 4) @ near_k.transpose(-1, -2)
        near_BHNLW = near.unflatten(3, (G, L)).transpose(2, 3).flatten(1, 2)
        q_BKLGNE = q_BKNGLE.permute(0, 1, 4, 3, 2, 5)
        far_k, far_v = (x[:, :, :far].transpose(2, 3) for x in (k_BKNLE, v_BKNLD))
        column = q_BKLGNE.flatten(3, 4) @ far_k.transpose(-1, -2)
        far_BHNLM = column.unflatten(3, (G, n)).permute(0, 1, 3, 4, 2, 5).flatten(1, 2)

        i_NL1 = (torch.arange(n, device=device)[:, None, None] + at) * L + torch.arange(L, device=device)[:, None]
        j_NLW = (torch.arange(n, device=device)[:, None, None] + at - 1) * L
        j_NLW = j_NLW + torch.arange(len(offsets) * L, device=device)
        see_near = (i_NL1 - j_NLW).abs() < L
        row_N11, row_M = torch.arange(at, at + n, device=device)[:, None, None], torch.arange(far, device=device)
        see_far = (row_M < row_N11) if causal else (row_M != row_N11)
        if causal:
            see_near = see_near & (j_NLW <= i_NL1)
        see_near = see_near & near_rows(there_BNL, 1, start, stop)[..., None, :]
        see_far = see_far & there_BNL[:, :far].transpose(1, 2)[:, None]
        if keys_BNL is not None and queries_BNL is not None:
            own_BNL1 = queries_BNL[:, start:stop, :, None]
            see_near = see_near & (near_rows(keys_BNL, 1, start, stop)[..., None, :] == own_BNL1)
            see_far = see_far & (keys_BNL[:, :far].transpose(1, 2)[:, None] == own_BNL1)
        # A filled-up query sees itself, so that its softmax is one.
        see_near = see_near | (j_NLW == i_NL1)

        scores = torch.cat(
            [(scale * near_BHNLW).masked_fill(~see_near[:, None], -torch.inf),
             (scale * far_BHNLM).masked_fill(~see_far[:, None], -torch.inf)], -1
        )  # fmt: skip
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(v_BKNLD.dtype)
        weights = F.dropout(weights, dropout) if dropout else weights
        near_BKNGLW = weights[..., : len(offsets) * L].unflatten(1, (K, G)).transpose(2, 3)
        y_near = (near_BKNGLW.flatten(3, 4) @ near_v).unflatten(3, (G, L)).transpose(2, 3).flatten(1, 2)
        far_BKLGNM = weights[..., len(offsets) * L :].unflatten(1, (K, G)).permute(0, 1, 4, 2, 3, 5)
        y_far = (far_BKLGNM.flatten(3, 4) @ far_v).unflatten(3, (G, n)).permute(0, 1, 3, 4, 2, 5).flatten(1, 2)
        return y_near + y_far

    at_once = max(1, SCORES // (L * (len(offsets) * L + n_k)))
    starts = range(0, n_q, at_once)
    args = (q_BHNLE, k_BKNLE, v_BKNLD)
    again = torch.is_grad_enabled()
    parts = [
        checkpoint(some, *args, at, min(at + at_once, n_q), use_reentrant=False)
        if again
        else some(*args, at, min(at + at_once, n_q))
        for at in starts
    ]
    return torch.cat(parts, 2).flatten(2, 3)[:, :, n_q * L - T :]
