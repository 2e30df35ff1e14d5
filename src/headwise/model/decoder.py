"""The causal decoder and the bidirectional encoder: one stack, with or without the causal mask."""

from __future__ import annotations

from torch import Tensor

from headwise.cache import ModelCache, place
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel, Stack, check_ids
from headwise.spec import ModelSpec


class Decoder(LanguageModel):
    """A stack of blocks between embedding and head. `spec.architecture` "encoder" leaves the causal mask out."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.stack = Stack(spec, spec.dims.n_layers, causal=spec.causal)

    def decoding_stack(self) -> Stack:
        return self.stack

    def forward(
        self,
        ids_BT: Tensor,
        *,
        segments: Tensor | None = None,
        cache: ModelCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits [B,T,V] of token ids int64 [B,T].

        Args:
            ids_BT: the new tokens.
            segments: int64 [B,T]; a token sees only its own segment, and positions start again with each. Documents
                packed in a row, or padding, are segments of their own.
            cache: what earlier calls left; the new tokens follow those held, and are added.
            last: only the last position's logits, [B,1,V].

        Raises:
            HeadwiseError: wrong shapes, more tokens than a learned position table has rows, or a cache for an encoder.
        """
        check_ids(ids_BT)
        if cache is not None and not self.spec.causal:
            raise HeadwiseError("a bidirectional encoder has no cache: every token sees those after it too")
        placed = place(ids_BT, segments, cache)
        x_BTC = self.embed(ids_BT, self.stack, placed)
        y_BTC = self.stack(x_BTC, placed, cache=cache, last=last)
        return self.logits(y_BTC[:, -1:] if last else y_BTC)
