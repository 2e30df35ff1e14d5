"""BigBird's pattern (Zaheer et al. 2020): a sliding window, global tokens, and random blocks.

Tokens stand in blocks of `block_size`. Besides the keys that `longformer(window, global_tokens)` shows it, a query
sees `random_blocks` whole blocks, which its block n has drawn from the blocks before it. The draw is a hash of
(seed, n): the same in each layer and head, whatever the length, so that decoding agrees with training. In an encoder
links go both ways: two blocks see one another if either has drawn the other.

Blocks count from the start of a document. Random links make the graph of tokens an expander: any two are few layers
apart, where a window alone needs T/window layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.dims import Dims
from headwise.kernels.attention.sdpa import with_bias
from headwise.kernels.sparse_attention import blocks, naive
from headwise.registry import register_attention


class BigBirdSpec(AttentionSpec):
    """A sliding window, global first tokens and random blocks (BigBird): O(T·(window + global + random))."""

    kind: Literal["bigbird"] = "bigbird"
    positional: ClassVar[tuple[str, ...]] = ("window", "global_tokens", "random_blocks")
    examples: ClassVar[tuple[str, ...]] = (
        "bigbird(9, 2, 2, block_size=8)",
        "bigbird(40, global_tokens=20, random_blocks=3, block_size=16, kv_heads=2, seed=7)",
    )
    typical: ClassVar[str | None] = "bigbird(192, global_tokens=64)"
    window: int = Field(gt=0)
    global_tokens: int = Field(ge=0)
    random_blocks: int = Field(3, ge=0)
    block_size: int = Field(64, gt=0)
    seed: int = Field(0, ge=0, lt=2**31)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        near = min(self.window, context)
        beyond = context - near  # the distances window … context - 1
        first = min(self.global_tokens, beyond)
        far = first * beyond - first * (first - 1) / 2
        for n in range(1, -(-context // self.block_size)):
            far += sum(self._far(n, m, context) for m in naive.draws(n, self.random_blocks, self.seed))
        if causal:
            return (context * near - near**2 / 2 + far) / context
        return (context * (2 * near - 1) - near * (near - 1) + 2 * far) / context

    def _far(self, n: int, m: int, context: int) -> int:
        """Pairs of a query in block n and a key in block m before it that neither window nor global tokens link."""
        low, high = max(m * self.block_size, self.global_tokens), (m + 1) * self.block_size
        queries = range(n * self.block_size, min((n + 1) * self.block_size, context))
        if queries[0] - high + 1 >= self.window:
            return len(queries) * max(0, high - low)
        return sum(max(0, min(high, i - self.window + 1) - low) for i in queries)

    def fields(self) -> dict[str, Any]:
        """What the pattern is made of."""
        return self.model_dump(include={"window", "global_tokens", "random_blocks", "block_size", "seed"})


@register_attention(BigBirdSpec)
class BigBirdAttention(Attention):
    """A window, global tokens and random blocks."""

    spec: BigBirdSpec

    def __init__(self, spec: BigBirdSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        self.fields = spec.fields()
        self.pattern = partial(naive.bigbird, **self.fields)

    def fast(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Tensor | None
    ) -> Tensor:
        masked = context.segments is not None or attn_mask is not None or self.biases_rows(q_BHTE, context)
        if masked or (not context.causal and q_BHTE.shape[2] != k_BKSE.shape[2]):
            return super().fast(q_BHTE, k_BKSE, v_BKSD, context, attn_mask)
        scores = self.scores(q_BHTE, context)
        if scores["bias_factors"] is not None:
            q_BHTE, k_BKSE = with_bias(q_BHTE, k_BKSE, scores["bias_factors"], scores["scale"])
            scores["scale"] = 1.0
        return blocks.bigbird(
            q_BHTE, k_BKSE, v_BKSD, causal=context.causal, scale=scores["scale"], dropout=scores["dropout"],
            **self.fields,
        )  # fmt: skip
