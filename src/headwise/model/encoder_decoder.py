"""The encoder–decoder of 2017: a bidirectional stack reads, a causal stack writes and looks at what was read."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.cache import ModelCache
from headwise.model.base import LanguageModel, Stack, check_ids, segment_positions
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
        S = encoder_ids_BS.shape[1]
        positions = torch.arange(S, device=encoder_ids_BS.device)
        pair = None
        if encoder_segments is not None:
            positions, pair = segment_positions(encoder_segments), (encoder_segments, encoder_segments)
        x_BSC = self.embed(encoder_ids_BS, self.encoder, positions, S)
        return self.encoder(x_BSC, positions, segments=pair)

    def new_cache(self) -> ModelCache:
        """An empty cache for the decoder's tokens, and for what the encoder read."""
        return self.decoder.new_cache()

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
        T = ids_BT.shape[1]
        past = cache.length if cache is not None else 0
        memory = None
        if encoder_ids is not None:
            memory = (self.encode(encoder_ids, encoder_segments), encoder_segments)
            if cache is not None:
                cache.memory = memory
        elif cache is not None:
            memory = cache.memory
        keys_BS = cache.append_segments(segments, T) if cache is not None else segments
        if keys_BS is None:
            positions, pair = torch.arange(past, past + T, device=ids_BT.device), None
        else:
            positions, pair = segment_positions(keys_BS)[:, past:], (keys_BS[:, past:], keys_BS)
        memory_pair = None
        if memory is not None and memory[1] is not None:
            own = keys_BS[:, past:] if keys_BS is not None else torch.zeros_like(ids_BT)
            memory_pair = (own, memory[1])
        x_BTC = self.embed(ids_BT, self.decoder, positions, past + T)
        y_BTC = self.decoder(
            x_BTC,
            positions,
            segments=pair,
            cache=cache,
            memory_BSC=memory[0] if memory is not None else None,
            memory_segments=memory_pair,
        )
        return self.logits(y_BTC[:, -1:] if last else y_BTC)
