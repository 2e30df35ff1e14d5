"""Sliding-window attention (Mistral; document 002): a query sees the `window` nearest keys, its own included.

Causal: 0 ≤ i − j < window, as Mistral counts. Bidirectional: |i − j| < window. Queries go in blocks, each with the
keys it can reach, so time and memory are O(T·window), not O(T²).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from headwise.attention.base import Attention, AttentionSpec
from headwise.dims import Dims
from headwise.registry import register_attention


class WindowSpec(AttentionSpec):
    """Softmax attention to the nearest `window` keys only, the query's own among them."""

    kind: Literal["window"] = "window"
    positional: ClassVar[tuple[str, ...]] = ("window",)
    examples: ClassVar[tuple[str, ...]] = ("window(16)", "window(300, kv_heads=2)")
    typical: ClassVar[str | None] = "window(256)"
    window: int = Field(gt=0)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        window = min(self.window, context)
        if causal:
            return window - window**2 / (2 * context)
        return 2 * window - 1 - window * (window - 1) / context

    def tokens_cached(self, context: int) -> int:
        return min(self.window, context)


@register_attention(WindowSpec)
class WindowAttention(Attention):
    """Softmax attention inside a window."""

    def __init__(self, spec: WindowSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.window = spec.window
