"""What attention by a recurrence shares: a state in place of keys and values, reset where a segment begins.

A mechanism says how queries, keys, values and its own gates meet a state (`recur`). In a decoder the state runs with
the text. An encoder runs it both ways and takes the mean of the two, so that a token counts itself once and all others
half. A segment is a run of equal numbers: the state starts anew wherever the number changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.cache import Needs, RecurrentCache
from headwise.dims import Dims
from headwise.errors import HeadwiseError, Problem
from headwise.kernels.rms_norm import rms_norm


class RecurrenceSpec(AttentionSpec):
    """Fields and counts of the recurrent kinds; a state a key/value head, `state_shape` wide, in float32.

    FLOPs are those of the recurrence itself, O(E·D) a token. Training in chunks of c adds the scores inside them, about
    2·H·c·(E+D) a token.
    """

    takes_bias: ClassVar[bool] = False

    def check(self, dims: Dims) -> list[Problem]:
        problems = super().check(dims)
        if self.dropout:
            message = f"{self.dropout} given, but {self.kind} has no attention weights to drop; set the model's dropout"
            problems.append(Problem("dropout", message))
        return problems

    def state_shape(self, dims: Dims) -> tuple[int, int]:
        """Rows and columns of a head's state."""
        return self.key_dim(dims), self.heads(dims)[2]

    def gate_flops(self, dims: Dims) -> int:
        """FLOPs a token of the maps beyond queries, keys, values and output."""
        return 0

    def recurrence_flops(self, dims: Dims) -> int:
        """FLOPs a token of one pass: writing to the states of K heads, reading them with H queries."""
        (H, K, _), (rows, columns) = self.heads(dims), self.state_shape(dims)
        return 2 * (H + K) * rows * columns

    def flops_per_token(self, dims: Dims, context: int, *, causal: bool) -> float:
        (H, K, D), E = self.heads(dims), self.key_dim(dims)
        passes = 1 if causal else 2
        maps = 2 * (H + K) * dims.d_model * (D + E) + self.gate_flops(dims)
        return maps + passes * self.recurrence_flops(dims)

    def keys_seen(self, context: int, *, causal: bool) -> float:
        """All of the context, through the state; none is looked at singly."""
        return float(context)

    def kv_numbers_per_token(self, dims: Dims) -> int:
        return 0

    def kv_shape(self, dims: Dims) -> tuple[int, int, int] | None:
        return None

    def state_numbers(self, dims: Dims) -> int:
        rows, columns = self.state_shape(dims)
        return self.heads(dims)[1] * rows * columns


class Recurrence(Attention, ABC):
    """Projections around a mechanism's `recur`."""

    spec: RecurrenceSpec

    def cache_needs(self) -> Needs:
        """One state, whatever the number of tokens."""
        return Needs(self.spec.kind, "recurrent")

    def forward(
        self,
        x_BTC: Tensor,
        attn_mask: Tensor | None = None,
        *,
        context: Context | None = None,
        memory_BSC: Tensor | None = None,
        return_attention_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of `x_BTC`, float [B,T,C].

        Args:
            x_BTC: float [B,T,C].
            attn_mask, memory_BSC: refused, unless None: a state keeps no single tokens to mask or to look up.
            context: causality, positions, segments and cache; without it, plain bidirectional attention.
            return_attention_weights: also return the weights [B,H,T,T] where the kind has some and no cache is given.

        Raises:
            HeadwiseError: a mask, a memory, or a position code that acts on scores (ALiBi).
        """
        context, kind = context or Context(), self.spec.kind
        if attn_mask is not None:
            raise HeadwiseError(f"{kind} takes no attn_mask: it forms no scores; mask tokens by segments instead")
        if memory_BSC is not None:
            raise HeadwiseError(f"{kind} does no cross-attention; softmax does")
        q_BHTE, k_BKTE, v_BKTD = self._heads(x_BTC, context)
        if context.encoding.bias_factors(q_BHTE) is not None:
            raise HeadwiseError(
                f"{kind} forms no scores that the position code's bias could be added to; use rope or none"
            )
        gates, cache = self.gates(x_BTC), context.cache
        if not context.causal:
            y_BHTD = self.both_ways(q_BHTE, k_BKTE, v_BKTD, gates, context.segments)
        else:
            state = cache.state[0] if isinstance(cache, RecurrentCache) and cache.state else None
            y_BHTD, state = self.recur(q_BHTE, k_BKTE, v_BKTD, gates, resets(context.segments), state)
            if isinstance(cache, RecurrentCache):
                cache.keep(x_BTC.shape[1], state)
        weights = None
        if return_attention_weights and cache is None:
            weights = self.weights(q_BHTE, k_BKTE, v_BKTD, resets(context.segments), context.causal)
        return self._out(self.told(self.read_out(y_BHTD, x_BTC))), weights

    def gates(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        """What the recurrence needs of the tokens besides queries, keys and values, [B,K,T,…] each."""
        return ()

    @abstractmethod
    def recur(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        resets_BT: Tensor | None,
        state_BKED: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens' outputs [B,H,T,D], each of what is up to it, and the state after the last [B,K,E,D]."""

    def both_ways(
        self,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTD: Tensor,
        gates: tuple[Tensor, ...],
        segments: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The mean of a pass in reading order and one against it."""
        forward, _ = self.recur(q_BHTE, k_BKTE, v_BKTD, gates, resets(segments), None)
        q_BHTE, k_BKTE, v_BKTD = (x.flip(2) for x in (q_BHTE, k_BKTE, v_BKTD))
        numbers = (segments[0].flip(1), segments[1].flip(1)) if segments is not None else None
        backward, _ = self.recur(q_BHTE, k_BKTE, v_BKTD, tuple(x.flip(2) for x in gates), resets(numbers), None)
        return (forward + backward.flip(2)) / 2

    def weights(
        self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTD: Tensor, resets_BT: Tensor | None, causal: bool
    ) -> Tensor | None:
        """The attention weights [B,H,T,T], where such exist."""
        return None

    def matrix(self, x_BTC: Tensor, context: Context) -> Tensor:
        """The matrix [B,H,T,T] by which a causal pass mixes the tokens' values: what it makes of the unit vectors as
        values, for every kind is linear in these."""
        q_BHTE, k_BKTE, v_BKTD = self._heads(x_BTC, context)
        B, K, T, _ = v_BKTD.shape
        units_BKTT = torch.eye(T, dtype=v_BKTD.dtype, device=v_BKTD.device).expand(B, K, T, T)
        return self.recur(q_BHTE, k_BKTE, units_BKTT, self.gates(x_BTC), resets(context.segments), None)[0]

    def read_out(self, y_BHTD: Tensor, x_BTC: Tensor) -> Tensor:
        """The heads' outputs side by side [B,T,H·D], normed and gated where the kind does that."""
        return y_BHTD.transpose(1, 2).flatten(2)


def resets(segments: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Where the state starts anew: boolean [B,T], True where a token's segment is not that of the token before it.

    Of `segments` (new tokens [B,T], all tokens [B,S]) the second has the token before the first new one.
    """
    if segments is None:
        return None
    new_BT, all_BS = segments
    before = all_BS.shape[1] - new_BT.shape[1]
    last_B1 = all_BS[:, before - 1 : before] if before else new_BT[:, :1]
    return new_BT != torch.cat([last_B1, new_BT[:, :-1]], 1)


class OutNorm(nn.Module):
    """An RMSNorm over each head's output; what comes out of a young state is small, and ε larger than elsewhere."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, y_BHTD: Tensor) -> Tensor:
        return rms_norm(y_BHTD, self.weight, 1e-5)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). torch's own promises compilers another layout of its gradient than it makes."""
    return torch.logaddexp(x, torch.zeros_like(x))


def wide(x: Tensor) -> Tensor:
    """In float32 at least: gates and states do not do with less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
