"""Floor 3: norms over the last dimension, one file each."""

from headwise.norm.base import NormSpec

__all__ = ["NormSpec"]
