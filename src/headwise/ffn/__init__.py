"""Floor 3: feed-forward networks, one file each."""

from headwise.ffn.base import FFNSpec

__all__ = ["FFNSpec"]
