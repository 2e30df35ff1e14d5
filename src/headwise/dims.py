"""The one legend of shape letters. A tensor's name ends in them: `q_BHTD`, `scores_BHTS`.

| letter | field          | meaning                                              |
|--------|----------------|------------------------------------------------------|
| B      | batch_size     | sequences in a batch                                 |
| T      | seq_len        | query positions (tokens fed in this call)            |
| S      |                | key positions (tokens seen so far; S = T uncached)   |
| C      | d_model        | model width                                          |
| H      | n_heads        | query heads                                          |
| K      | kv_heads       | key/value heads, K divides H                         |
| D      | head_dim       | width of one head                                    |
| F      | d_ff           | hidden width of the feed-forward                     |
| V      | vocab_size     | tokens in the vocabulary                             |
| L      | n_layers       | layers                                               |
| r      | rank           | width of a low-rank (vein) subspace                  |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dims:
    """The widths that every component of one model shares; what a mechanism may ask of its surroundings.

    `bias` and `dropout` are the model's defaults: a component whose own field is None takes them. `norm_eps` and
    `norm_unit_offset` are those of the model's norms, which norms inside a component follow; an ε of None leaves it to
    them.
    """

    d_model: int
    n_heads: int
    n_layers: int = 1
    max_seq_len: int = 1024
    vocab_size: int = 256
    bias: bool = False
    dropout: float = 0.0
    norm_eps: float | None = None
    norm_unit_offset: bool = False

    @property
    def head_dim(self) -> int:
        """Width of one head where the attention does not name its own: d_model / n_heads."""
        return self.d_model // self.n_heads
