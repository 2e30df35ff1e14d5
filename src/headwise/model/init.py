"""Initial values.

Each tensor's depend only on (seed, its name, its shape, the scheme), so models share the values of the modules in which
they agree, whatever else differs, and on whatever device they are built.

* `normal`: matrices and embeddings N(0, std²), biases 0, norms 1.
* `gpt2`: as `normal`, but maps that write into the residual stream (`wo`, `w_out`) have std/√(2L), so that the stream's
  size does not grow with the depth (Radford et al. 2019).
* `xavier`: matrices uniform in ±√(6/(in+out)) (Glorot and Bengio 2010), embeddings N(0, 1/C), as in 2017.

A module with values of its own rule defines `initialise(generator)`; it is called in place of the scheme for its own
tensors.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from headwise.spec import ModelSpec

# Maps whose output is added to the residual stream.
RESIDUAL = ("wo", "w_out")


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator whose state is a function of the seed and a tensor's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


@torch.no_grad()
def initialise(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill the tensors of `model` in place by the spec's scheme.

    Args:
        model: module tree; nn.Linear and nn.Embedding follow the scheme, norms keep the ones they are made with.
        spec: names the scheme (`init`, `init_std`) and the depth.
        seed: the run's seed.
    """
    std = spec.init_std
    for name, module in model.named_modules():
        if hasattr(module, "initialise"):
            module.initialise(generator_for(seed, name))
        elif isinstance(module, nn.Embedding):
            width = spec.dims.d_model**-0.5 if spec.init == "xavier" else std
            _normal(module.weight, width, generator_for(seed, f"{name}.weight"))
        elif isinstance(module, nn.Linear):
            if module.bias is not None:
                module.bias.zero_()
            if spec.tie_embeddings and name == "head":
                continue
            generator = generator_for(seed, f"{name}.weight")
            if spec.init == "xavier":
                bound = math.sqrt(6 / sum(module.weight.shape))
                _fill(module.weight, torch.rand(module.weight.shape, generator=generator) * 2 * bound - bound)
            else:
                residual = spec.init == "gpt2" and name.rpartition(".")[2] in RESIDUAL
                scale = 1 / math.sqrt(2 * spec.dims.n_layers) if residual else 1.0
                _normal(module.weight, std * scale, generator)


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    _fill(tensor, torch.randn(tensor.shape, generator=generator) * std)


def _fill(tensor: Tensor, values: Tensor) -> None:
    tensor.copy_(values)
