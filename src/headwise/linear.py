"""The linear map that every mechanism is made of: torch's module, computed by `kernels.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from headwise.kernels.linear import linear


class Linear(nn.Linear):
    """x [...,C] → x·Wᵀ + b [...,F]: `nn.Linear` in all but the kernel of inference on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
