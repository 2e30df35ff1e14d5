"""Sliding-window attention (Mistral; document 002): a query sees the `window` nearest keys, its own included.

Causal: 0 ≤ i − j < window, as Mistral counts. Bidirectional: |i − j| < window. Queries go in blocks, each with the
keys it can reach, so time and memory are O(T·window), not O(T²).

`dilation` d spreads the window out: i − j = 0, d, 2d, …, still `window` keys (Beltagy et al. 2020). Tokens with the
same position modulo d then form a sequence of their own, with a plain window. `sink_tokens` n keeps the first n tokens
of a document in sight (StreamingLLM, Xiao et al. 2023): without them a softmax that has learned to rest on the first
token breaks down when that leaves the window.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from headwise.attention.base import Attention, Context, ScoreSpec
from headwise.cache import Needs
from headwise.dims import Dims
from headwise.errors import Problem
from headwise.kernels.attention import sdpa
from headwise.kernels.sparse_attention import dilated, naive
from headwise.registry import register_attention


class WindowSpec(ScoreSpec):
    """Softmax attention to the nearest `window` keys only, the query's own among them."""

    kind: Literal["window"] = "window"
    positional: ClassVar[tuple[str, ...]] = ("window",)
    examples: ClassVar[tuple[str, ...]] = (
        "window(16)",
        "window(300, kv_heads=2)",
        "window(5, dilation=11, sink=true)",
        "window(70, sink_tokens=3, softcap=5.0, kv_heads=1)",
    )
    typical: ClassVar[str | None] = "window(256)"
    window: int = Field(gt=0)
    dilation: int = Field(1, gt=0)
    sink_tokens: int = Field(0, ge=0)

    def check(self, dims: Dims) -> list[Problem]:
        problems = super().check(dims)
        if self.dilation > 1 and self.sink_tokens:
            message = f"{self.dilation} given with sink_tokens={self.sink_tokens}; only one of the two can be used"
            problems.append(Problem("dilation", message))
        return problems

    def keys_seen(self, context: int, *, causal: bool) -> float:
        # Each rest of the positions by the dilation is a sequence of its own: some of one length, some one longer.
        short, longer = divmod(context, self.dilation)
        pairs = longer * self._pairs(short + 1, causal) + (self.dilation - longer) * self._pairs(short, causal)
        # First keys before the window; in an encoder also those behind it.
        beyond = max(0, context - self.window)
        first = min(self.sink_tokens, beyond)
        pairs += first * beyond - first * (first - 1) / 2
        if not causal:
            behind = max(0, min(self.sink_tokens, context) - self.window)
            pairs += behind * (behind + 1) / 2
        return pairs / context

    def _pairs(self, length: int, causal: bool) -> float:
        window = min(self.window, length)
        return length * window - window**2 / 2 if causal else length * (2 * window - 1) - window * (window - 1)

    def tokens_cached(self, context: int) -> int:
        return min((self.window - 1) * self.dilation + 1 + self.sink_tokens, context)


@register_attention(WindowSpec)
class WindowAttention(Attention):
    """Softmax attention inside a window."""

    spec: WindowSpec

    def __init__(self, spec: WindowSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        if spec.dilation == 1 and not spec.sink_tokens:
            self.window, self.direct = spec.window, True
        else:
            self.pattern = partial(
                naive.window, window=spec.window, dilation=spec.dilation, sink_tokens=spec.sink_tokens
            )

    def cache_needs(self) -> Needs:
        spec = self.spec
        return Needs(spec.kind, window=(spec.window - 1) * spec.dilation + 1, first=spec.sink_tokens)

    def fast(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Tensor | None
    ) -> Tensor:
        spec, scores = self.spec, self.scores(q_BHTE, context)
        if spec.dilation > 1 and not self.biases_rows(q_BHTE, context):
            del scores["bias_rows"]
            return dilated.attention(
                q_BHTE, k_BKSE, v_BKSD, window=spec.window, dilation=spec.dilation,
                segments=context.segments, attn_mask=attn_mask, **scores,
            )  # fmt: skip
        if spec.sink_tokens and context.segments is None:
            return sdpa.attention(
                q_BHTE, k_BKSE, v_BKSD, window=spec.window, first=spec.sink_tokens, attn_mask=attn_mask, **scores
            )
        return super().fast(q_BHTE, k_BKSE, v_BKSD, context, attn_mask)
