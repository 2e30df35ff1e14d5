"""Floor 2: what decoding keeps. A `ModelCache` holds a cache a layer, of the kind the layer's attention asks for.

Every layer's cache has `length` (tokens it has seen), `crop(length)` and `n_bytes`; a `LayerCache` grows with the
tokens, a `RecurrentCache` holds a state of one size.
"""

from headwise.cache.contiguous import LayerCache
from headwise.cache.model import AnyLayerCache, ModelCache
from headwise.cache.recurrent import RecurrentCache

__all__ = ["AnyLayerCache", "LayerCache", "ModelCache", "RecurrentCache"]
