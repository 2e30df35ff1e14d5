"""What attention mechanisms share: query, key, value and output projections, head widths, positions, the cache.

A mechanism overrides `attend` (how queries, keys and values meet) and, where it costs or keeps something else than
softmax attention does, the closed forms of its spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from headwise.cache import AnyLayerCache, Needs, TokenCache, new_layer_cache
from headwise.dims import Dims
from headwise.errors import Problem, SpecError, short
from headwise.kernels import naive_wanted
from headwise.kernels.attention import naive, sdpa
from headwise.kernels.rms_norm import rms_norm
from headwise.kernels.segments import Pattern, keep_by, runs, segment_positions
from headwise.kernels.together import products
from headwise.linear import Linear
from headwise.position import Encoding, SomeKeys
from headwise.registry import ComponentSpec

# As many pairs of tokens as are attended to in the time that it takes to start the kernels for one more document.
PAIRS_A_DOCUMENT = 1 << 14


def _qk_norm(value: Any) -> Any:
    """What the field takes; a union's own complaint would come once for each of its parts."""
    if value == "full" or isinstance(value, bool):
        return value
    raise SpecError([Problem("", f"{short(value)} given; allowed: true, false, full")])


class AttentionSpec(ComponentSpec):
    """Fields of every attention: `kv_heads` (None: n_heads), `head_dim` (None: d_model / n_heads), `bias` and `dropout`
    (None: the model's), `out_bias` (of `wo`; None: as `bias`), `qk_norm` (an RMSNorm over each head's queries and keys,
    Qwen 3; "full": over all heads' side by side, OLMo 2), `scale` (what q·k is multiplied by; None: 1/√ of the width of
    q). `takes_bias` marks those with scores that a position code may add to, `takes_scale` those that multiply q·k by a
    scale."""

    takes_bias: ClassVar[bool] = True
    takes_scale: ClassVar[bool] = True
    kv_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: Annotated[bool | Literal["full"], BeforeValidator(_qk_norm)] = False
    scale: float | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)

    def heads(self, dims: Dims) -> tuple[int, int, int]:
        """(n_heads, kv_heads, head_dim) in force."""
        return dims.n_heads, self.kv_heads or dims.n_heads, self.head_dim or dims.head_dim

    def key_dim(self, dims: Dims) -> int:
        """Width of one head's queries and keys; values are `head_dim` wide."""
        return self.heads(dims)[2]

    def rotary_dim(self, dims: Dims) -> int:
        """Width of what the position code may turn of each query and key."""
        return self.key_dim(dims)

    def has_bias(self, dims: Dims) -> bool:
        """Whether the projections have biases."""
        return dims.bias if self.bias is None else self.bias

    def has_out_bias(self, dims: Dims) -> bool:
        """Whether the output projection has one."""
        return self.has_bias(dims) if self.out_bias is None else self.out_bias

    def scale_in_force(self, dims: Dims) -> float:
        """What q·k is multiplied by."""
        return self.key_dim(dims) ** -0.5 if self.scale is None else self.scale

    def check(self, dims: Dims) -> list[Problem]:
        problems = []
        if self.head_dim is None and dims.d_model % dims.n_heads:
            problems.append(
                Problem("head_dim", f"d_model={dims.d_model} does not divide by n_heads={dims.n_heads}; give head_dim")
            )
        if dims.n_heads % (self.kv_heads or 1):
            options = [k for k in range(1, dims.n_heads + 1) if dims.n_heads % k == 0]
            problems.append(
                Problem("kv_heads", f"{self.kv_heads} does not divide n_heads={dims.n_heads}; allowed: {options}")
            )
        if self.scale is not None and not self.takes_scale:
            message = f"{self.scale} given, but {self.kind} does not multiply q·k by a scale; leave it out"
            problems.append(Problem("scale", message))
        return problems

    def param_count(self, dims: Dims) -> int:
        (H, K, D), E = self.heads(dims), self.key_dim(dims)
        matrices = dims.d_model * (H + K) * (D + E)
        biases = ((H + K) * E + K * D) * self.has_bias(dims) + dims.d_model * self.has_out_bias(dims)
        return matrices + biases + self.qk_norm_params(dims)

    def qk_norm_params(self, dims: Dims) -> int:
        """Gains of the norms over queries and keys."""
        H, K, _ = self.heads(dims)
        return self.key_dim(dims) * {False: 0, True: 2, "full": H + K}[self.qk_norm]

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        (H, K, D), E = self.heads(dims), self.key_dim(dims)
        return 2 * (H + K) * dims.d_model * (D + E) + 2 * H * (D + E) * self.keys_seen(context, causal=causal)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        """Keys that a query meets, on average over `context` positions; a causal triangle counts as exactly half."""
        return context / 2 if causal else float(context)

    def kv_numbers_per_token(self, dims: Dims) -> int:
        """Numbers that one layer's cache keeps for one token."""
        _, K, D = self.heads(dims)
        return K * (self.key_dim(dims) + D)

    def kv_shape(self, dims: Dims) -> tuple[int, int, int] | None:
        """(key/value heads, width of a key, width of a value) of what an observer is told; None where the layer has no
        keys and values that a cache keeps for each token."""
        _, K, D = self.heads(dims)
        return K, self.key_dim(dims), D

    def state_numbers(self, dims: Dims) -> int:
        """Numbers that one layer's cache keeps whatever the number of tokens: a recurrence's state."""
        return 0

    def tokens_cached(self, context: int) -> int:
        """Tokens whose keys and values are still needed after `context` tokens."""
        return context


class ScoreSpec(AttentionSpec):
    """Fields of the kinds that may change their scores: `softcap` c (scores become c·tanh(score/c), Gemma 2) and `sink`
    (a learned score a head in the softmax's denominator, without a value, gpt-oss)."""

    softcap: float | None = Field(None, gt=0)
    sink: bool = False

    def param_count(self, dims: Dims) -> int:
        return super().param_count(dims) + (dims.n_heads if self.sink else 0)


class Context(NamedTuple):
    """What a layer is told of the tokens besides their vectors.

    Attributes:
        causal: whether a token sees only itself and those before it.
        encoding: the position code, made ready for this pass's tokens.
        segments: int64 (queries [B,T], keys [B,S]); a token sees only keys of its own segment.
        cache: where this layer keeps what later tokens need.
        positions: the keys' places in their segments, int64 [S] or [B,S], where these are not all that went before.
    """

    causal: bool = False
    encoding: Encoding = Encoding()
    segments: tuple[Tensor, Tensor] | None = None
    cache: AnyLayerCache | None = None
    positions: Tensor | None = None

    def of_keys_in(self, cache: TokenCache) -> Context:
        """The same for the keys that a cache has handed over, which may be some of all, or rows of unequal length."""
        segments, places = self.segments or cache.padding, cache.places
        if places is None:
            return self._replace(segments=segments)
        positions = places
        if segments is not None:
            positions = segment_positions(segments[1])[:, places]
            segments = (segments[0], segments[1][:, places])
        return self._replace(encoding=SomeKeys(self.encoding, places), segments=segments, positions=positions)


# Told of a pass's "queries" [B,H,T,E], "keys" [B,K,T,E] and "values" [B,K,T,D] before positions are worked in, and of
# the heads' "outputs" [B,H,T,D] as they go into `wo`. Of recurrent kinds the outputs alone are comparable.
Observer = Callable[[str, Tensor], None]


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[B,T,heads·D] → [B,heads,T,D]."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


class HeadNorm(nn.Module):
    """An RMSNorm over each head's queries or keys (Qwen 3), or over those of all heads side by side (OLMo 2)."""

    def __init__(self, width: int, eps: float | None = None, unit_offset: bool = False) -> None:
        super().__init__()
        self.eps = 1e-6 if eps is None else eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - unit_offset))

    def gain(self) -> Tensor:
        """What the normed numbers are multiplied by."""
        return self.weight + self.unit_offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


class Attention(nn.Module):
    """Projections around a mechanism's `attend`.

    `wq`: C → H·E, `wk`: C → K·E, `wv`: C → K·D, `wo`: H·D → C; E is the spec's `key_dim`, by default D. `window` is how
    many keys a query sees; None: all. `pattern` says which of them, by positions in the segment; None: each. `direct`
    marks a layer whose queries meet its keys as `sdpa.attention` has it, so that a cache may do that itself. `observer`
    is told what passes through.
    """

    side_by_side: ClassVar[tuple[str, ...]] = ("wq", "wk", "wv")  # maps of one input
    window: int | None = None
    pattern: Pattern | None = None
    direct: bool = False
    observer: Observer | None = None
    sink: nn.Parameter | None

    def __init__(self, spec: AttentionSpec, dims: Dims) -> None:
        super().__init__()
        self.spec = spec
        self.n_heads, self.kv_heads, self.head_dim = H, K, D = spec.heads(dims)
        E, bias = spec.key_dim(dims), spec.has_bias(dims)
        self.wq = Linear(dims.d_model, H * E, bias=bias)
        self.wk = Linear(dims.d_model, K * E, bias=bias)
        self.wv = Linear(dims.d_model, K * D, bias=bias)
        self.wo = Linear(H * D, dims.d_model, bias=spec.has_out_bias(dims))
        if spec.qk_norm:
            widths = (H * E, K * E) if spec.qk_norm == "full" else (E, E)
            self.q_norm, self.k_norm = (HeadNorm(w, dims.norm_eps, dims.norm_unit_offset) for w in widths)
        self.scale = spec.scale_in_force(dims)
        self.direct = type(self).attend is Attention.attend and type(self).fast is Attention.fast
        scores = spec if isinstance(spec, ScoreSpec) else None
        self.softcap = scores.softcap if scores else None
        self.register_parameter("sink", nn.Parameter(torch.zeros(H)) if scores and scores.sink else None)
        self.dropout = dims.dropout if spec.dropout is None else spec.dropout
        self.out_dropout = dims.dropout

    def cache_needs(self) -> Needs:
        """What this layer asks of a cache: here to keep the keys and values of every token."""
        return Needs(self.spec.kind, window=self.window)

    def new_cache(self, kind: str = "auto", **options: Any) -> AnyLayerCache:
        """An empty cache for this layer, by default of the kind it decodes best with. Raises as `new_layer_cache`."""
        return new_layer_cache(self.cache_needs(), kind, **options)

    def forward(
        self,
        x_BTC: Tensor,
        attn_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        memory_BSC: Tensor | None = None,
        return_attention_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of `x_BTC`, or look from them at `memory_BSC` (cross-attention).

        Args:
            x_BTC: float [B,T,C].
            attn_mask: added to the scores (or True = keep, where boolean), broadcast to [B,H,T,S].
            context: causality, positions, segments and cache; without it, plain bidirectional attention.
            memory_BSC: float [B,S,C], what keys and values are made of in place of x.
            return_attention_weights: also return the weights [B,H,T,S]; this runs the readable form.
        """
        context = context or Context()
        q_BHTE, k_BKSE, v_BKSD = self._heads(x_BTC, context, memory_BSC)
        y_BHTD = weights = None
        if isinstance(cache := context.cache, TokenCache):
            if self.direct and attn_mask is None and not return_attention_weights:
                y_BHTD = self.attend_in(cache, q_BHTE, (k_BKSE, v_BKSD), context)
            if y_BHTD is None:
                k_BKSE, v_BKSD = cache.append(k_BKSE, v_BKSD, segments_BS=context.segments and context.segments[1])
                context = context.of_keys_in(cache)
        if y_BHTD is None:
            y_BHTD, weights = self.attend(q_BHTE, k_BKSE, v_BKSD, context, attn_mask, return_attention_weights)
        return self._out(self.told(self.gate(y_BHTD.transpose(1, 2).flatten(2), x_BTC))), weights

    def told(self, y_BTF: Tensor) -> Tensor:
        """The heads' outputs side by side [B,T,H·D], as they are, once the observer has them."""
        if self.observer is not None:
            self.observer("outputs", split_heads(y_BTF, self.n_heads))
        return y_BTF

    def attend_in(self, cache: TokenCache, q_BHTE: Tensor, new: tuple[Tensor, ...], context: Context) -> Tensor | None:
        """[B,H,T,D] where the cache itself lets queries meet the tokens it keeps; else None, and nothing is stored."""
        if not cache.attends or naive_wanted() or context.segments is not None or (self.training and self.dropout):
            return None
        return cache.attend(
            q_BHTE, new, scale=self.scale, window=self.window, softcap=self.softcap, sink_H=self.sink,
            bias_factors=context.encoding.bias_factors(q_BHTE),
        )  # fmt: skip

    def gate(self, y_BTF: Tensor, x_BTC: Tensor) -> Tensor:
        """The heads' outputs side by side [B,T,H·D] as they go into `wo`; here as they are."""
        return y_BTF

    def _heads(self, x_BTC: Tensor, context: Context, memory_BSC: Tensor | None = None) -> tuple[Tensor, ...]:
        """Queries [B,H,T,E], keys [B,K,S,E] and values [B,K,S,D] of the pass's own tokens, normed and placed."""
        q, k, v = self._project(x_BTC, x_BTC if memory_BSC is None else memory_BSC)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHTE, k_BKSE, v_BKSD = (
            split_heads(q, self.n_heads),
            split_heads(k, self.kv_heads),
            split_heads(v, self.kv_heads),
        )
        if self.spec.qk_norm is True:
            q_BHTE, k_BKSE = self.q_norm(q_BHTE), self.k_norm(k_BKSE)
        if self.observer is not None:
            for name, x in (("queries", q_BHTE), ("keys", k_BKSE), ("values", v_BKSD)):
                self.observer(name, x)
        if memory_BSC is None:
            q_BHTE, k_BKSE = self.place(q_BHTE, context.encoding), self.place(k_BKSE, context.encoding)
        return q_BHTE, k_BKSE, v_BKSD

    def place(self, x_BHTE: Tensor, encoding: Encoding) -> Tensor:
        """Queries or keys with their positions worked in, where the position code does that."""
        return encoding.rotate(x_BHTE)

    def _out(self, y_BTF: Tensor) -> Tensor:
        """The heads' outputs side by side [B,T,H·D], back to the residual stream [B,T,C]."""
        y_BTC = self.wo(y_BTF)
        return F.dropout(y_BTC, self.out_dropout, self.training) if self.out_dropout else y_BTC

    def _project(self, x_BTC: Tensor, source_BSC: Tensor) -> tuple[Tensor, ...]:
        """Queries [B,T,H·E] of x, keys [B,S,K·E] and values [B,S,K·D] of the source."""
        maps = (self.wq, self.wk, self.wv)
        if source_BSC is not x_BTC:
            return tuple(w(h_BTC) for w, h_BTC in zip(maps, (x_BTC, source_BSC, source_BSC)))
        if not torch.is_grad_enabled() or not isinstance(self.wq, nn.Linear):
            return products(x_BTC, *maps)
        # In training one product with the maps side by side is worth a copy of the weights: about 2 % of a small
        # model's step. In decoding the copy would double the traffic of memory.
        weight = torch.cat([w.weight for w in maps])
        bias = torch.cat([w.bias for w in maps]) if self.wq.bias is not None else None
        return F.linear(x_BTC, weight, bias).split([w.out_features for w in maps], dim=-1)

    def attend(
        self,
        q_BHTD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        context: Context,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """How queries, keys and values meet: [B,H,T,D], and the weights where they are wanted.

        Here by softmax: the fused kernel, or the readable one inside `kernels.naive()` and where weights are wanted.
        """
        encoding, T, S = context.encoding, q_BHTD.shape[2], k_BKSD.shape[2]
        if not naive_wanted() and not need_weights:
            return self.fast(q_BHTD, k_BKSD, v_BKSD, context, attn_mask), None
        keep = None
        if self.pattern is not None:
            keep = keep_by(self.pattern, T, S, context.segments, q_BHTD.device, context.positions)(0, T)
        y, weights = naive.attention(
            q_BHTD, k_BKSD, v_BKSD, scale=self.scale, causal=context.causal, window=self.window,
            keep=keep, softcap=self.softcap, sink_H=self.sink, bias_HTS=encoding.bias(q_BHTD, 0, T),
            segments=context.segments, attn_mask=attn_mask,
        )  # fmt: skip
        return y, weights if need_weights else None

    def fast(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, attn_mask: Tensor | None
    ) -> Tensor:
        """What `attend` computes, on the fused kernel; a pattern is looked up here, a block of rows at a time."""
        keep = None
        if self.pattern is not None:
            documents = self._documents(q_BHTE, k_BKSE, context, attn_mask)
            if documents is not None:
                return self._one_by_one(q_BHTE, k_BKSE, v_BKSD, Context(causal=context.causal), documents)
            T, S = q_BHTE.shape[2], k_BKSE.shape[2]
            keep = keep_by(self.pattern, T, S, context.segments, q_BHTE.device, context.positions)
        return sdpa.attention(
            q_BHTE, k_BKSE, v_BKSD, window=self.window, keep=keep, segments=context.segments, attn_mask=attn_mask,
            **self.scores(q_BHTE, context),
        )  # fmt: skip

    def _one_by_one(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSD: Tensor, context: Context, documents: list[list[tuple[int, int]]]
    ) -> Tensor:
        """`fast` over each row's documents, which lie from start to stop and see nothing of each other."""

        def of(b: int, start: int, stop: int) -> Tensor:
            place = slice(b, b + 1), slice(None), slice(start, stop)
            return self.fast(q_BHTE[place], k_BKSE[place], v_BKSD[place], context, None)

        return torch.cat([torch.cat([of(b, *ends) for ends in row], 2) for b, row in enumerate(documents)])

    def _documents(
        self, q_BHTE: Tensor, k_BKSE: Tensor, context: Context, attn_mask: Tensor | None
    ) -> list[list[tuple[int, int]]] | None:
        """Where each row's documents lie, if the pattern is cheaper in one at a time than in all rows as a whole.

        A pattern's own kernel knows one sequence. The whole row, where each token's document is looked up, costs the
        square of its length.
        """
        B, _, T, _ = q_BHTE.shape
        if context.segments is None or attn_mask is not None or k_BKSE.shape[2] != T or context.positions is not None:
            return None
        if torch.compiler.is_compiling() or T**2 < PAIRS_A_DOCUMENT:
            return None
        encoding = context.encoding
        if encoding.bias_factors(q_BHTE) is not None or encoding.bias(q_BHTE, 0, 0) is not None:
            return None
        found = runs(context.segments[1])
        worth_it = found is not None and PAIRS_A_DOCUMENT * sum(map(len, found)) < B * T**2
        return found if worth_it else None

    def scores(self, q_BHTE: Tensor, context: Context) -> dict[str, Any]:
        """How scores become weights, as the fast kernels take it."""
        return {
            "scale": self.scale,
            "causal": context.causal,
            "softcap": self.softcap,
            "sink_H": self.sink,
            "bias_factors": context.encoding.bias_factors(q_BHTE) if context.causal else None,
            "bias_rows": None if context.causal else context.encoding.bias,
            "dropout": self.dropout if self.training else 0.0,
        }

    def biases_rows(self, q_BHTE: Tensor, context: Context) -> bool:
        """Whether the position code adds to the scores what does not split into a query's part and a key's."""
        return not context.causal and context.encoding.bias(q_BHTE, 0, 0) is not None
