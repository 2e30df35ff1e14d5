"""Which cache a layer gets: the kinds by name, their options, and what a mechanism asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headwise.cache.base import AnyLayerCache
from headwise.cache.contiguous import LatentCache, LayerCache, StaticCache
from headwise.cache.model import ModelCache
from headwise.cache.paged import new_paged_cache
from headwise.cache.quantised import QuantisedCache
from headwise.cache.recurrent import RecurrentCache
from headwise.cache.rolling import RollingCache
from headwise.errors import SettingsError, one_of

# Each kind's options, and the least each may be.
KINDS: dict[str, dict[str, int]] = {
    "auto": {"slack": 0, "checkpoints": 0},
    "contiguous": {},
    "static": {"max_len": 1},
    "rolling": {"slack": 0},
    "paged": {"block_size": 1, "num_blocks": 1},
    "int8": {"group_size": 2, "symmetric": 0},
    "int4": {"group_size": 2, "symmetric": 0},
}


@dataclass(frozen=True)
class Needs:
    """What a layer's mechanism asks of its cache.

    Attributes:
        mechanism: its name, for messages.
        natural: the kind that serves it best: keys and values, a latent in place of them, or a state.
        window: how far back a token sees, its own place included; None: to the first token.
        first: tokens at the start of a document that every later one sees besides.
    """

    mechanism: str
    natural: Literal["contiguous", "latent", "recurrent"] = "contiguous"
    window: int | None = None
    first: int = 0


def new_layer_cache(needs: Needs, kind: str = "auto", **options: Any) -> AnyLayerCache:
    """An empty cache for one layer.

    Raises:
        SettingsError: an unknown kind or option, a value out of range, or a kind that cannot serve this mechanism.
    """
    check_options(kind, options)
    if needs.natural == "recurrent":
        if kind in ("rolling", "paged"):
            raise SettingsError(
                f"{kind} cache: {needs.mechanism} keeps one state and no single tokens; use kind='auto'"
            )
        return RecurrentCache(options.get("checkpoints", 0) if kind == "auto" else 0)
    if kind == "static":
        return StaticCache(options["max_len"])
    if kind in ("int8", "int4"):
        return QuantisedCache(int(kind[3:]), **options)
    if kind == "rolling" or (kind == "auto" and needs.window is not None):
        if needs.window is None:
            raise SettingsError(
                f"rolling cache: {needs.mechanism} looks at every token and not at a window; use kind='auto', which "
                "rolls where there is a window"
            )
        return RollingCache(needs.window, needs.first, options.get("slack", 0))
    if kind == "paged":
        raise SettingsError("paged cache: its blocks belong to all layers; ask the model for it, not a layer")
    return LatentCache() if needs.natural == "latent" else LayerCache()


def new_model_cache(layers: Sequence[Needs], kind: str = "auto", **options: Any) -> ModelCache:
    """An empty cache for a model's layers. Raises as `new_layer_cache`."""
    if kind != "paged":
        return ModelCache(new_layer_cache(needs, kind, **options) for needs in layers)
    check_options(kind, options)
    for needs in layers:
        if needs.natural == "recurrent":
            new_layer_cache(needs, kind, **options)
    return new_paged_cache(len(layers), **options)


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Refuse what no kind or not this one takes.

    Raises:
        SettingsError: all that is wrong.
    """
    if kind not in KINDS:
        raise SettingsError(one_of(kind, KINDS, "cache kind"))
    allowed = KINDS[kind]
    problems = [
        f"{one_of(name, allowed, f'option of a {kind} cache')}" if allowed else f"a {kind} cache has no option {name!r}"
        for name in options
        if name not in allowed
    ]
    problems += [
        f"{name}: given {options[name]!r}, should be an integer of at least {least}"
        for name, least in allowed.items()
        if options.get(name) is not None and not (isinstance(options[name], int) and options[name] >= least)
    ]
    if not problems and (options.get("group_size") or 0) % 2:
        problems.append(f"group_size: given {options['group_size']}, should be even: two numbers share a byte")
    if problems:
        raise SettingsError(problems)
