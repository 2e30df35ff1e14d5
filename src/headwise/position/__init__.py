"""Floor 3: position codes, one file each. `base.py` says what a code may do."""

from headwise.position.base import Encoding, Position, PositionSpec, SomeKeys

__all__ = ["Encoding", "Position", "PositionSpec", "SomeKeys"]
