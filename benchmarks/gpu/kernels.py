"""The Triton kernels' results against float64, beside what the naive form, SDPA and FlexAttention make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.situation import Situation, attempt, rms
from headwise.kernels.flash import attention, naive
from tables import Table, table

# name → fields, at the full sizes; `bias` is (batch, heads) of the key bias.
CASES: dict[str, dict[str, Any]] = {
    "causal": {"T": 1025, "S": 1025},
    "causal, 64 wide, even": {"T": 1024, "S": 1024, "E": 64, "D": 64},
    "bidirectional, grouped heads": {"T": 257, "S": 257, "H": 8, "K": 2, "causal": False},
    "last queries of many keys": {"T": 97, "S": 1025, "B": 2},
    "window": {"T": 1025, "S": 1025, "window": 100},
    "window, both sides": {"T": 600, "S": 700, "window": 90, "causal": False},
    "soft cap": {"T": 500, "S": 500, "softcap": 5.0},
    "key bias": {"T": 513, "S": 513, "H": 4, "K": 2, "bias": (1, 4)},
    "segments": {"T": 700, "S": 800, "B": 2, "segments": 230, "causal": False},
    "narrow": {"T": 300, "S": 300, "E": 16, "D": 16},
    "widths 80 and 65": {"T": 257, "S": 257, "E": 80, "D": 65},
    "256 wide": {"T": 257, "S": 257, "E": 256, "D": 256},
    "everything": {
        "T": 400, "S": 600, "B": 2, "H": 8, "K": 2, "E": 96, "D": 64, "window": 150, "softcap": 8.0, "bias": (1, 2),
        "segments": 170,
    },
}  # fmt: skip
# Compiling takes longer than running. In float16 only these, which differ from bfloat16 in the name of the type alone;
# in float32, whose products become thousands of instructions, not those that a wider case contains.
IN_FLOAT16 = ("causal", "everything")
NOT_IN_FLOAT32 = ("causal, 64 wide, even", "window", "narrow", "widths 80 and 65", "soft cap")
Runner = Callable[..., tuple[Tensor, Tensor | None]]


def check(here: Situation) -> Table:
    """Every case in bfloat16, most in float32: errors of outputs and gradients as multiples of the naive form's."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for name, case in list(CASES.items())[:: 4 if here.tiny else 1]:
            if (dtype == torch.float16 and name not in IN_FLOAT16) or (
                dtype == torch.float32 and name in NOT_IN_FLOAT32
            ):
                continue
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            if not here.time_left(f"kernels: {label}"):
                continue
            fields = {**case, **({n: case[n] // 16 for n in ("T", "S")} if here.tiny else {})}
            found, failed = attempt(lambda fields=fields, dtype=dtype: _errors(here, fields, dtype))
            row = {"name": label, **(found or {"note": failed})}
            row["passed"] = failed is None and found["forward"] <= 2 and found["backward"] <= 3
            here.targets[f"kernels: {label}"] = row["passed"]
            rows.append({**row, "verdict": "passed" if row["passed"] else "FAILED"})
    return table(
        "Error against float64 (root mean square) as a multiple of the naive form's in the same type; allowed are 2 "
        "forward and 3 for the worst gradient. SDPA and FlexAttention beside it where they compute the same.",
        ("name", "case", "text"), ("verdict", "", "text"), ("forward", "forward", "number"),
        ("backward", "worst gradient", "number"), ("sdpa", "SDPA forward", "number"),
        ("flex", "FlexAttention forward", "number"), ("note", "note", "text"), rows=rows,
    )  # fmt: skip


def _errors(here: Situation, fields: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    made = {"B": 1, "H": 4, "K": 4, "E": 128, "D": 128, "causal": True, "window": None, "softcap": None, **fields}
    B, H, K, T, S, E, D = (made[name] for name in ("B", "H", "K", "T", "S", "E", "D"))
    generator = torch.Generator().manual_seed(T + S)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(here.device, dtype)

    tensors = [random(B, H, T, E), random(B, K, S, E), random(B, K, S, D)]
    tensors += [random(*made["bias"], S)] if "bias" in made else []
    settings = {name: made[name] for name in ("causal", "window", "softcap")} | {"scale": E**-0.5}
    if "segments" in made:
        keys = torch.arange(S, device=here.device).div(made["segments"], rounding_mode="floor").expand(B, S)
        settings["segments"] = (keys[:, S - T :], keys)
    weights = [random(B, H, T, D).double(), random(B, H, T).double()]

    def run(form: Runner, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, *bias = leaves = [x.to(dtype).requires_grad_() for x in tensors]
        y, lse = form(q, k, v, key_bias=bias[0] if bias else None, **settings)
        total = (y.double() * weights[0]).sum() + (lse.double() * weights[1]).sum()
        return [y.detach(), *torch.autograd.grad(total, leaves)]

    exact = run(naive.attention, torch.float64)
    rough, fast = run(naive.attention, dtype), run(attention, dtype)
    multiples = [_multiple(f, n, e) for f, n, e in zip(fast, rough, exact)]
    found = {"forward": multiples[0], "backward": max(multiples[1:])}
    if made["causal"] and T == S and set(fields) <= {"T", "S", "E", "D"} and dtype != torch.float32:
        q, k, v = tensors
        peers = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
        if T % 128 == 0 and not here.tiny:
            from gpu.speed import flex

            peers["flex"] = lambda: flex(here, "causal", T, {})(q, k, v)
        for name, peer in peers.items():
            y, failed = attempt(peer)
            if failed is None:
                found[name] = _multiple(y, rough[0], exact[0])
    return found


def _multiple(fast: Tensor, rough: Tensor, exact: Tensor) -> float:
    """Error over the naive form's; where that is exact to the last bits, over one rounding of the result."""
    if not fast.isfinite().all():
        return float("inf")
    floor = torch.finfo(fast.dtype).eps * rms(exact) / 2
    return rms(fast.double() - exact) / max(rms(rough.double() - exact), floor)
