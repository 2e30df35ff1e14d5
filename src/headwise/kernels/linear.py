"""The linear map y = x·Wᵀ + b, on a CPU in inference by oneDNN.

torch hands float32 products on a CPU to MKL, whose product with one row of x runs in one thread and reads W at a third
to a half of the memory's speed: that product is what decoding one token consists of. oneDNN, which torch carries along
for its other types, reads W in all threads, and is quicker with more rows too (benchmarks/bench_generation.py). It is
reached by the operator that `torch.compile` puts into compiled models. That operator has no backward pass, so
everything that may need one stays with torch's choice. In a compiled step, one row is left to the compiler (`one_row`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.kernels import naive_wanted, one_row

# Numbers of W from which the better use of memory outweighs the 20 µs that a call of oneDNN costs.
LARGE = 1 << 16
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_pointwise = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [...,K] → [...,N], of the dtype of its arguments, which share one."""
    if one_row.serves(x) and not naive_wanted():
        y_N = one_row.product(x, weight_NK)
        return (y_N if bias_N is None else y_N + bias_N).to(x.dtype)
    if (
        _pointwise is None
        # torch's compiler takes the operator from its own patterns alone, and cannot look at what is asked below.
        or torch.compiler.is_compiling()
        or weight_NK.numel() < LARGE
        or not torch.is_inference_mode_enabled()
        or not x.dtype == weight_NK.dtype == torch.float32
        or x.device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or naive_wanted()
    ):
        return F.linear(x, weight_NK, bias_N)
    y: Tensor = _pointwise(x, weight_NK, bias_N, "none", [], "")
    return y
