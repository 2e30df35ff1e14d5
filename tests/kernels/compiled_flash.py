"""Compile the attention kernels for an H100; print each one's name, shared memory and matrix instructions."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headwise.kernels.flash.backward import delta_kernel, dkdv_kernel, dq_kernel
from headwise.kernels.flash.forward import forward_kernel
from headwise.kernels.flash.launch import Tiles, tiles_of
from headwise.kernels.paged_attention.triton import COLUMNS, paged_kernel

E, D = 80, 64  # padded keys
FLAGS = {"CAUSAL": True, "WINDOW": True, "SOFTCAP": True, "BIAS": True, "SEGMENTS": False, "EVEN": True}
NUMBERS = {"scale": "fp32", "score_scale": "fp32", "cap": "fp32"}
TYPES = {**dict.fromkeys(("L", "DL", "Delta", "Bias", "DBias"), "*fp32"), "QSeg": "*i64", "KSeg": "*i64"}
PAGED = {"Tables": "*i32", "Lens": "*i32", "Y": "*fp32"}  # parts of the keys leave their output in full precision
TENSORS = ("Q", "K", "V", "Y", "DY", "DQ", "DK", "DV")


def compiled(kernel: triton.JITFunction, tiles: Tiles, types: dict[str, str]) -> object:
    settings = {**FLAGS, "E": E, "D": D, "PADDED_E": 128, "PADDED_D": 64, "PRECISION": "ieee"}
    settings |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns}
    signature, aligned = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if parameter.is_constexpr else types.get(name, "i32")
        if signature[name].startswith("*") or name.startswith("stride"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    constants = {name: settings[name] for name, kind in signature.items() if kind == "constexpr"}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )


if __name__ == "__main__":
    types = TYPES | NUMBERS | dict.fromkeys(TENSORS, "*bf16")
    for kernel in (forward_kernel, dq_kernel, dkdv_kernel, delta_kernel, paged_kernel):
        name = kernel.__name__.removesuffix("_kernel")
        own = {"delta": Tiles(64, 64, 4, 1), "paged": Tiles(64, COLUMNS, 4, 3)}
        tiles = own.get(name) or tiles_of(name, E, D, torch.bfloat16)
        made = compiled(kernel, tiles, types | (PAGED if name == "paged" else {}))
        assert len(made.asm["cubin"]) > 1000
        print(name, made.metadata.shared, "wgmma" if "wgmma" in made.asm["ptx"] else "none")
