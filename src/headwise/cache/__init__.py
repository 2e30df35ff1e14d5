"""Floor 2: what decoding keeps. A `ModelCache` holds a cache a layer; `kinds` says which layer gets which.

Every layer's cache has `length` (tokens it has seen), `crop`, `reorder`, `fork`, `n_bytes` and `report` (`base`). A
`TokenCache` keeps something of each token: growing or `static` (`contiguous`), `rolling`, `quantised`, `paged`; a
`RecurrentCache` holds a state of one size.

Names are looked up at first use: the block manager, which a scheduler needs, loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwise.cache.base import AnyLayerCache, CacheReport, TokenCache
    from headwise.cache.block_manager import BlockManager, CachedSequence, OutOfBlocks
    from headwise.cache.contiguous import LatentCache, LayerCache, StaticCache
    from headwise.cache.kinds import Needs, new_layer_cache, new_model_cache
    from headwise.cache.model import ModelCache, Placed, place
    from headwise.cache.paged import PagedModelCache, PagedPool, SequencesCache
    from headwise.cache.quantised import QuantisedCache
    from headwise.cache.recurrent import RecurrentCache
    from headwise.cache.rolling import RollingCache

_HOMES = {
    "AnyLayerCache": "base",
    "BlockManager": "block_manager",
    "CacheReport": "base",
    "CachedSequence": "block_manager",
    "LatentCache": "contiguous",
    "LayerCache": "contiguous",
    "ModelCache": "model",
    "Needs": "kinds",
    "OutOfBlocks": "block_manager",
    "PagedModelCache": "paged",
    "PagedPool": "paged",
    "Placed": "model",
    "QuantisedCache": "quantised",
    "RecurrentCache": "recurrent",
    "RollingCache": "rolling",
    "SequencesCache": "paged",
    "StaticCache": "contiguous",
    "TokenCache": "base",
    "new_layer_cache": "kinds",
    "new_model_cache": "kinds",
    "place": "model",
}

__all__ = [
    "AnyLayerCache",
    "BlockManager",
    "CacheReport",
    "CachedSequence",
    "LatentCache",
    "LayerCache",
    "ModelCache",
    "Needs",
    "OutOfBlocks",
    "PagedModelCache",
    "PagedPool",
    "Placed",
    "QuantisedCache",
    "RecurrentCache",
    "RollingCache",
    "SequencesCache",
    "StaticCache",
    "TokenCache",
    "new_layer_cache",
    "new_model_cache",
    "place",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headwise.cache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"headwise.cache.{_HOMES[name]}"), name)
