"""Keys and values in 8 or 4 bits (as in KVQuant and KIVI, 2024): each group of a head's numbers on a scale of its own.

A token's numbers of one head go in groups of `group_size`. With n = 2^bits − 1 steps,

    asymmetric:  x̂ = z + s·c,   z = min x,  s = (max x − min x)/n,           c in 0 … n
    symmetric:   x̂ = s·c,       s = max|x| / (2^(bits−1) − 1),               c in −(2^(bits−1) − 1) … 2^(bits−1) − 1

so that |x − x̂| ≤ s/2: a 510th of a group's range in 8 bits, a 30th in 4 (asymmetric), beside the rounding of s and z to
float16, whose range numbers should not leave. A token costs bits/8 bytes a number and 2 (symmetric) or 4 bytes a group:
at group_size 32 and 64-wide heads 68 bytes a head and tensor in int8 and 40 in int4, against 128 in float16.

Every token is read back as it is stored, the newest too, so that results do not depend on how a text was cut up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.cache.base import TokenCache
from headwise.cache.contiguous import LayerCache
from headwise.kernels.attention import pieces

CHUNK = 512  # tokens read back at a time: what they take in float32 should stay in a core's own cache


class QuantisedCache(TokenCache):
    """A growing cache of codes and scales. No gradients flow through it.

    Args:
        bits: 8 or 4.
        group_size: numbers that share a scale; a width that it does not divide is filled up with zeros.
        symmetric: without z. By default 8 bits are, and 4 are not.
    """

    attends = True

    def __init__(self, bits: int, group_size: int = 32, symmetric: bool | None = None) -> None:
        super().__init__()
        self.kind = f"int{bits}"
        self.bits, self.group_size = bits, group_size
        self.symmetric = bits == 8 if symmetric is None else symmetric
        self._held = LayerCache()
        self._widths: list[int] = []
        self._dtype = torch.float32

    @property
    def _parts(self) -> int:
        """Tensors kept for each one given."""
        return 2 if self.symmetric else 3

    def append(self, *new: Tensor, segments_BS: Tensor | None = None) -> tuple[Tensor, ...]:
        """Store tensors [B,K,T,·] and return everything held as it reads back, each [B,K,S,·]."""
        self._store(new)
        held = self._held.held()
        return tuple(self._read(held, n, 0, self.length) for n in range(len(self._widths)))

    def attend(self, q_BHTE: Tensor, new: tuple[Tensor, ...], **scores: Any) -> Tensor | None:
        """For few queries: `CHUNK` tokens are read back at a time and met at once."""
        if not pieces.serves(q_BHTE, q_BHTE.shape[2] + self.length, **scores):
            return None
        self._store(new)
        held, stop = self._held.held(), self.length
        low = pieces.first_seen(q_BHTE.shape[2], stop, scores["window"])

        def read(n: int) -> Iterator[Tensor]:
            return (self._read(held, n, at, min(at + CHUNK, stop)).flatten(0, 1) for at in range(low, stop, CHUNK))

        return pieces.attention(q_BHTE, read(0), read(len(new) - 1), low, stop, **scores)

    def _store(self, new: tuple[Tensor, ...]) -> None:
        self._widths, self._dtype = [t.shape[-1] for t in new], new[0].dtype
        self._held.append(*(part for t in new for part in self._quantise(t.detach())))
        self.length = self._held.length

    def _quantise(self, x_BKTE: Tensor) -> list[Tensor]:
        """Codes uint8 [B,K,T,bytes], scales and, where asymmetric, zeros float16 [B,K,T,groups]."""
        x = F.pad(x_BKTE, (0, -x_BKTE.shape[-1] % self.group_size)).unflatten(-1, (-1, self.group_size))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        largest, most = 2 ** (self.bits - 1) - 1, torch.finfo(torch.float16).max
        tiny = torch.finfo(torch.float16).tiny
        if self.symmetric:
            scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(tiny, most).half()
            codes = (x / scale).round().clamp(-largest, largest) + largest
            scales = [scale]
        else:
            zero = x.amin(-1, keepdim=True).clamp(-most, most).half()
            scale = ((x.amax(-1, keepdim=True) - zero) / (2 * largest + 1)).clamp(tiny, most).half()
            codes = ((x - zero) / scale).round().clamp(0, 2 * largest + 1)
            scales = [scale, zero]
        packed = codes.to(torch.uint8).flatten(-2)
        if self.bits == 4:
            packed = packed[..., 0::2] | packed[..., 1::2] << 4
        return [packed, *(s.squeeze(-1) for s in scales)]

    def _read(self, held: tuple[Tensor, ...], n: int, start: int, stop: int) -> Tensor:
        """Tokens start…stop−1 of the n-th tensor, [B,K,stop−start,·]."""
        codes, *scales = (t[:, :, start:stop] for t in held[n * self._parts : (n + 1) * self._parts])
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        wide = torch.promote_types(self._dtype, torch.float32)
        x = codes.to(wide).unflatten(-1, (-1, self.group_size))
        scale = scales[0].to(wide)[..., None]
        if self.symmetric:
            x = x.sub_(2 ** (self.bits - 1) - 1).mul_(scale)
        else:
            x = x.mul_(scale).add_(scales[1].to(wide)[..., None])
        return x.flatten(-2)[..., : self._widths[n]].to(self._dtype)

    def crop(self, length: int) -> None:
        self._held.crop(length)
        self.length = self._held.length

    def tensors(self) -> list[Tensor]:
        return self._held.tensors()

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        held = self._held
        self._held = LayerCache()  # a fork shares this attribute until here
        self._held.length, self._held._buffers = held.length, [change(t) for t in held.tensors()]

    @property
    def used_bytes(self) -> int:
        return self._held.used_bytes
