"""Strided attention (Sparse Transformer, Child et al. 2019): the nearest keys, and every `stride`-th beyond.

y_i = Σ_j softmax_j(q_i·k_j/√D) v_j over the j ≤ i with i − j < stride or (i − j) mod stride = 0. In an encoder the
same holds for |i − j|. Two layers reach everything: a stride of √T makes a layer O(T·√T). Both halves of the pattern
stand under one softmax, in every head; the paper also tries one half a head.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.dims import Dims
from headwise.kernels.attention.sdpa import with_bias
from headwise.kernels.sparse_attention import naive, strided
from headwise.registry import register_attention


class StridedSpec(AttentionSpec):
    """The nearest `stride` keys and every stride-th key beyond (Sparse Transformer): O(T·(stride + T/stride))."""

    kind: Literal["strided"] = "strided"
    positional: ClassVar[tuple[str, ...]] = ("stride",)
    examples: ClassVar[tuple[str, ...]] = ("strided(7)", "strided(32, kv_heads=2)")
    typical: ClassVar[str | None] = "strided(64)"
    stride: int = Field(gt=0)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        stride = min(self.stride, context)
        # Pairs at the distances stride, 2·stride, …, each as often as it fits.
        far = (context - 1) // stride
        pairs = far * context - stride * far * (far + 1) / 2
        if causal:
            return (context * stride - stride**2 / 2 + pairs) / context
        return (context * (2 * stride - 1) - stride * (stride - 1) + 2 * pairs) / context


@register_attention(StridedSpec)
class StridedAttention(Attention):
    """Near keys and a column of far ones."""

    spec: StridedSpec

    def __init__(self, spec: StridedSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.pattern = partial(naive.strided, stride=spec.stride)

    def fast(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Tensor | None
    ) -> Tensor:
        T, S = q_BHTE.shape[2], k_BKSE.shape[2]
        if attn_mask is not None or self.biases_rows(q_BHTE, context) or (not context.causal and T != S):
            return super().fast(q_BHTE, k_BKSE, v_BKSD, context, attn_mask)
        scores = self.scores(q_BHTE, context)
        if scores["bias_factors"] is not None:
            q_BHTE, k_BKSE = with_bias(q_BHTE, k_BKSE, scores["bias_factors"], scores["scale"])
            scores["scale"] = 1.0
        return strided.attention(
            q_BHTE, k_BKSE, v_BKSD, stride=self.spec.stride, causal=context.causal, scale=scores["scale"],
            segments=context.segments, dropout=scores["dropout"],
        )  # fmt: skip
