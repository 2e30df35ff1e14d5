"""A GGUF file's tensors as torch's, one at a time: plain numbers as they lie there, quantised blocks taken apart by the
`gguf` library some thousands at a time, so that nothing is held twice.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from headwise.errors import FormatError
from headwise.io.gguf.header import Header, TensorInfo

Type = GGMLQuantizationType
PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_CHUNK = 1 << 18  # numbers taken apart at once: what the work between them takes stays in the caches


def file_dtype(header: Header) -> torch.dtype:
    """In what precision a file's model is kept where nothing else is asked for: its own where it has plain numbers only
    (norms in float32 beside half-precision matrices do not count), float32 where it is quantised."""
    kinds = {info.type for info in header.tensors.values()}
    if not kinds <= set(PLAIN):
        return torch.float32
    return next((PLAIN[kind] for kind in (Type.BF16, Type.F16) if kind in kinds), torch.float32)


def check_types(header: Header) -> None:
    """Refuse tensors of a type that nothing here can read. Raises FormatError."""
    for info in header.tensors.values():
        if not readable(info.type):
            known = ", ".join(kind.name for kind in Type if readable(kind))
            raise FormatError(f"{header.path}: {info.name!r} is of type {info.type.name}; supported: {known}")


@cache
def readable(kind: Type) -> bool:
    """Whether numbers of this type can be had from a file."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_tensor(header: Header, info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """A tensor's numbers on the CPU in `dtype`, in memory of its own. Its type is one that `check_types` lets pass."""
    values = torch.empty(info.shape, dtype=dtype)
    flat = values.view(-1)
    per_block, block_bytes = GGML_QUANT_SIZES[info.type]
    blocks = header.bytes.array(info.start, info.n_bytes, np.uint8)
    # As one long row: the library goes through short ones sixteen at a time, five times slower.
    step = _CHUNK // per_block
    with np.errstate(all="ignore"):  # a scale may be infinite; whoever wants to know looks for NaN in the weights
        for block in range(0, len(flat) // per_block, step):
            part = dequantize(blocks[block * block_bytes : (block + step) * block_bytes][None], info.type)[0]
            numbers = torch.from_numpy(part if part.flags.writeable else part.copy())
            flat[block * per_block : (block + step) * per_block] = numbers
    return values
