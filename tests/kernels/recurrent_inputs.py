"""What the tests of the recurrent kernels share: random tokens, decays and resets, and how two forms are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from headwise.kernels.linear_attention import FLOOR


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(B: int, H: int, K: int, T: int, E: int = 4, D: int = 3) -> list[Tensor]:
    shapes = [(B, H, T, E), (B, K, T, E), (B, K, T, D)]
    return [random(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def log_decays(kind: str, B: int, K: int, T: int, E: int = 4) -> Tensor | None:
    """Decays of all sizes: some tokens forget next to nothing, some nearly all."""
    shapes = {"constant": (1, K, 1), "head": (B, K, T), "dimension": (B, K, T, E)}
    if kind == "none":
        return None
    return (FLOOR * random(*shapes[kind], seed=5).sigmoid() ** 3).requires_grad_()


def random_resets(B: int, T: int) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.05


@st.composite
def situations(draw: st.DrawFn, decays: list[str], chunks: list[int | None]) -> dict[str, Any]:
    K = draw(st.integers(1, 2))
    return {
        "B": draw(st.integers(1, 2)),
        "K": K,
        "H": K * draw(st.integers(1, 3)),
        "T": draw(st.sampled_from([1, 2, 5, 16, 17, 33, 64, 65, 100])),
        "chunk": draw(st.sampled_from(chunks)),
        "decay": draw(st.sampled_from(decays)),
        "resets": draw(st.booleans()),
        "state": draw(st.booleans()),
    }


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Values, and gradients of a random weighting of all of them."""
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    weighed = [torch.stack([(y * random(*y.shape, seed=9)).sum() for y in each]).sum() for each in (ours, theirs)]
    grads = [torch.autograd.grad(each, leaves, retain_graph=True) for each in weighed]
    torch.testing.assert_close(*grads, atol=1e-8, rtol=1e-8)


def in_pieces(
    form: Callable[..., tuple[Tensor, Tensor]],
    xs: list[Tensor],
    cut: int,
    log_decay: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `form` makes of the tokens before `cut`, and with their state of those from it on: outputs, last state."""
    state, ys = None, []
    for piece in (slice(cut), slice(cut, None)):
        steps = log_decay if log_decay is None or log_decay.shape[2] == 1 else log_decay[:, :, piece]
        resets = resets_BT[:, piece] if resets_BT is not None else None
        y, state = form(*(x[:, :, piece] for x in xs), log_decay=steps, resets_BT=resets, state_BKED=state)
        ys.append(y)
    assert state is not None
    return torch.cat(ys, 2), state
