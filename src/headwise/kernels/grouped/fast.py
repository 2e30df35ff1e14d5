"""Dropless mixture of experts: tokens sorted by expert, every expert on its own slice, and back to the tokens.

Work is that of the chosen experts alone, no token is dropped, and nothing is padded. Rows are moved by permutations
only, which add nothing up, so results are deterministic on a GPU too.

How many rows an expert gets is known only when the router has spoken, which no traced graph can hold. There, the
product of the slices with their experts' matrices is one operator (`torch.library`), opaque to the tracer: static
shapes outside, the same slices inside. Eager code needs no operator, and calls the experts one by one, a tenth quicker.
(torch's own `grouped_mm` takes no float64, and only widths that are multiples of 16 bytes.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grouped = Callable[[Tensor, Tensor, Tensor], Tensor]
"""All experts at once: (rows [M,C] sorted by expert, int64 [M] the expert of each, int64 [E] rows of each expert)."""


def mixture(
    x_NC: Tensor,
    index_Nk: Tensor,
    weights_Nk: Tensor,
    experts: Sequence[Callable[[Tensor], Tensor]],
    grouped: Grouped,
) -> Tensor:
    """What `naive.mixture` defines, at the cost of the k experts that a token chose.

    Args:
        x_NC: tokens.
        index_Nk, weights_Nk: as there.
        experts: functions [·,C] → [·,C'].
        grouped: the experts in one traceable function, made of `grouped_linear`.
    """
    N, k = index_Nk.shape
    expert_M, order_M = index_Nk.flatten().sort(stable=True)
    counts_E = (expert_M[:, None] == torch.arange(len(experts), device=x_NC.device)).sum(0)
    rows_MC = x_NC[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order_M)
    if torch.compiler.is_compiling():
        y_MC = grouped(rows_MC, expert_M, counts_E)
    else:
        slices = zip(experts, rows_MC.split(counts_E.tolist()))
        # In training every expert is called, so that one without tokens has gradients too: zeros.
        everyone = torch.is_grad_enabled()
        y_MC = torch.cat([expert(rows) for expert, rows in slices if everyone or len(rows)])
    y_NkC = y_MC.index_select(0, order_M.argsort()).unflatten(0, (N, k))
    return (y_NkC * weights_Nk[..., None].to(y_NkC.dtype)).sum(1)


def grouped_linear(x_MC: Tensor, weights: Sequence[Tensor], counts_E: Tensor) -> Tensor:
    """Rows [M,C] sorted by expert → [M,F]: the slice of expert e times its matrix [F,C], transposed.

    Under autocast in its dtype, as torch's linear is.
    """
    if torch.is_autocast_enabled(x_MC.device.type):
        dtype = torch.get_autocast_dtype(x_MC.device.type)
        x_MC, weights = x_MC.to(dtype), [weight.to(dtype) for weight in weights]
    return _linear(x_MC, list(weights), counts_E)


def _slices(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of the experts that have rows."""
    ends = counts_E.cumsum(0).tolist()
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends)) if start < end]


@torch.library.custom_op("headwise::grouped_linear", mutates_args=())
def _linear(x_MC: Tensor, weights: list[Tensor], counts_E: Tensor) -> Tensor:
    y_MF = x_MC.new_empty(x_MC.shape[0], weights[0].shape[0])
    for e, start, end in _slices(counts_E):
        torch.mm(x_MC[start:end], weights[e].T, out=y_MF[start:end])
    return y_MF


@torch.library.custom_op("headwise::grouped_linear_backward", mutates_args=())
def _linear_backward(
    grad_MF: Tensor, x_MC: Tensor, weights: list[Tensor], counts_E: Tensor
) -> tuple[Tensor, list[Tensor]]:
    grad_x_MC = torch.empty_like(x_MC)
    grads = [torch.zeros_like(weight) for weight in weights]
    for e, start, end in _slices(counts_E):
        torch.mm(grad_MF[start:end], weights[e], out=grad_x_MC[start:end])
        torch.mm(grad_MF[start:end].T, x_MC[start:end], out=grads[e])
    return grad_x_MC, grads


@_linear.register_fake
def _(x_MC: Tensor, weights: list[Tensor], counts_E: Tensor) -> Tensor:
    return x_MC.new_empty(x_MC.shape[0], weights[0].shape[0])


@_linear_backward.register_fake
def _(grad_MF: Tensor, x_MC: Tensor, weights: list[Tensor], counts_E: Tensor) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x_MC), [torch.empty_like(weight) for weight in weights]


def _save(ctx: Any, inputs: tuple[Tensor, list[Tensor], Tensor], output: Tensor) -> None:
    x_MC, weights, counts_E = inputs
    ctx.save_for_backward(x_MC, counts_E, *weights)


def _backward(ctx: Any, grad_MF: Tensor) -> tuple[Tensor, list[Tensor], None]:
    x_MC, counts_E, *weights = ctx.saved_tensors
    return *_linear_backward(grad_MF, x_MC, weights, counts_E), None


_linear.register_autograd(_backward, setup_context=_save)
