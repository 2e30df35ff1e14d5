"""Floor 5: modules built from specs."""

from headwise.model.build import build

__all__ = ["build"]
