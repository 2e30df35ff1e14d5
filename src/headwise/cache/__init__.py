"""Floor 2: what decoding keeps. A `ModelCache` holds a cache a layer, of the kind the layer's attention asks for.

Every layer's cache has `length` (tokens it has seen), `crop(length)` and `n_bytes`; a `LayerCache` grows with the
tokens, a `RecurrentCache` holds a state of one size.

Names are looked up at first use: the block manager, which a scheduler needs, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.cache.block_manager import BlockManager, CachedSequence, OutOfBlocks
    from headwise.cache.contiguous import LayerCache
    from headwise.cache.model import AnyLayerCache, ModelCache
    from headwise.cache.recurrent import RecurrentCache

__all__ = [
    "AnyLayerCache",
    "BlockManager",
    "CachedSequence",
    "LayerCache",
    "ModelCache",
    "OutOfBlocks",
    "RecurrentCache",
]

_HOMES = {
    "AnyLayerCache": "model",
    "BlockManager": "block_manager",
    "CachedSequence": "block_manager",
    "LayerCache": "contiguous",
    "ModelCache": "model",
    "OutOfBlocks": "block_manager",
    "RecurrentCache": "recurrent",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.cache.{_HOMES[name]}"), name)
