"""Headwise's kinds of attention inside transformers' own models.

    hw.register_with_transformers(local="window(256)")
    AutoModelForCausalLM.from_pretrained(…, attn_implementation="local")

transformers calls an attention function with queries, keys and values that are projected and placed already, so a kind
can stand in where it has no parameters of its own. Each name is registered twice: as the function, and as the maker of
masks. Without the second, transformers hands no mask over at all, and a padded batch attends to its padding.

Patterns that count from a document's first token (strided, longformer, bigbird) count from the first of the row where
transformers packs documents, or decodes padded rows with a static cache: it tells them by a mask alone there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.attention.base import Attention, AttentionSpec, Context
from headwise.attention.recurrence import Recurrence, resets
from headwise.dims import Dims
from headwise.errors import HeadwiseError, SpecError
from headwise.position import Encoding
from headwise.registry import ATTENTION
from headwise.spec import parse

PREFIX = "headwise_"
# The projections around every kind, which transformers' layers have themselves.
PROJECTIONS = {"wq", "wk", "wv", "wo"}


def register_with_transformers(**kinds: str) -> list[str]:
    """Offer kinds of attention to transformers' `AttentionInterface` and `AttentionMaskInterface`.

    Args:
        kinds: name → attention, as in a line: `local="window(256)"`. Without any, every kind that fits is offered as
            it is by default, under `headwise_` and its name.

    Returns:
        The names registered, for `attn_implementation`.

    Raises:
        SpecError: no such attention, or one with parameters of its own, which a layer of transformers does not have.
        HeadwiseError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:
        raise HeadwiseError("transformers is not installed; install headwise[hf]") from None
    specs: dict[str, Any]
    if kinds:
        specs = {name: _spec(text) for name, text in kinds.items()}
    else:
        specs = {PREFIX + kind: typical for kind in ATTENTION.list() if _fits(typical := _typical(kind))}
    for name, spec in specs.items():
        AttentionInterface.register(name, attention_function(spec))
        AttentionMaskInterface.register(name, attention_mask)
    return list(specs)


def _spec(text: str) -> AttentionSpec:
    spec = parse(f"llama(attention={text})").attention
    if not isinstance(spec, AttentionSpec) or not _fits(spec):
        fitting = ", ".join(kind for kind in ATTENTION.list() if _fits(_typical(kind)))
        raise SpecError(
            f"{text} does not fit: a layer of transformers holds query, key, value and output maps and nothing else; "
            f"allowed are, with fields that add no parameters: {fitting}"
        )
    return spec


def _typical(kind: str) -> Any:
    """The kind as it is by default, or as benchmarks measure it where it cannot stand without fields."""
    return parse(f"llama(attention={ATTENTION.get(kind).spec.typical or kind})").attention


def _fits(spec: Any) -> bool:
    """Whether the kind's module is the shared projections and a rule by which queries, keys and values meet."""
    cls: Any = ATTENTION.get(spec.kind).module
    if cls.forward not in (Attention.forward, Recurrence.forward):
        return False
    plain = (Recurrence.gates, Recurrence.read_out)  # gates, and norms behind, are made of what a layer does not hold
    if issubclass(cls, Recurrence) and (cls.gates, cls.read_out) != plain:
        return False
    module = _module(spec, 2, 2, 64)
    own = {name.split(".")[0] for name, _ in module.named_parameters()} - PROJECTIONS
    return not own and module.wq.out_features == module.wv.out_features


@lru_cache(maxsize=64)
def _module(spec: Any, n_heads: int, kv_heads: int, head_dim: int, **fields: Any) -> Any:
    """The kind's module without memory: only how queries, keys and values meet is used of it."""
    given = {"kind": spec.kind, **dict(spec), "kv_heads": kv_heads, "head_dim": head_dim, "bias": False, **fields}
    with torch.device("meta"):
        dims = Dims(d_model=n_heads * head_dim, n_heads=n_heads)
        return ATTENTION.build(ATTENTION.spec(given), dims)


def attention_function(spec: AttentionSpec) -> Callable[..., tuple[Tensor, None]]:
    """What `AttentionInterface.register` takes, for one kind."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Queries [B,H,T,D], keys and values [B,K,S,D] → [B,T,H,D]; the mask is one of `attention_mask`'s below."""
        for name, given in {"dropout": dropout or None, "s_aux": s_aux, "position_bias": position_bias}.items():
            if given is not None:
                raise ValueError(f"{spec.kind} takes no {name} of a layer's; use attn_implementation='eager' for it")
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        segments = None
        if attention_mask is not None and attention_mask.dim() == 2:
            key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
            numbers_BS = attention_mask.long() - 1  # padding is a segment of its own
            segments, attention_mask = (numbers_BS[:, -query.shape[2] :], numbers_BS), None
        context = Context(causal=causal, segments=segments)
        widths = query.shape[1], key.shape[1], query.shape[3]
        if issubclass(ATTENTION.get(spec.kind).module, Recurrence):
            if attention_mask is not None or sliding_window is not None or softcap is not None:
                raise ValueError(
                    f"{spec.kind} forms no scores that a mask, a window or a soft-cap could act on: give a model "
                    "without the last two, padded rows in place of packed ones, and a dynamic cache"
                )
            return _recur(_module(spec, *widths), query, key, value, context).transpose(1, 2), None
        fields: dict[str, Any] = {"scale": scaling, **({"softcap": softcap} if softcap is not None else {})}
        if sliding_window is not None:
            if spec.kind != "softmax":
                raise ValueError(f"the layer has a sliding window of {sliding_window} and {spec.kind} a pattern of its "
                                 "own; only one of the two can be meant")  # fmt: skip
            fields |= {"kind": "window", "window": sliding_window}
        kind = _module(spec, *widths, **fields)
        if attention_mask is not None and causal and (kind.window or kind.pattern):
            # A static cache has places that are empty yet, and distances count from the last that is not.
            seen = int(attention_mask.flatten(0, -2).any(0).nonzero().max()) + 1
            key, value, attention_mask = key[:, :, :seen], value[:, :, :seen], attention_mask[..., :seen]
        y_BHTD, _ = kind.attend(query, key, value, context, attention_mask, False)
        return y_BHTD.transpose(1, 2), None

    return attend


def _recur(kind: Recurrence, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
    """The last T outputs over all S keys: transformers caches keys, and no states."""
    T, S = query.shape[2], key.shape[2]
    q_BHSE = kind.place(F.pad(query, (0, 0, S - T, 0)), Encoding())
    k_BKSE = kind.place(key, Encoding())
    segments = (context.segments[1], context.segments[1]) if context.segments is not None else None
    if context.causal:
        y_BHSD, _ = kind.recur(q_BHSE, k_BKSE, value, (), resets(segments), None)
    else:
        y_BHSD = kind.both_ways(q_BHSE, k_BKSE, value, (), segments)
    return y_BHSD[:, :, S - T :]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """What `AttentionMaskInterface.register` takes: None where every token is one, the padding as boolean [B,S], and a
    whole boolean mask [B,1,T,S] where transformers hides more than that (packed sequences, prefixes, image tokens) or
    wants one program for all steps (decoding with a static cache).
    """
    from transformers.masking_utils import sdpa_mask

    if not allow_is_causal_skip:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, device=device, **others,
        )  # fmt: skip
    seen = min(int(q_offset) + q_length - kv_offset, kv_length)  # a static cache has places that are empty yet
    if attention_mask is None:
        return None if seen == kv_length else torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    mask_BS = attention_mask[:, kv_offset : kv_offset + seen].bool()
    return None if seen == kv_length and bool(mask_BS.all()) else mask_BS
