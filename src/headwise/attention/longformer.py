"""Longformer's pattern (Beltagy et al. 2020): a sliding window, and a few tokens that see all and are seen by all.

y_i = Σ_j softmax_j(q_i·k_j/√D) v_j over the j with |i − j| < window, or j < global_tokens, or i < global_tokens: the
global tokens are the first ones of a document. In a decoder j ≤ i besides, so that a global token sees no more than any
other, and the pattern is that of `window` with `sink_tokens`. Global tokens share the other tokens' projections, as in
BigBird; the Longformer of the paper has a second set for them.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.cache import Needs
from headwise.dims import Dims
from headwise.kernels.attention import sdpa
from headwise.kernels.sparse_attention import naive
from headwise.registry import register_attention


class LongformerSpec(AttentionSpec):
    """A sliding window, and `global_tokens` first tokens that see all and are seen by all: O(T·(window + global))."""

    kind: Literal["longformer"] = "longformer"
    positional: ClassVar[tuple[str, ...]] = ("window", "global_tokens")
    examples: ClassVar[tuple[str, ...]] = ("longformer(9, 2)", "longformer(40, global_tokens=70, kv_heads=2)")
    typical: ClassVar[str | None] = "longformer(256, global_tokens=16)"
    window: int = Field(gt=0)
    global_tokens: int = Field(ge=0)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        window = min(self.window, context)
        # What lies beyond the window on one side: the distances window … context - 1.
        beyond = context - window
        first = min(self.global_tokens, beyond)
        outside = first * beyond - first * (first - 1) / 2
        if causal:
            return (context * window - window**2 / 2 + outside) / context
        return (context * (2 * window - 1) - window * (window - 1) + 2 * outside) / context

    def tokens_cached(self, context: int) -> int:
        return min(self.window + self.global_tokens, context)


@register_attention(LongformerSpec)
class LongformerAttention(Attention):
    """A window and global tokens."""

    spec: LongformerSpec

    def __init__(self, spec: LongformerSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.pattern = partial(naive.longformer, window=spec.window, global_tokens=spec.global_tokens)

    def cache_needs(self) -> Needs:
        return Needs(self.spec.kind, window=self.spec.window, first=self.spec.global_tokens)

    def fast(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Tensor | None
    ) -> Tensor:
        T, S, first = q_BHTE.shape[2], k_BKSE.shape[2], self.spec.global_tokens
        if context.segments is not None or attn_mask is not None or self.biases_rows(q_BHTE, context):
            return super().fast(q_BHTE, k_BKSE, v_BKSD, context, attn_mask)
        if not context.causal and (T != S or first >= S):
            return super().fast(q_BHTE, k_BKSE, v_BKSD, context, attn_mask)
        scores, window = self.scores(q_BHTE, context), self.spec.window
        if context.causal or not first:
            return sdpa.attention(q_BHTE, k_BKSE, v_BKSD, window=window, first=first, **scores)
        seeing_all = sdpa.attention(q_BHTE[:, :, :first], k_BKSE, v_BKSD, **scores)
        rest = sdpa.attention(q_BHTE[:, :, first:], k_BKSE, v_BKSD, window=window, first=first, **scores)
        return torch.cat([seeing_all, rest], 2)
