"""Document 003's building blocks under the document's names, each made of the registry's own modules.

    block = W2TransformerBlock(config)
    cos, sin = RotaryEmbedding(head_dim)(hidden_states, seq_len=seq_len)
    out = block(hidden_states=hidden_states, rotary_emb_outputs=(cos, sin))

`config` is any object with the attributes of `W2Config`; only the first three are needed. Blocks stand alone, in any
PyTorch model, and are initialised from torch's global generator. Their tensors have the names and shapes of those in
`llama(attention=w2(sigma_dim=head_dim))`. What is computed stands in `attention/w2.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.attention import Context
from headwise.attention.w2 import W2Attention as RegistryW2Attention
from headwise.attention.w2 import W2Spec
from headwise.dims import Dims
from headwise.errors import HeadwiseError, Problem, SpecError, short
from headwise.kernels.rotary import fast
from headwise.position import Encoding
from headwise.registry import ATTENTION, FFN, NORM, POSITION

__all__ = ["RotaryEmbedding", "W2Attention", "W2Config", "W2TransformerBlock"]


@dataclass(frozen=True)
class W2Config:
    """What a block is made from; an object with the first three attributes will do.

    Attributes:
        hidden_size, num_attention_heads, intermediate_size, rms_norm_eps: widths, and the norms' ε.
        mu_dim, sigma_dim: widths of each head's means and deviations; None: head_dim, as document 003 has them.
        score, tau: as in `W2Spec`.
        is_causal: whether a token sees only itself and those before it.
    """

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    mu_dim: int | None = None
    sigma_dim: int | None = None
    score: Literal["w2", "precision"] = "w2"
    tau: Literal["layer", "head", "fixed"] = "layer"
    is_causal: bool = False


def _read(config: Any) -> W2Config:
    """The configuration with all its attributes, from an object that may lack those with defaults."""
    fields = W2Config.__dataclass_fields__
    given = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    widths = ("hidden_size", "num_attention_heads", "intermediate_size")
    problems = [
        Problem(name, f"a positive whole number is wanted, not {short(given[name])}" if name in given else "missing")
        for name in widths
        if not isinstance(given.get(name), int) or given[name] < 1
    ]
    if problems:
        raise SpecError(problems, where="config")
    return W2Config(**given)


class _Turned(Encoding):
    """Rotary positions from cosines and sines that were computed outside."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        T, D = x_BHTD.shape[-2:]
        for name, table in (("cos", self.cos), ("sin", self.sin)):
            if table.dim() < 2 or table.shape[-2:] != (T, D):
                raise HeadwiseError(
                    f"rotary_emb_outputs: {name} is {list(table.shape)}, but the means are [{T} tokens, {D}]; "
                    f"use RotaryEmbedding({D}) with seq_len={T}"
                )
        wide = torch.promote_types(x_BHTD.dtype, torch.float32)
        cos, sin = self.cos.to(wide), self.sin.to(wide)
        sin = torch.cat([-sin[..., : D // 2], sin[..., D // 2 :]], dim=-1)
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        return fast.rotate(x_BHTD.to(wide), cos, sin, interleaved=False).to(x_BHTD.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary angles, for blocks to share; `head_dim` is the width of what turns (D_μ).

    Raises:
        SpecError: `head_dim` is no positive even number.
    """

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
            raise SpecError(f"head_dim={short(head_dim)}: rotary positions turn pairs, so an even width is wanted")
        self.head_dim = head_dim
        self.position = POSITION.build({"kind": "rope", "base": base}, Dims(head_dim, 1))

    def forward(self, hidden_states: Tensor, seq_len: int | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [seq_len, head_dim] in float32, or float64 where the input is.

        Args:
            hidden_states: [B,T,C], whose device is taken, and whose length where `seq_len` is not given.
            seq_len: how many positions, from 0.
        """
        seq_len = hidden_states.shape[1] if seq_len is None else seq_len
        positions = torch.arange(seq_len, device=hidden_states.device)
        angles = self.position.encode(positions, seq_len, self.head_dim).angles.repeat(1, 2)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class W2Attention(RegistryW2Attention):
    """Wasserstein-2 attention from a configuration.

    Raises:
        SpecError: the configuration lacks a width, or its widths do not fit.
    """

    def __init__(self, config: Any) -> None:
        config = _read(config)
        dims = Dims(config.hidden_size, config.num_attention_heads)
        fields = {
            "mu_dim": config.mu_dim or dims.head_dim,
            "sigma_dim": config.sigma_dim or dims.head_dim,
            "score": config.score,
            "tau": config.tau,
        }
        spec = ATTENTION.spec({"kind": "w2", **fields})
        assert isinstance(spec, W2Spec)
        if problems := spec.check(dims):
            raise SpecError(problems, where="config")
        super().__init__(spec, dims)
        self.is_causal = config.is_causal

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        rotary_emb_outputs: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[B,T,hidden_size] → the same.

        Args:
            hidden_states: float [B,T,hidden_size].
            rotary_emb_outputs: (cos, sin) of the means' positions, [T,mu_dim] or with a batch in front; None: no
                positions.
            attention_mask: [B,T], 1 for text and 0 for padding; or what broadcasts to [B,heads,T,T]: True to keep, or
                floats to add to the scores. Without one, and unless `is_causal`, every token sees all.
        """
        encoding = _Turned(*rotary_emb_outputs) if rotary_emb_outputs is not None else Encoding()
        segments = None
        if attention_mask is not None and attention_mask.shape == hidden_states.shape[:2]:
            # Padding sees padding: a row that sees nothing would be NaN, and NaN passes through masks.
            kept = attention_mask.long()
            segments, attention_mask = (kept, kept), None
        elif attention_mask is not None and not attention_mask.is_floating_point():
            attention_mask = attention_mask.bool()
        context = Context(causal=self.is_causal, encoding=encoding, segments=segments)
        return super().forward(hidden_states, attention_mask, context=context)[0]


class W2TransformerBlock(nn.Module):
    """x += attention(norm x); x += swiglu(norm x): one residual stream, Gaussians only inside the attention.

    Raises:
        SpecError: the configuration lacks a width, or its widths do not fit.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.attention = W2Attention(config)
        config = _read(config)
        dims = Dims(config.hidden_size, config.num_attention_heads)
        norm = {"kind": "rmsnorm", "eps": config.rms_norm_eps}
        self.attention_norm, self.ffn_norm = NORM.build(norm, dims), NORM.build(norm, dims)
        self.ffn = FFN.build({"kind": "swiglu", "d_ff": config.intermediate_size}, dims)

    def forward(
        self,
        hidden_states: Tensor,
        rotary_emb_outputs: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[B,T,hidden_size] → the same; arguments as for `W2Attention.forward`."""
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, rotary_emb_outputs, attention_mask)
        return hidden_states + self.ffn(self.ffn_norm(hidden_states))
