"""Tri-vein attention (document 000): queries, keys and values all pass through a low-rank vein of width r.

Softmax attention among r-wide vectors, scale 1/√r, r numbers a head in the cache for each of K and V. Two veins:

* `vein="head"`: one projector of a head's width D, shared by all heads and by queries, keys and values,

      q_h = V Wq_h x,  k_h = V Wk_h x,  v_h = V Wv_h x,  y = Wo concat_h(U A_h v_h),  A_h = softmax(q_h·k_h/√r + bias)

* `vein="model"`: one projector of the model's width C: z = Vx once, then maps inside the vein,

      q_h = Wq_h z,  k_h = Wk_h z,  v_h = Wv_h z,  y = U Σ_h Wo_h A_h v_h,  every W… r×r: no C×C matrix at all

**Folding.** Nothing stands between Wq and V, nor between U and Wo. So a head-wide layer equals one whose queries are
made by the r×C map V Wq_h and whose output by the C×r map Wo_h U: 4·C·H·r weights in place of 4·C² + 2·D·r. `fold()`
makes that layer; `folded=True` trains it directly. An unfolded layer multiplies its maps together first wherever there
are tokens enough to pay for that: the readable form (`kernels.naive()`) is the one above, the fast form the folded one.

A position code that turns (RoPE) acts on the r-wide vectors, behind the vein; of an odd rank the last dimension does
not turn. Biases and `qk_norm` work as in softmax attention, the norm on the r-wide vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionSpec
from headwise.cache import Needs
from headwise.dims import Dims
from headwise.errors import HeadwiseError, Problem, SpecError
from headwise.kernels import naive_wanted
from headwise.linear import Linear
from headwise.registry import register_attention
from headwise.start import Start, bottleneck, fill, heads_of, lift
from headwise.vein import VeinInnerMap, VeinProjector, rank_problems


class TVASpec(AttentionSpec):
    """Attention inside a low-rank vein of `rank` numbers a head (document 000); folds into thin maps.

    `vein` says what is projected (`head`: each head's vectors, `model`: the whole stream), `folded` trains the thin
    maps themselves. `implementation`, `init_method` and `tied_start` are the projector's.
    """

    kind: Literal["tva"] = "tva"
    positional: ClassVar[tuple[str, ...]] = ("rank",)
    examples: ClassVar[tuple[str, ...]] = (
        "tva(rank=4)",
        "tva(rank=3, vein=model, qk_norm=full, out_bias=true)",
        "tva(rank=6, kv_heads=2, folded=true, scale=0.5)",
    )
    rank: int = Field(8, gt=0)
    vein: Literal["head", "model"] = "head"
    folded: bool = False
    implementation: Literal["linear", "parameter"] = "linear"
    init_method: Literal["orthogonal", "normal", "xavier"] = "orthogonal"
    tied_start: bool = True

    def heads(self, dims: Dims) -> tuple[int, int, int]:
        return dims.n_heads, self.kv_heads or dims.n_heads, self.rank

    def rotary_dim(self, dims: Dims) -> int:
        return self.rank - self.rank % 2

    def vein_width(self, dims: Dims) -> int:
        """What the projector projects: a head's width D or the model's C."""
        return dims.d_model if self.vein == "model" else self.head_dim or dims.head_dim

    def check(self, dims: Dims) -> list[Problem]:
        problems = super().check(dims)
        if not problems:
            what = "d_model" if self.vein == "model" else "head_dim"
            problems = rank_problems(self.rank, self.vein_width(dims), what=what)
        if self.folded and self.vein == "model":
            problems.append(Problem("folded", "only vein=head folds; a model-wide vein has no wide maps to fold"))
        return problems

    def param_count(self, dims: Dims) -> int:
        (H, K, r), C, width = self.heads(dims), dims.d_model, self.vein_width(dims)
        if self.vein == "model":
            stream, own, vein = r, r, 2 * C * r
        else:
            stream, own, vein = (C, r, 0) if self.folded else (C, width, 2 * width * r)
        biases = (H + 2 * K) * own * self.has_bias(dims) + stream * self.has_out_bias(dims)
        return 2 * stream * (H + K) * own + vein + biases + self.qk_norm_params(dims)

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        """Of the layer as written: an unfolded one runs with fewer, for it multiplies its maps together first."""
        (H, K, r), C, D = self.heads(dims), dims.d_model, self.vein_width(dims)
        if self.vein == "model":
            maps = C * r + (H + K) * r * r
        else:
            maps = (H + K) * (C * r if self.folded else D * (C + r))
        return 4 * maps + 4 * H * r * self.keys_seen(context, causal=causal)


@register_attention(TVASpec)
class TVA(Attention):
    """`wq`, `wk`, `wv`, `wo` around the vein, which is absent from a folded layer.

    Args:
        spec, dims: as every attention takes.
        vein: a projector to share with other modules, of the spec's rank and width; None makes one.
    """

    spec: TVASpec
    vein: VeinProjector | None

    def __init__(self, spec: TVASpec, dims: Dims, vein: VeinProjector | None = None) -> None:
        C, width = dims.d_model, spec.vein_width(dims)
        if vein is not None and (spec.folded or (vein.rank, vein.d_model) != (spec.rank, width)):
            wanted = "no vein: it is folded" if spec.folded else f"rank {spec.rank} and width {width}"
            given = f"a projector of rank {vein.rank} and width {vein.d_model} given"
            raise SpecError([Problem("vein_projector", f"{given}, but this layer needs {wanted}")])
        # Inside a model-wide vein the stream is r wide, and the base's projections are those of an r-wide model.
        super().__init__(spec, replace(dims, d_model=spec.rank) if spec.vein == "model" else dims)
        self.dims = dims
        bias, H, K = spec.has_bias(dims), self.n_heads, self.kv_heads
        self.vein = None
        if spec.vein == "model":
            for name in ("wq", "wk", "wv", "wo"):
                old = getattr(self, name)
                setattr(self, name, VeinInnerMap(old.in_features, old.out_features, bias=old.bias is not None))
        elif not spec.folded:
            self.wq, self.wk, self.wv = (Linear(C, n * width, bias=bias) for n in (H, K, K))
            self.wo = Linear(H * width, C, bias=spec.has_out_bias(dims))
        if not spec.folded:
            self.vein = vein or VeinProjector(width, spec.rank, spec.implementation, spec.init_method, spec.tied_start)

    def cache_needs(self) -> Needs:
        return Needs(self.spec.kind, "latent")

    def _project(self, x_BTC: Tensor, source_BSC: Tensor) -> tuple[Tensor, ...]:
        """Queries [B,T,H·r] of x, keys and values [B,S,K·r] of the source, in the vein."""
        if self.vein is None:
            return super()._project(x_BTC, source_BSC)
        if self.spec.vein == "model":
            z_BTr = self.vein.project(x_BTC)
            return super()._project(z_BTr, z_BTr if source_BSC is x_BTC else self.vein.project(source_BSC))
        maps, counts = (self.wq, self.wk, self.wv), (self.n_heads, self.kv_heads, self.kv_heads)
        sources = (x_BTC, source_BSC, source_BSC)
        if not self._folding_pays(x_BTC):
            return tuple(
                self.vein.project(w(h).unflatten(-1, (n, -1))).flatten(-2) for w, h, n in zip(maps, sources, counts)
            )
        if source_BSC is not x_BTC:
            return tuple(F.linear(h, *self._into(w, n)) for w, h, n in zip(maps, sources, counts))
        folded = [self._into(w, n) for w, n in zip(maps, counts)]
        biases = [b for _, b in folded if b is not None]
        y = F.linear(x_BTC, torch.cat([w for w, _ in folded]), torch.cat(biases) if biases else None)
        return y.split([w.shape[0] for w, _ in folded], dim=-1)

    def _out(self, y_BTF: Tensor) -> Tensor:
        """The heads' r-wide outputs side by side [B,T,H·r], back to the residual stream [B,T,C]."""
        if self.vein is None:
            return super()._out(y_BTF)
        if self.spec.vein == "model":
            y_BTC = self.vein.reconstruct(self.wo(y_BTF))
        elif self._folding_pays(y_BTF):
            y_BTC = F.linear(y_BTF, self._out_of(), self.wo.bias)
        else:
            y_BTC = self.wo(self.vein.reconstruct(y_BTF.unflatten(-1, (self.n_heads, -1))).flatten(-2))
        return F.dropout(y_BTC, self.out_dropout, self.training) if self.out_dropout else y_BTC

    def _folding_pays(self, x_BTF: Tensor) -> bool:
        """Whether multiplying the maps together (r·D·C a head) costs less than it saves over the tokens at hand."""
        C, D, r = self.dims.d_model, self.spec.vein_width(self.dims), self.spec.rank
        return not naive_wanted() and x_BTF.shape[:-1].numel() * (D * (C + r) - r * C) > r * D * C

    def _into(self, wide: nn.Linear, n_heads: int) -> tuple[Tensor, Tensor | None]:
        """V W_h of every head, [heads·r,C], and V b_h, [heads·r]."""
        assert self.vein is not None
        v_rD = self.vein.v_rC
        weight = (v_rD @ wide.weight.unflatten(0, (n_heads, -1))).flatten(0, 1)
        bias = None if wide.bias is None else (wide.bias.unflatten(0, (n_heads, -1)) @ v_rD.T).flatten()
        return weight, bias

    def _out_of(self) -> Tensor:
        """Wo_h U of every head, [C,H·r]."""
        assert self.vein is not None
        # Transposed, for a product that is r numbers wide runs three times slower than one that is r rows high.
        return (self.vein.u_Cr.T @ self.wo.weight.T.unflatten(0, (self.n_heads, -1))).flatten(0, 1).T

    @torch.no_grad()
    def fold(self) -> TVA:
        """The same layer, with thin maps in place of wide ones and a vein: equal to rounding, 4·C·H·r weights.

        Returns a new module on the same device, in the same dtype; a folded layer gives itself back.

        Raises:
            HeadwiseError: the vein is model-wide, so there are no wide maps to fold.
        """
        if self.vein is None:
            return self
        if self.spec.vein == "model":
            raise HeadwiseError("tva(vein=model) does not fold, for it has no wide maps; vein=head does")
        folded = TVA(self.spec.model_copy(update={"folded": True}), self.dims).to(self.wq.weight).train(self.training)
        for name, n_heads in (("wq", self.n_heads), ("wk", self.kv_heads), ("wv", self.kv_heads)):
            weight, bias = self._into(getattr(self, name), n_heads)
            thin = getattr(folded, name)
            thin.weight.copy_(weight)
            if bias is not None:
                thin.bias.copy_(bias)
        folded.wo.weight.copy_(self._out_of())
        if self.wo.bias is not None:
            folded.wo.bias.copy_(self.wo.bias)
        if self.spec.qk_norm:
            folded.q_norm.load_state_dict(self.q_norm.state_dict())
            folded.k_norm.load_state_dict(self.k_norm.state_dict())
        return folded

    def start_from(self, old: nn.Module, start: Start) -> str | None:
        """Each head's queries and keys, and its values and output, cut to rank r where that changes scores and results
        least; where positions turn pairs, the pairs whose frequencies the vein's positions have.
        """
        heads = heads_of(old)
        if heads is None or len(heads.wq_HDC) != self.n_heads:
            return None
        before, rank = len(heads.wk_KDC), self.spec.rank
        if max(before, self.kv_heads) % min(before, self.kv_heads):
            return None
        thin = heads.with_kv_heads(self.kv_heads).resized(start, rank, rank)
        scale = heads.wq_HDC.shape[1] ** -0.5 / self.scale  # products are divided by √D there
        weights, biases = [thin.wq_HDC * scale, thin.wk_KDC, thin.wv_KDC], [thin.bq_HD * scale, thin.bk_KD, thin.bv_KD]
        out_CHr, out_bias = thin.wo_CHD, thin.bo_C
        if self.vein is not None and self.spec.vein == "head":
            # Into the vein and out of it again nothing is lost: V V⁺ = U⁺ U = 1.
            back_Dr, on_rD = (torch.linalg.pinv(each.double()) for each in (self.vein.v_rC, self.vein.u_Cr))
            weights, biases = [back_Dr @ w for w in weights], [b @ back_Dr.T for b in biases]
            out_CHr = out_CHr @ on_rD
        elif self.vein is not None:
            all_MC = torch.cat([w.flatten(0, 1) for w in weights])
            _, into = bottleneck(all_MC.T @ all_MC, start.moments_CC(), rank)
            v_rC = torch.linalg.qr(into.T)[0].T
            self.vein.v_rC.copy_(v_rC)
            u_Cr = torch.linalg.svd(out_CHr.flatten(1), full_matrices=False)[0][:, :rank]
            self.vein.u_Cr.copy_(u_Cr)
            weights = [lift(w.flatten(0, 1), v_rC, start).unflatten(0, (len(w), -1)) for w in weights]
            out_CHr, out_bias = torch.einsum("cr,chd->rhd", u_Cr, out_CHr), out_bias @ u_Cr
        for linear, weight, bias in zip((self.wq, self.wk, self.wv), weights, biases):
            fill(linear, weight.flatten(0, 1), bias.flatten())
        fill(self.wo, out_CHr.flatten(1), out_bias)
        return f"its heads cut to rank {rank}"
