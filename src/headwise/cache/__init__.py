"""Floor 2: key/value caches. Every cache hands each layer a view with `append(k, v) → (all k, all v)`."""

from headwise.cache.contiguous import ContiguousCache, LayerCache

__all__ = ["ContiguousCache", "LayerCache"]
