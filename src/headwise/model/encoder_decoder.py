"""The encoder–decoder of 2017: a bidirectional stack reads, a causal stack writes and looks at what was read."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.cache import ModelCache, place
from headwise.model.base import LanguageModel, Stack, check_ids
from headwise.spec import ModelSpec


class EncoderDecoder(LanguageModel):
    """Encoder and decoder share the token embedding (and a learned position table each has its own)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.encoder = Stack(spec, spec.n_encoder_layers or spec.dims.n_layers, causal=False)
        self.decoder = Stack(spec, spec.dims.n_layers, causal=True, cross=True)

    def encode(self, encoder_ids_BS: Tensor, encoder_segments: Tensor | None = None) -> Tensor:
        """What the decoder looks at, float [B,S,C], of the tokens to be read, int64 [B,S]."""
        check_ids(encoder_ids_BS, "encoder_ids")
        placed = place(encoder_ids_BS, encoder_segments, None)
        return self.encoder(self.embed(encoder_ids_BS, self.encoder, placed), placed)

    def decoding_stack(self) -> Stack:
        return self.decoder

    def forward(
        self,
        ids_BT: Tensor,
        *,
        segments: Tensor | None = None,
        cache: ModelCache | None = None,
        encoder_ids: Tensor | None = None,
        encoder_segments: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits [B,T,V] of the decoder's token ids int64 [B,T].

        Args:
            ids_BT: the decoder's new tokens.
            segments: int64 [B,T] of the decoder's tokens, as for a decoder; with `encoder_segments` a token also
                looks only at what was read under its own segment number.
            cache: the decoder's cache; it also keeps what the encoder read, so later calls need no `encoder_ids`.
            encoder_ids: int64 [B,S], what the encoder reads. Without it the decoder writes with nothing to look at.
            encoder_segments: int64 [B,S] of the encoder's tokens.
            last: only the last position's logits, [B,1,V].
        """
        check_ids(ids_BT)
        memory = None
        if encoder_ids is not None:
            memory = (self.encode(encoder_ids, encoder_segments), encoder_segments)
            if cache is not None:
                cache.memory = memory
        elif cache is not None:
            memory = cache.memory
        placed, memory_pair = place(ids_BT, segments, cache), None
        if memory is not None and memory[1] is not None:
            own = placed.segments[0] if placed.segments is not None else torch.zeros_like(ids_BT)
            memory_pair = (own, memory[1])
        x_BTC = self.embed(ids_BT, self.decoder, placed)
        y_BTC = self.decoder(
            x_BTC,
            placed,
            cache=cache,
            memory_BSC=memory[0] if memory is not None else None,
            memory_segments=memory_pair,
            last=last,
        )
        return self.logits(y_BTC[:, -1:] if last else y_BTC)
