"""Changes to a model that is already built, each giving a new model whose spec tells the truth about it."""

from __future__ import annotations

import torch

from headwise.attention.tva import TVA, TVASpec
from headwise.errors import HeadwiseError
from headwise.model.base import LanguageModel
from headwise.model.build import build
from headwise.registry import ComponentSpec, Pattern


def fold(model: LanguageModel) -> LanguageModel:
    """The model with every head-wide TVA layer folded into thin maps (document 000): 4·C·H·r weights a layer.

    Logits agree to rounding (1e-5 in float32). The new model stands on the old one's device, in its dtype and mode; its
    spec says `folded=True`, so that it counts, saves and loads as what it is. The old model is left as it was.

    Raises:
        HeadwiseError: no layer folds; a model-wide vein has nothing to fold, and folded layers are folded already.
    """
    attention = model.spec.attention
    spec = model.spec.replace(
        attention=Pattern(items=tuple(_folded(item) for item in attention.items))
        if isinstance(attention, Pattern)
        else _folded(attention)
    )
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
