"""Low-rank updates (LoRA, Hu et al. 2021, arXiv:2106.09685): W + (α/r)·B·A, where A and B alone are trained.

The update is worked into the weight itself (torch's parametrisation), so that it acts wherever a layer reads its
weight: in products with several maps side by side, and in a vein that is folded on the way.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from headwise.errors import SettingsError, short
from headwise.io.tensors import module_tensors
from headwise.model.base import LanguageModel

PARAMETRISED = ".parametrizations."  # in the name of a tensor that stands behind a weight


class LowRank(nn.Module):
    """W ↦ W + (α/r)·B·A; B starts at 0, so that nothing has changed yet."""

    def __init__(self, weight_OI: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a_rI = nn.Parameter(weight_OI.new_empty(rank, weight_OI.shape[1]))
        self.b_Or = nn.Parameter(weight_OI.new_zeros(weight_OI.shape[0], rank))
        nn.init.kaiming_uniform_(self.a_rI, a=math.sqrt(5))

    def forward(self, weight_OI: Tensor) -> Tensor:
        return weight_OI + self.scale * (self.b_Or @ self.a_rI)


def add_lora(
    model: LanguageModel, rank: int = 8, alpha: float = 16.0, names: Collection[str] = ("wq", "wk", "wv", "wo")
) -> list[nn.Parameter]:
    """Give the named linear maps low-rank updates and freeze everything else.

    Args:
        model: changed in place; its logits stay what they are.
        rank: r, at least 1; alpha: α.
        names: the maps' own names, in every layer that has them.

    Returns:
        The updates' parameters, which are all that is left to train.

    Raises:
        SettingsError: a rank below 1, or names that no linear map of the model has.
    """
    if rank < 1:
        raise SettingsError(f"lora rank {rank} given; at least 1 is wanted")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    maps = [(name.rpartition(".")[2], m) for name, m in linear.items() if m.weight is not model.embedding.weight]
    allowed = sorted({name for name, _ in maps})
    wrong = [name for name in names if name not in allowed]
    if wrong or not names:
        given = short(wrong[0]) if wrong else "nothing"
        raise SettingsError(f"lora on {given} asked for, but this model's linear maps are {', '.join(allowed)}")
    model.requires_grad_(False)
    updates = []
    for name, module in maps:
        if name in names:
            update = LowRank(module.weight, rank, alpha)
            parametrize.register_parametrization(module, "weight", update)
            updates += [update.a_rI, update.b_Or]
    return updates


@torch.no_grad()
def merge_lora(model: LanguageModel) -> LanguageModel:
    """The same model, in place, with the updates added to its weights and everything free to train again: a plain model
    of the same spec, which saves and loads as such. Without updates nothing is changed but that."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model.requires_grad_(True)


@torch.no_grad()
def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors with the updates added, under the names of a model without any; the model is left as it is."""
    made = {}
    for name, tensor in module_tensors(model).items():
        owner, parametrised, leaf = name.partition(PARAMETRISED)
        if not parametrised:
            made[name] = tensor
        elif leaf == "weight.original":
            updated = model.get_submodule(owner)
            assert isinstance(updated, nn.Linear)
            made[f"{owner}.weight"] = updated.weight.detach()
    return made
