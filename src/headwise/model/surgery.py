"""Changes to a model that is already built, each giving a new model whose spec tells the truth about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention import Context
from headwise.attention.tva import TVA, TVASpec
from headwise.errors import HeadwiseError, Problem, SpecError, short
from headwise.model.base import LanguageModel, Stack
from headwise.model.build import build
from headwise.registry import FAMILIES, ComponentSpec, Pattern
from headwise.spec import ModelSpec
from headwise.spec.grammar import print_value, read_value
from headwise.start import Start, begin, fit_output, relative_error

FAMILIES_SWAPPED = ("attention", "ffn")
SAMPLES = 4096  # vectors of each layer that a start is fitted to


def fold(model: LanguageModel) -> LanguageModel:
    """The model with every head-wide TVA layer folded into thin maps (document 000): 4·C·H·r weights a layer.

    Logits agree to rounding (1e-5 in float32). The new model stands on the old one's device, in its dtype and mode; its
    spec says `folded=True`, so that it counts, saves and loads as what it is. The old model is left as it was.

    Raises:
        HeadwiseError: no layer folds; a model-wide vein has nothing to fold, and folded layers are folded already.
    """
    spec = model.spec.replace(attention=model.spec.attention.with_each(_folded))
    if spec == model.spec:
        raise HeadwiseError(f"nothing in {str(model.spec)!r} folds; allowed: attention=tva(vein=head) not yet folded")
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, TVA) and _folded(module.spec) != module.spec:
            wide = [key for key in tensors if key.startswith(f"{name}.")]
            tensors = {key: tensor for key, tensor in tensors.items() if key not in wide}
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.fold().state_dict().items()}
    weight = model.embedding.weight
    with torch.no_grad():
        folded = build(spec, device=weight.device, dtype=weight.dtype)
        folded.load_state_dict(tensors)
    folded.activation_checkpointing = model.activation_checkpointing
    return folded.train(model.training)


def _folded(component: ComponentSpec) -> ComponentSpec:
    if isinstance(component, TVASpec) and component.vein == "head":
        return component.model_copy(update={"folded": True})
    return component


@dataclass(frozen=True)
class Swapped:
    """One part that was replaced: in which layer, of which family, by what, and what it started from."""

    layer: int
    family: str
    old: str
    new: str
    start: str


def swap(
    model: LanguageModel,
    attention: str | Mapping[str, Any] | ComponentSpec | None = None,
    ffn: str | Mapping[str, Any] | ComponentSpec | None = None,
    *,
    layers: str | Iterable[int] | None = None,
    calibration: Tensor | None = None,
) -> LanguageModel:
    """A model with other mechanisms in some layers, each started from the weights it replaces (document 000).

    Everything else is copied bit by bit. How near a new part comes to the old one is a matter of the two: the same
    mechanism with fewer key/value heads averages them, a vein cuts by singular values, and so on; see the pages of the
    mechanisms. A wider rank comes nearer.

    Args:
        model: any model; it is left as it was.
        attention, ffn: what to put in, as written in a line; a pattern goes by the layers' numbers.
        layers: which ones, as "0-3,5" or numbers; None: all. Of an encoder–decoder, in both stacks.
        calibration: int64 [B,T], token ids of the kind the model was trained on; low-rank and fitted parts are fitted
            to what the layers see of it. Without it, to normal noise of the size that the norms give, which is worse.

    Returns:
        A new model on the same device, in the same dtype and mode.

    Raises:
        SpecError: a mechanism that does not exist or does not fit, or layers that the model does not have.
        HeadwiseError: nothing to put in was given.
    """
    return swap_parts(model, attention, ffn, layers=layers, calibration=calibration)[0]


def swap_parts(
    model: LanguageModel,
    attention: str | Mapping[str, Any] | ComponentSpec | None = None,
    ffn: str | Mapping[str, Any] | ComponentSpec | None = None,
    *,
    layers: str | Iterable[int] | None = None,
    calibration: Tensor | None = None,
) -> tuple[LanguageModel, list[Swapped]]:
    """`swap`, and what each new part started from."""
    spec = swapped_spec(model.spec, attention, ffn, layers=layers)
    weight = model.embedding.weight
    with torch.no_grad():
        new = build(spec, device=weight.device, dtype=weight.dtype)
        inputs = _inputs(model, calibration)
        parts = [
            Swapped(
                layer,
                family,
                print_value(_kind(model.spec, family, layer)),
                print_value(_kind(spec, family, layer)),
                how,
            )
            for layer, family, how in _fill(new, model, inputs)
        ]
    new.activation_checkpointing = model.activation_checkpointing
    return new.train(model.training), parts


def swapped_spec(
    spec: ModelSpec,
    attention: str | Mapping[str, Any] | ComponentSpec | None = None,
    ffn: str | Mapping[str, Any] | ComponentSpec | None = None,
    *,
    layers: str | Iterable[int] | None = None,
) -> ModelSpec:
    """The spec of the swapped model: patterns of one item a layer where only some change. Raises as `swap`."""
    n_layers = max(spec.dims.n_layers, spec.n_encoder_layers or 0)
    chosen = layer_numbers(layers, n_layers)
    given = {"attention": attention, "ffn": ffn}
    if all(value is None for value in given.values()):
        raise HeadwiseError("nothing to put in was given; give attention, ffn or both, as ffn='vft(rank=16)'")
    fields: dict[str, ComponentSpec] = {}
    problems = []
    for family, value in given.items():
        if value is None:
            continue
        try:
            component = FAMILIES[family].spec(read_value(value) if isinstance(value, str) else value)
        except SpecError as error:
            problems += [Problem(f"{family}.{p.field}".rstrip("."), p.message) for p in error.problems]
            continue
        old: ComponentSpec = getattr(spec, family)
        items = [(component if layer in chosen else old).at(layer) for layer in range(n_layers)]
        fields[family] = _shortest(items)
    if problems:
        raise SpecError(problems)
    return spec.replace(**fields)


def _shortest(items: list[ComponentSpec]) -> ComponentSpec:
    """The layers' components as one, or as the shortest pattern that repeats to them."""
    for n in range(1, len(items) + 1):
        if all(item == items[i % n] for i, item in enumerate(items)):
            break
    return items[0] if n == 1 else Pattern(items=tuple(items[:n]))


def layer_numbers(layers: str | Iterable[int] | None, n_layers: int) -> set[int]:
    """The layers meant by "0-3,5", by numbers, or by None (all).

    Raises:
        SpecError: no numbers, or layers that are not there.
    """
    if layers is None:
        return set(range(n_layers))
    chosen: set[int] = set()
    for piece in layers.split(",") if isinstance(layers, str) else layers:
        first, dash, last = piece.partition("-") if isinstance(piece, str) else (str(piece), "", "")
        try:
            numbers = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise SpecError([Problem("layers", f"{short(layers)} given; write numbers and ranges, as 0-3,5")]) from None
        if not numbers:
            raise SpecError([Problem("layers", f"{short(piece)} given; write the lower layer first, as 0-3")])
        if numbers[0] < 0 or numbers[-1] >= n_layers:
            wanted = f"this model has layers 0 to {n_layers - 1}"
            raise SpecError([Problem("layers", f"{short(piece)} given, but {wanted}")])
        chosen |= set(numbers)
    if not chosen:
        raise SpecError([Problem("layers", "none given; write numbers and ranges, as 0-3,5, or leave layers out")])
    return chosen


def _kind(spec: ModelSpec, family: str, layer: int) -> ComponentSpec:
    component: ComponentSpec = getattr(spec, family)
    return component.at(layer)


def _stacks(model: nn.Module) -> list[tuple[str, Stack]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Stack)]


def _inputs(model: LanguageModel, calibration: Tensor | None) -> dict[str, Tensor]:
    """What each attention and feed-forward is given, [B,T,C], by its name; noise is one sequence without order."""
    inputs: dict[str, Tensor] = {}
    hooks = []
    generator = torch.Generator().manual_seed(0)
    for stack_name, stack in _stacks(model):
        for layer, block in enumerate(stack.blocks):
            for family in FAMILIES_SWAPPED:
                name = f"{stack_name}.blocks.{layer}.{family}"
                if calibration is None:
                    norm = getattr(block, f"{family}_norm", block.attention_norm)
                    noise_NC = torch.randn(SAMPLES, model.spec.dims.d_model, generator=generator)
                    inputs[name] = norm(noise_NC.to(model.embedding.weight))[None]  # type: ignore[operator]
                    continue

                def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                    inputs[name] = args[0]

                hooks.append(getattr(block, family).register_forward_pre_hook(keep))
    if calibration is not None:
        training, reads = model.training, {}
        if model.spec.architecture == "encoder_decoder":
            reads = {"encoder_ids": calibration}
        try:
            model.eval()(calibration, **reads)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
    return inputs


def _sample(x_BTC: Tensor) -> Tensor:
    """At most `SAMPLES` of the vectors, [N,C]."""
    x_NC = x_BTC.flatten(0, -2)
    return x_NC[torch.randperm(len(x_NC), generator=torch.Generator().manual_seed(0))[:SAMPLES].to(x_NC.device)]


def _fit(new: Stack, old: Stack, layer: int, x_BTC: Tensor) -> bool:
    """Fit the output map of a layer's new attention to the old one's results; whether that was kept."""

    def run(stack: Stack) -> Tensor:
        attention: Any = stack.blocks[layer].attention
        T, codes = x_BTC.shape[1], list(stack.positions)
        code: Any = codes[layer % len(codes)]
        encoding = code.encode(torch.arange(T, device=x_BTC.device), T, stack.rotary_dims[layer])
        training = attention.training
        try:
            y_BTC, _ = attention.eval()(x_BTC, context=Context(causal=stack.causal, encoding=encoding))
        finally:
            attention.train(training)
        return y_BTC

    wanted_BTC = run(old)
    if relative_error(run(new), wanted_BTC) < 1e-4:
        return False
    return fit_output(new.blocks[layer].attention, lambda: run(new), wanted_BTC)  # type: ignore[arg-type]


def _fill(new: LanguageModel, old: LanguageModel, inputs: dict[str, Tensor]) -> list[tuple[int, str, str]]:
    """Copy what stays and start what is new; (layer, family, how) of the latter."""
    replaced: dict[str, tuple[int, str, str]] = {}
    for (stack_name, stack), (_, before) in zip(_stacks(new), _stacks(old)):
        for layer, (block, old_block) in enumerate(zip(stack.blocks, before.blocks)):
            position = _turning(old.spec, layer)
            for family in (*FAMILIES_SWAPPED, "cross_attention"):
                part, old_part = getattr(block, family), getattr(old_block, family)
                if part is None or _same(new.spec, old.spec, family, layer):
                    continue
                name = f"{stack_name}.blocks.{layer}.{family}"
                x_BTC = inputs.get(name, inputs[f"{stack_name}.blocks.{layer}.attention"])
                how = begin(part, old_part, Start(_sample(x_BTC), **position))
                if family == "attention" and len(x_BTC) > 1 and _fit(stack, before, layer, x_BTC):
                    how += "; output map fitted"
                replaced[name] = (layer, family, how)
    source, own = old.state_dict(), new.state_dict()
    for name, tensor in own.items():
        if not any(name.startswith(f"{part}.") for part in replaced):
            tensor.copy_(source[name])
    return [part for part in replaced.values() if part[1] in FAMILIES_SWAPPED]


def _same(new: ModelSpec, old: ModelSpec, family: str, layer: int) -> bool:
    if family == "cross_attention":
        return bool(new.cross_attention == old.cross_attention)
    return bool(_kind(new, family, layer) == _kind(old, family, layer))


def _turning(spec: ModelSpec, layer: int) -> dict[str, Any]:
    """How this layer's position code turns queries and keys, as `Start` wants to know it."""
    code = spec.position.at(layer)
    if not hasattr(code, "pairing"):
        return {}
    return {"pairing": code.pairing, "share": getattr(code, "partial_rotary_factor", 1.0)}
