"""Softmax attention with any number of key/value heads: MHA, GQA, MQA (documents 001 and 002).

y_i = Σ_j softmax_j(q_i·k_j/√D + bias_ij) v_j. Query head h reads key/value head ⌊h·K/H⌋: K = H is multi-head attention
(Vaswani et al. 2017), K = 1 multi-query (Shazeer 2019), between them grouped-query (Ainslie et al. 2023).

`softcap` c bends the scores to c·tanh(s/c) before the softmax (Gemma 2, 2024). `sink` adds a learned exp(s_h) to the
denominator (gpt-oss, 2025), so that a head may attend to nothing; s_h starts at 0.

At C = 768, H = 12 the query, key and value maps have 1.77 M weights (MHA), 0.98 M (GQA, K = 4), 0.69 M (MQA).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from headwise.attention.base import Attention, ScoreSpec
from headwise.registry import ATTENTION, register_attention


class SoftmaxSpec(ScoreSpec):
    """Scaled dot-product attention: MHA, GQA or MQA by kv_heads."""

    kind: Literal["softmax"] = "softmax"
    examples: ClassVar[tuple[str, ...]] = (
        "softmax",
        "mqa",
        "softmax(head_dim=16, qk_norm=true, scale=0.4, softcap=5.0)",
        "gqa(kv_heads=2, sink=true, bias=true, out_bias=false, qk_norm=full)",
    )


@register_attention(SoftmaxSpec)
class SoftmaxAttention(Attention):
    """The shared base as it stands."""


ATTENTION.alias("mha", "softmax")
ATTENTION.alias("standard", "softmax")
ATTENTION.alias("mqa", "softmax", kv_heads=1)
ATTENTION.alias("gqa", "softmax", required=("kv_heads",))
