"""Floor 3: attention mechanisms, one file each. `base.py` holds what they share: projections, positions, the cache."""

from headwise.attention.base import Attention, AttentionSpec, Context

__all__ = ["Attention", "AttentionSpec", "Context"]
