"""AdamW in parameter groups: what decays, what learns slower, and its state by parameter name.

Weight decay acts on matrices (two or more dimensions), the embedding tables among them, as GPT-2's and nanoGPT's
training does; gains, biases and every other vector do not decay. AdamW is Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from inspect import unwrap
from typing import TYPE_CHECKING

import torch

from headwise.errors import FormatError, SettingsError, nearest
from headwise.train.settings import TrainSettings
from headwise.train.vein import vein_factors

if TYPE_CHECKING:
    from torch import Tensor, nn


def lr_factors(names: Iterable[str], multipliers: Mapping[str, float]) -> dict[str, float]:
    """The learning-rate factor of each parameter name; several matching patterns multiply.

    A pattern (fnmatch: `*`, `?`, `[…]`) names a parameter, or a module and so everything in it: `blocks.0` and
    `*.vein.*` both work. One that matches nothing raises `SettingsError`, for it is almost always misspelt.
    """
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in multipliers.items():
        matched = [name for name in factors if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not matched:
            modules = sorted({part for name in factors for part in _prefixes(name)})
            raise SettingsError(
                f"lr_multipliers: {pattern!r} matches no parameter and no module{nearest(pattern, modules)}; "
                f"parameters are named like {', '.join(list(factors)[:3])}"
            )
        for name in matched:
            factors[name] *= factor
    return factors


def _prefixes(name: str) -> list[str]:
    """A parameter's own name and those of the modules around it: a.b.weight, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


class AdamW(torch.optim.AdamW):
    """torch's, without the wrappers that hide an optimiser from its compiler: with them every process that trains would
    load the compiler, which takes as long as loading torch."""

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> AdamW:
    """AdamW over the model's trainable parameters; each group carries `factor`, which the loop multiplies `lr` by."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors, veins = lr_factors(named, settings.lr_multipliers), vein_factors(model, settings)
    groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
    for name, parameter in named.items():
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups[decay, factors[name] * veins.get(name, 1.0)].append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": decay, "factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
        fused=all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in named.values()),
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, `PARAMETER/KEY` (as `blocks.0.ffn.up.weight/exp_avg`)."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took; `FormatError` where a tensor does not belong to this model."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise FormatError(f"optimizer state {full_name!r} belongs to no parameter of this model")
        if value.ndim and value.shape != parameters[name].shape:
            raise FormatError(
                f"optimizer state {full_name!r} has shape {tuple(value.shape)}, "
                f"its parameter {tuple(parameters[name].shape)}"
            )
        device = parameters[name].device if value.ndim or optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameters[name]][key] = value.to(device)
