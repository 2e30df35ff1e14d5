"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made of one narrow latent a token.

With c_j = norm(W_dkv x_j) of width r = kv_lora_rank, shared by all heads, and a rotated part k^R_j of width D_R that is
shared as well, head h has

    k_hj = [W_uk,h c_j, k^R_j],   v_hj = W_uv,h c_j,   q_hi = [q^C_hi, q^R_hi],   scores q·k/√(D_C + D_R).

Positions turn q^R and k^R alone, so that W_uk stands next to the query and nothing between them depends on a position.
A cache keeps c_j and k^R_j: r + D_R numbers a token, whatever the number of heads. With `q_lora_rank` the queries too
come from a normalised latent.

**Two forms, one result.** Expanded: the heads' keys and values are made, and attention is ordinary. Absorbed: as
q^C·(W_uk c) = (W_ukᵀ q^C)·c and Σ_j p_j W_uv c_j = W_uv Σ_j p_j c_j, the queries meet the latents themselves, as in
multi-query attention with one head of width r + D_R, and W_uv acts once on the result. The first spares work at each
pair of tokens, the second makes nothing for cached tokens: whichever multiplies less is taken, which is the first in
training and the second in decoding.

Names of fields are Hugging Face's (`DeepseekV2Config`). Its rotation is `rope(pairing=interleaved)`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionSpec, Context, HeadNorm, split_heads
from headwise.cache import Needs, TokenCache
from headwise.dims import Dims
from headwise.errors import Problem
from headwise.kernels import naive_wanted
from headwise.kernels.attention import naive, sdpa
from headwise.linear import Linear
from headwise.registry import register_attention
from headwise.start import Start, fill, heads_of, latent, turned_alike


class MLASpec(AttentionSpec):
    """Keys and values from one latent a token, which is all that a cache keeps (DeepSeek-V2).

    Left out, the widths are those of the paper: `kv_lora_rank` 4·head_dim, `qk_rope_head_dim` head_dim/2 (the next even
    number), `qk_nope_head_dim` and `v_head_dim` head_dim, and queries come straight from the token (`q_lora_rank`).
    `bias` is on the maps into the latents and on the output, as in Hugging Face's `attention_bias`.
    """

    kind: Literal["mla"] = "mla"
    examples: ClassVar[tuple[str, ...]] = (
        "mla(out_bias=true)",
        "mla(kv_lora_rank=12, q_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=16, bias=true, "
        "scale=0.4)",
    )
    kv_lora_rank: int | None = Field(None, gt=0)
    q_lora_rank: int | None = Field(None, gt=0)
    qk_nope_head_dim: int | None = Field(None, gt=0)
    qk_rope_head_dim: int | None = Field(None, gt=0)
    v_head_dim: int | None = Field(None, gt=0)

    def latent_dim(self, dims: Dims) -> int:
        """Width r of the latent."""
        return self.kv_lora_rank or 4 * super().heads(dims)[2]

    def nope_dim(self, dims: Dims) -> int:
        """Width D_C of the part of queries and keys that knows no positions."""
        return self.qk_nope_head_dim or super().heads(dims)[2]

    def rotary_dim(self, dims: Dims) -> int:
        D = super().heads(dims)[2]
        return self.qk_rope_head_dim or -(-D // 4) * 2

    def heads(self, dims: Dims) -> tuple[int, int, int]:
        H, _, D = super().heads(dims)
        return H, H, self.v_head_dim or D

    def key_dim(self, dims: Dims) -> int:
        return self.nope_dim(dims) + self.rotary_dim(dims)

    def check(self, dims: Dims) -> list[Problem]:
        problems = super().check(dims)
        if self.kv_heads not in (None, dims.n_heads):
            problems = [problem for problem in problems if problem.field != "kv_heads"]
            message = f"{self.kv_heads} given, but every head has keys of its own, made of the shared latent"
            problems.append(Problem("kv_heads", f"{message}; leave it out and choose kv_lora_rank"))
        if self.qk_norm:
            problems.append(Problem("qk_norm", "mla norms its latents and not the heads' keys; leave it out"))
        return problems

    def param_count(self, dims: Dims) -> int:
        H, _, D = self.heads(dims)
        E, r, s = self.key_dim(dims), self.latent_dim(dims), self.latent_dim(dims) + self.rotary_dim(dims)
        count = dims.d_model * s + r + r * H * (self.nope_dim(dims) + D) + H * D * dims.d_model
        biases = s
        if self.q_lora_rank is None:
            count += dims.d_model * H * E
        else:
            count += self.q_lora_rank * (dims.d_model + 1 + H * E)
            biases += self.q_lora_rank
        return count + biases * self.has_bias(dims) + dims.d_model * self.has_out_bias(dims)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        H, _, D = self.heads(dims)
        E, r = self.key_dim(dims), self.latent_dim(dims)
        maps = dims.d_model * (r + self.rotary_dim(dims) + H * D) + r * H * (self.nope_dim(dims) + D)
        if self.q_lora_rank is None:
            maps += dims.d_model * H * E
        else:
            maps += self.q_lora_rank * (dims.d_model + H * E)
        return 2 * maps + 2 * H * (D + E) * self.keys_seen(context, causal=causal)

    def kv_numbers_per_token(self, dims: Dims) -> int:
        return self.latent_dim(dims) + self.rotary_dim(dims)

    def kv_shape(self, dims: Dims) -> tuple[int, int, int] | None:
        """Of the expanded form, the part of the keys that knows no positions."""
        H, _, D = self.heads(dims)
        return H, self.nope_dim(dims), D


@register_attention(MLASpec)
class MLAAttention(Attention):
    """`wkv_a`: C → r + D_R, `wkv_b`: r → H·(D_C + D), `wo`: H·D → C; `wq`: C → H·(D_C + D_R), or `wq_a` to the queries'
    latent and `wq_b` from there; RMSNorms `kv_norm` and `q_norm` over the latents (ε 1e-6).

    Attributes:
        absorbed: whether to use the absorbed form; None chooses the cheaper one for each call.
    """

    read_as_matrices: ClassVar[tuple[str, ...]] = ("wkv_b",)  # not only applied, so never quantised
    absorbed: bool | None = None
    softcap = None
    sink = None

    def __init__(self, spec: MLASpec, dims: Dims) -> None:
        nn.Module.__init__(self)  # the base's maps are not these
        self.spec = spec
        self.n_heads, self.kv_heads, self.head_dim = H, _, D = spec.heads(dims)
        self.latent_dim, self.nope_dim = spec.latent_dim(dims), spec.nope_dim(dims)
        self.rope_dim = spec.rotary_dim(dims)
        self.scale = spec.scale_in_force(dims)
        C, E, bias = dims.d_model, spec.key_dim(dims), spec.has_bias(dims)
        if spec.q_lora_rank is None:
            self.wq = Linear(C, H * E, bias=False)
        else:
            self.wq_a = Linear(C, spec.q_lora_rank, bias=bias)
            self.q_norm = HeadNorm(spec.q_lora_rank)
            self.wq_b = Linear(spec.q_lora_rank, H * E, bias=False)
        self.wkv_a = Linear(C, self.latent_dim + self.rope_dim, bias=bias)
        self.kv_norm = HeadNorm(self.latent_dim)
        self.wkv_b = Linear(self.latent_dim, H * (self.nope_dim + D), bias=False)
        self.wo = Linear(H * D, C, bias=spec.has_out_bias(dims))
        self.dropout = dims.dropout if spec.dropout is None else spec.dropout
        self.out_dropout = dims.dropout

    def forward(
        self,
        x_BTC: Tensor,
        attn_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        memory_BSC: Tensor | None = None,
        return_attention_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Attention.forward`; a cache keeps the latents and the shared rotated keys, [B,1,S,r+D_R]."""
        context = context or Context()
        q = self.wq_b(self.q_norm(self.wq_a(x_BTC))) if hasattr(self, "wq_a") else self.wq(x_BTC)
        q_nope, q_rope = split_heads(q, self.n_heads).split([self.nope_dim, self.rope_dim], dim=-1)
        down_B1SL = self.wkv_a(x_BTC if memory_BSC is None else memory_BSC)[:, None]
        c_B1Sr, k_rope = down_B1SL.split([self.latent_dim, self.rope_dim], dim=-1)
        if memory_BSC is None:
            q_rope, k_rope = self.place(q_rope, context.encoding), self.place(k_rope, context.encoding)
        kept_B1SL = torch.cat([self.kv_norm(c_B1Sr), k_rope], dim=-1)
        readable = naive_wanted() or return_attention_weights
        y_BHTD, weights = self._meet(q_nope, q_rope, kept_B1SL, context, attn_mask, readable)
        y_BTF = self.told(y_BHTD.transpose(1, 2).flatten(2))
        return self._out(y_BTF), weights if return_attention_weights else None

    def _meet(
        self, q_nope: Tensor, q_rope: Tensor, kept_B1SL: Tensor, context: Context, mask: Tensor | None, readable: bool
    ) -> tuple[Tensor, Tensor | None]:
        """How queries meet what is kept of the tokens: [B,H,T,D], and the weights from the readable form."""
        T = q_nope.shape[2]
        if isinstance(cache := context.cache, TokenCache):
            if cache.attends and not readable and mask is None and self._absorbs(T, cache.length, True):
                y_BHTL = self.attend_in(cache, self._absorb(q_nope, q_rope), (kept_B1SL,), context)
                if y_BHTL is not None:
                    return self._recover(y_BHTL), None
            (kept_B1SL,) = cache.append(kept_B1SL, segments_BS=context.segments and context.segments[1])
            context = context.of_keys_in(cache)
        if not readable and self._absorbs(T, kept_B1SL.shape[2], context.causal):
            y_BHTL = self._fast(self._absorb(q_nope, q_rope), kept_B1SL, kept_B1SL, context, mask)
            return self._recover(y_BHTL), None
        q_BHTE, k_BHSE, v_BHSD = self._expanded(q_nope, q_rope, kept_B1SL)
        if not readable:
            return self._fast(q_BHTE, k_BHSE, v_BHSD, context, mask), None
        return naive.attention(
            q_BHTE, k_BHSE, v_BHSD, scale=self.scale, causal=context.causal, segments=context.segments, attn_mask=mask,
            bias_HTS=context.encoding.bias(q_BHTE, 0, T),
        )  # fmt: skip

    def cache_needs(self) -> Needs:
        return Needs(self.spec.kind, "latent")

    def _absorbs(self, n_queries: int, n_keys: int, causal: bool) -> bool:
        """Whether the absorbed form multiplies less; an observer wants to be told of keys and values."""
        if self.observer is not None:
            return False
        if self.absorbed is not None:
            return self.absorbed
        pairs = n_queries * (n_keys - (n_queries / 2 if causal else 0))
        # Making keys and values of the latents, against turning queries and results, costs the same a token and head.
        a_token = self.latent_dim * (self.nope_dim + self.head_dim)
        expanded = n_keys * a_token + pairs * (self.nope_dim + self.rope_dim + self.head_dim)
        return n_queries * a_token + pairs * (2 * self.latent_dim + self.rope_dim) < expanded

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, kept_B1SL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B,H,·,D_C+D_R] and values [B,H,S,D], one head's beside another's."""
        c_B1Sr, k_rope = kept_B1SL.split([self.latent_dim, self.rope_dim], dim=-1)
        up_BHSU = split_heads(self.wkv_b(c_B1Sr[:, 0]), self.n_heads)
        k_nope, v_BHSD = up_BHSU.split([self.nope_dim, self.head_dim], dim=-1)
        if self.observer is not None:
            T = q_nope.shape[2]
            for name, x in (("queries", q_nope), ("keys", k_nope[:, :, -T:]), ("values", v_BHSD[:, :, -T:])):
                self.observer(name, x)
        k_BHSE = torch.cat([k_nope, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)
        return torch.cat([q_nope, q_rope], dim=-1), k_BHSE, v_BHSD

    def _absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries [B,H,T,r+D_R] that meet the latents themselves.

        The latents serve as keys and as values in place, rotated part and all: what that part would add to the result
        is cut off, and no cached number is copied.
        """
        up_HDr = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))
        return torch.cat([q_nope @ up_HDr[:, : self.nope_dim].to(q_nope.dtype), q_rope], dim=-1)

    def _recover(self, y_BHTL: Tensor) -> Tensor:
        """[B,H,T,D] from what those queries gathered of the latents."""
        up_HDr = self.wkv_b.weight.unflatten(0, (self.n_heads, -1))
        return y_BHTL[..., : self.latent_dim] @ up_HDr[:, self.nope_dim :].transpose(-1, -2).to(y_BHTL.dtype)

    def _fast(self, q: Tensor, k: Tensor, v: Tensor, context: Context, attn_mask: Tensor | None) -> Tensor:
        encoding, causal = context.encoding, context.causal
        return sdpa.attention(
            q, k, v, scale=self.scale, causal=causal, bias_factors=encoding.bias_factors(q) if causal else None,
            bias_rows=None if causal else encoding.bias, segments=context.segments, attn_mask=attn_mask,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def start_from(self, old: nn.Module, start: Start) -> str | None:
        """The old heads' keys and values as one map, cut to rank r by truncated SVD; queries alike with `q_lora_rank`.

        Where positions turn pairs, those pairs whose frequencies the rotated part has become it, their keys averaged
        over the heads; the others lose their rotation (as in MHA2MLA, arXiv:2502.14837). Biases of queries and keys are
        lost. The latents' norms take away what size they have beyond the mean.
        """
        heads = heads_of(old)
        if heads is None or len(heads.wq_HDC) != self.n_heads:
            return None
        heads = heads.with_kv_heads(self.n_heads)
        D = heads.wq_HDC.shape[1]
        turned_RD = turned_alike(D, self.rope_dim, start).to(heads.wq_HDC)
        if start.pairing is None:
            turned_RD.zero_()
        still = [i for i in range(D) if not turned_RD[:, i].any()]
        names = ("wq_HDC", "wk_KDC", "bq_HD", "bk_KD")
        rest = replace(heads, **{name: getattr(heads, name)[:, still] for name in names})
        rest = rest.resized(Start(start.inputs_NC), self.nope_dim, self.head_dim)
        q_MC = (D**-0.5 / self.scale) * torch.cat([rest.wq_HDC, turned_RD @ heads.wq_HDC], dim=1).flatten(0, 1)
        kv_MC = torch.cat([rest.wk_KDC, rest.wv_KDC], dim=1).flatten(0, 1)
        into_rC, back_Mr = latent(kv_MC, self.latent_dim, start)
        k_RC = self.wkv_a.weight[self.latent_dim :].to(into_rC)
        if start.pairing is not None:
            k_RC = (turned_RD @ heads.wk_KDC).mean(0)
        fill(self.wkv_a, torch.cat([into_rC, k_RC]))
        fill(self.wkv_b, back_Mr)
        if hasattr(self, "wq_a"):
            into_qC, back_Mq = latent(q_MC, self.wq_a.out_features, start)
            fill(self.wq_a, into_qC)
            fill(self.wq_b, back_Mq)
        else:
            fill(self.wq, q_MC)
        # Weights add up to 1, so that a bias of the values is one of the output.
        fill(self.wo, rest.wo_CHD.flatten(1), rest.bo_C + torch.einsum("chd,hd->c", rest.wo_CHD, rest.bv_KD))
        return f"its keys and values cut to rank {self.latent_dim}"
