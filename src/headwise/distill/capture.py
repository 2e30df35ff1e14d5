"""What a model's layers make on the way: keys, values, queries, attention outputs and hidden states of one pass.

    with capture(student, {"keys", "values"}) as signals:
        logits = student(ids)
    k, v = torch.stack(signals.keys, 1), torch.stack(signals.values, 1)      # [B,L,K,T,·]

The tensors are those of the pass itself, so that gradients flow through them into the model. Keys and queries come
*before* positions are worked in: heads and widths of turned keys cannot be mixed (see `MapProjectionAligner`).
`signals.encodings[layer].rotate(k)` works them in, and `.unrotate(k)` takes them out of keys that a cache has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor, nn

from headwise.attention import AttentionSpec
from headwise.attention.base import Attention
from headwise.errors import HeadwiseError, SettingsError, one_of
from headwise.model.base import LanguageModel
from headwise.position import Encoding
from headwise.spec import ModelSpec


@dataclass
class Signals:
    """What the last forward pass inside `capture` made; a list has an item a layer, None where a layer has no such
    thing, and is empty where it was not asked for.

    Attributes:
        keys: [B,K,T,E] before positions, after qk_norm. Of `tva` those inside the vein, of `mla` each head's own part
            without positions, of `w2` the means and the raw deviations; None for recurrent kinds.
        values: [B,K,T,D]; None for recurrent kinds.
        queries: [B,H,T,E], as the keys.
        outputs: [B,H,T,D], what attention makes before `wo`, gates included.
        inputs: [B,T,C], what each block reads.
        hidden: [B,T,C], what each block leaves.
        encodings: each layer's position code of that pass, always there.
        final: [B,T,C], what the head reads.
    """

    keys: list[Tensor | None] = field(default_factory=list)
    values: list[Tensor | None] = field(default_factory=list)
    queries: list[Tensor | None] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    inputs: list[Tensor | None] = field(default_factory=list)
    hidden: list[Tensor | None] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    final: Tensor | None = None


WANTED = tuple(f.name for f in fields(Signals) if f.name != "encodings")
_OF_HEADS = ("keys", "values", "queries")


@contextmanager
def capture(model: LanguageModel, wanted: Collection[str]) -> Iterator[Signals]:
    """Keep what the layers make in the forward passes inside the `with`, the last pass at the end.

    Without a `with` nothing is kept and nothing is slower. Layers are those of the decoder (of an encoder–decoder, its
    self-attention).

    Args:
        model: any Headwise model, trained or not.
        wanted: which of "keys", "values", "queries", "outputs", "inputs", "hidden", "final".

    Raises:
        SettingsError: something else is wanted.
        HeadwiseError: in the pass, a third-party mechanism that does not tell its observer.
    """
    for name in wanted:
        if name not in WANTED:
            raise SettingsError(one_of(name, WANTED, "signal"))
    signals, stack = Signals(), model.decoding_stack()
    layers = [_Layer(signals, model.spec, layer, frozenset(wanted)) for layer in range(len(stack.blocks))]
    running = False

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal running
        running = True
        for name in wanted:
            if name != "final":
                setattr(signals, name, [None] * len(layers))
        signals.encodings = [Encoding()] * len(layers)

    def end(module: nn.Module, args: tuple[Any, ...], final_BTC: Tensor) -> None:
        nonlocal running
        running = False
        if "final" in wanted:
            signals.final = final_BTC
        for layer in layers:
            layer.check()

    def during(hook: Callable[..., None]) -> Callable[..., None]:
        """Not in the backward pass, where a checkpointed block runs again."""

        def run(*args: Any) -> None:
            if running:
                hook(*args)

        return run

    hooks = [stack.register_forward_pre_hook(begin), stack.register_forward_hook(end)]
    attentions = [block.attention for block in stack.blocks]
    before = [getattr(attention, "observer", None) for attention in attentions]
    try:
        for layer, block, attention in zip(layers, stack.blocks, attentions):
            hooks.append(block.register_forward_pre_hook(during(layer.before)))
            hooks.append(block.register_forward_hook(during(layer.after)))
            if isinstance(attention, Attention):
                attention.observer = during(layer.observe)
        yield signals
    finally:
        for hook in hooks:
            hook.remove()
        for attention, observer in zip(attentions, before):
            if isinstance(attention, Attention):
                attention.observer = observer


class _Layer:
    """Where one layer's tensors go."""

    def __init__(self, signals: Signals, spec: ModelSpec, layer: int, wanted: frozenset[str]) -> None:
        self.signals, self.layer = signals, layer
        attention = spec.attention.at(layer)
        self.kind = attention.kind
        shape = attention.kv_shape(spec.dims) if isinstance(attention, AttentionSpec) else None
        self.wanted = wanted if shape is not None else wanted - set(_OF_HEADS)
        # Keys that come without their turned part (mla) have no positions to be worked in.
        self.turns = (
            isinstance(attention, AttentionSpec) and shape is not None and shape[1] == attention.key_dim(spec.dims)
        )

    def check(self) -> None:
        """Refuse a mechanism that keeps to itself what was asked for."""
        missing = [name for name in sorted(self.wanted - {"final"}) if getattr(self.signals, name)[self.layer] is None]
        if missing:
            raise HeadwiseError(
                f"layer {self.layer}: {self.kind} does not tell its observer of {', '.join(missing)}; use the base's "
                "forward, or call self.observer as it does"
            )

    def before(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """A block is about to read x and its context."""
        self.observe("inputs", args[0])
        if self.turns:
            self.signals.encodings[self.layer] = args[1].encoding

    def after(self, block: nn.Module, args: tuple[Any, ...], y_BTC: Tensor) -> None:
        self.observe("hidden", y_BTC)

    def observe(self, name: str, x: Tensor) -> None:
        if name in self.wanted:
            getattr(self.signals, name)[self.layer] = x


def match_of(spec: ModelSpec, layer: int) -> Literal["kv", "output"]:
    """What a student's layer is matched by: its keys and values, or, where it keeps none a token, its outputs."""
    attention = spec.attention.at(layer)
    has_kv = isinstance(attention, AttentionSpec) and attention.kv_shape(spec.dims) is not None
    return "kv" if has_kv else "output"
