"""The base of the norms' specs."""

from __future__ import annotations

from headwise.registry import ComponentSpec


class NormSpec(ComponentSpec):
    """A norm over the last dimension, of width d_model."""
