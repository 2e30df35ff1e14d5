"""ALiBi (Press et al. 2022; document 001): a penalty on the score that grows with the distance.

bias_ij = −m_h·(i − j), with a fixed slope m_h a head. For H a power of two, m_h = 2^(−8(h+1)/H); for other H, the
slopes of the power of two below, then every other slope of the power above (the paper's and BLOOM's rule). `scale`
multiplies them all: Falcon adds the bias before it divides by √D, which makes it 1/√D. With `rounded` it is
scale·(b_h(j) − b_h(i)), where b_h(j) = m_h·j is computed in bfloat16, slope, position and product: so transformers does
for Falcon, and at far positions the bias goes in steps.

**Fast form.** The bias is a sum of a term in i and a term in j, so it rides on two extra dimensions of q and k
(see `kernels/attention/sdpa.py`). In half precision j is split into two parts that are exact there, and so is m_h.
A rounded bias no longer splits into few terms, but its columns differ by head alone: head h reads b_h out of H columns.
For bidirectional attention |i − j| does not split; the bias −m_h·|i − j| is then written out, a block of rows at a
time.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from headwise.dims import Dims
from headwise.kernels.segments import segment_positions
from headwise.position.base import Encoding, Position, PositionSpec
from headwise.registry import register_position


class ALiBiSpec(PositionSpec):
    """Scores fall linearly with distance, one fixed slope a head (BLOOM); no length limit, no parameters."""

    biases: ClassVar[bool] = True
    kind: Literal["alibi"] = "alibi"
    scale: float = Field(1.0, gt=0)
    rounded: bool = False


def slopes(n_heads: int) -> list[float]:
    """The slope m_h of each head."""
    power = 2 ** math.floor(math.log2(n_heads))
    first = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    between = [2.0 ** (-4 * (h + 1) / power) for h in range(0, 2 * (n_heads - power), 2)]
    return first + between


class ALiBiEncoding(Encoding):
    """Slopes, and the rows i and columns j of the scores of one pass."""

    def __init__(self, slopes_H: Tensor, n_new: int, seq_len: int) -> None:
        self.slopes_H = slopes_H
        self.n_new, self.seq_len = n_new, seq_len

    def bias_factors(self, x_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        half = x_BHTD.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half else x_BHTD.dtype
        m_H11 = self.slopes_H.to(dtype)[:, None, None]
        j_S = torch.arange(self.seq_len, device=m_H11.device, dtype=dtype)
        row_HT1 = -m_H11 * j_S[self.seq_len - self.n_new :, None]
        ones_S = torch.ones_like(j_S)
        if not half:
            a, b = [row_HT1, m_H11.expand_as(row_HT1)], [ones_S, j_S]
        else:
            m_high = m_H11.to(x_BHTD.dtype).to(dtype)
            j_high = (j_S / 256).floor() * 256
            parts = [(m_high, j_high), (m_high, j_S - j_high), (m_H11 - m_high, j_high), (m_H11 - m_high, j_S - j_high)]
            a = [row_HT1, *(m.expand_as(row_HT1) for m, _ in parts)]
            b = [ones_S, *(j for _, j in parts)]
        return torch.cat(a, dim=-1), torch.stack(b, dim=-1)

    def bias(self, x_BHTD: Tensor, start: int, stop: int) -> Tensor:
        j_S = torch.arange(self.seq_len, device=self.slopes_H.device)
        i_T = j_S[self.seq_len - self.n_new :][start:stop]
        distance_TS = (i_T[:, None] - j_S[None, :]).abs()
        dtype = torch.promote_types(x_BHTD.dtype, torch.float32)
        return (-self.slopes_H.to(dtype)[:, None, None] * distance_TS).to(x_BHTD.dtype)


class RoundedEncoding(Encoding):
    """The bias in bfloat16's steps, which counts the keys' positions [S] or [B,S] from where their segments begin."""

    def __init__(self, slopes_H: Tensor, scale: float, n_new: int, positions: Tensor) -> None:
        self.slopes_H, self.scale, self.n_new = slopes_H, scale, n_new
        # The position too is rounded, for the product's two factors meet in bfloat16.
        self.steps = slopes_H.bfloat16()[:, None] * positions[..., None, :]  # [H,S] or [B,H,S]

    def in_segments(self, segments_BS: Tensor) -> RoundedEncoding:
        return RoundedEncoding(self.slopes_H, self.scale, self.n_new, segment_positions(segments_BS))

    def bias_factors(self, x_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        dtype, H = x_BHTD.dtype, len(self.slopes_H)
        wide = torch.promote_types(dtype, torch.float32)
        b = self.steps.to(wide).transpose(-1, -2)
        row = -self.scale * b[..., -self.n_new :, :].transpose(-1, -2)[..., None]
        scale = torch.tensor(self.scale, dtype=wide, device=b.device)
        parts = [scale] if dtype == wide else [high := scale.to(dtype).to(wide), scale - high]
        own = torch.eye(H, dtype=wide, device=b.device)[:, None].expand(*row.shape[:-1], H)
        return torch.cat([row, *(part * own for part in parts)], -1), torch.cat(
            [torch.ones_like(b[..., :1]), *[b] * len(parts)], -1
        )

    def bias(self, x_BHTD: Tensor, start: int, stop: int) -> Tensor:
        b = self.scale * self.steps.to(torch.promote_types(x_BHTD.dtype, torch.float32))
        new = b[..., -self.n_new :][..., start:stop]
        return -(new[..., :, None] - b[..., None, :]).abs().to(x_BHTD.dtype)


@register_position(ALiBiSpec)
class ALiBiPosition(Position):
    """Slopes only; nothing is learned."""

    spec: ALiBiSpec

    def __init__(self, spec: ALiBiSpec, dims: Dims) -> None:
        super().__init__(spec, dims)
        # Numbers, not a buffer: a model cast to half precision would round a buffer with its parameters.
        self.slopes = slopes(dims.n_heads)

    def by_length(self, seq_len: int) -> bool:
        return self.spec.rounded

    def encode(self, positions: Tensor, seq_len: int, head_dim: int) -> Encoding:
        slopes_H = torch.tensor(self.slopes, device=positions.device)
        if self.spec.rounded:
            keys_S = torch.arange(seq_len, device=positions.device)
            return RoundedEncoding(slopes_H, self.spec.scale, positions.shape[-1], keys_S)
        return ALiBiEncoding(self.spec.scale * slopes_H, positions.shape[-1], seq_len)
