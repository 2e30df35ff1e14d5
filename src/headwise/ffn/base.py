"""What the feed-forward kinds share: the hidden width, the bias, and the table of activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from headwise.dims import Dims
from headwise.registry import ComponentSpec


class FFNSpec(ComponentSpec):
    """A feed-forward's fields: `d_ff` is the hidden width (None: the kind's rule), `bias` None takes the model's."""

    d_ff: int | None = Field(None, gt=0)
    bias: bool | None = None

    def width(self, dims: Dims) -> int:
        """The hidden width in force."""
        return self.d_ff if self.d_ff is not None else self.default_width(dims)

    def default_width(self, dims: Dims) -> int:
        """The kind's own rule for the hidden width."""
        return 4 * dims.d_model

    def has_bias(self, dims: Dims) -> bool:
        """Whether the linear maps have biases."""
        return dims.bias if self.bias is None else self.bias


def relu2(x: Tensor) -> Tensor:
    """ReLU squared (So et al. 2021)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula (GPT-2's)."""
    return F.gelu(x, approximate="tanh")


def identity(x: Tensor) -> Tensor:
    """No activation (the bilinear GLU)."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "identity": identity,
}
