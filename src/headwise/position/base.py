"""What every position code offers: three places where it may act, each doing nothing unless a kind says otherwise."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from headwise.dims import Dims
from headwise.errors import Problem
from headwise.registry import ComponentSpec


class PositionSpec(ComponentSpec):
    """Base of the position codes' specs. `embeds` marks those that add to the token embeddings, `biases` those that add
    to the scores.
    """

    embeds: ClassVar[bool] = False
    biases: ClassVar[bool] = False

    def check_head(self, head_dim: int) -> list[Problem]:
        """What is wrong with this code for heads of width `head_dim`; empty where nothing is."""
        return []


class Encoding:
    """A position code made ready for the tokens of one forward pass; all layers share it."""

    def in_segments(self, segments_BS: Tensor) -> Encoding:
        """The same for keys of these segments, int64 [B,S], where it goes by more than distances."""
        return self

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        """Queries or keys of the pass's new tokens, with their positions worked in."""
        return x_BHTD

    def unrotate(self, x_BHTD: Tensor) -> Tensor:
        """The inverse of `rotate`: queries or keys of those tokens as they were before their positions were worked in.

        Cached keys hold their positions; heads and widths may be mixed without them alone.
        """
        return x_BHTD

    def bias_factors(self, x_BHTD: Tensor) -> tuple[Tensor, Tensor] | None:
        """A causal bias on the scores as factors a [H,T,n], b [S,n] (each with a batch in front where rows differ), for
        tensors like `x_BHTD`; None for no bias.

        bias_ij = a_i·b_j, up to a constant in each row.
        """
        return None

    def bias(self, x_BHTD: Tensor, start: int, stop: int) -> Tensor | None:
        """The bias written out for the new tokens start…stop-1, [H,stop−start,S]; None for no bias."""
        return None


class SomeKeys(Encoding):
    """An encoding for scores of which only some columns are formed: those of the keys at `places`, int64 [S']."""

    def __init__(self, encoding: Encoding, places: Tensor) -> None:
        self.encoding, self.places = encoding, places

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        return self.encoding.rotate(x_BHTD)

    def unrotate(self, x_BHTD: Tensor) -> Tensor:
        return self.encoding.unrotate(x_BHTD)

    def bias_factors(self, x_BHTD: Tensor) -> tuple[Tensor, Tensor] | None:
        factors = self.encoding.bias_factors(x_BHTD)
        return None if factors is None else (factors[0], factors[1][..., self.places, :])

    def bias(self, x_BHTD: Tensor, start: int, stop: int) -> Tensor | None:
        bias_HTS = self.encoding.bias(x_BHTD, start, stop)
        return None if bias_HTS is None else bias_HTS[..., self.places]


class Position(nn.Module):
    """A position code. It is built once a model (once a pattern item) and shared by the layers."""

    def __init__(self, spec: PositionSpec, dims: Dims) -> None:
        super().__init__()
        self.spec = spec

    def embed(self, x_BTC: Tensor, positions: Tensor) -> Tensor:
        """Token embeddings with positions ([T] or [B,T], int64) added, where the code does that."""
        return x_BTC

    def check_length(self, seq_len: int) -> None:
        """Refuse an input of `seq_len` tokens where the code cannot place them; by default there is no limit."""

    def by_length(self, seq_len: int) -> bool:
        """Whether what is made ready depends on `seq_len` itself, so that rows of unequal length would share it."""
        return False

    def encode(self, positions: Tensor, seq_len: int, head_dim: int) -> Encoding:
        """Make ready for new tokens at `positions` ([T] or [B,T]) among `seq_len` tokens in all."""
        return Encoding()
