"""Position codes: what they cost, and how exact they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import headwise as hw
from figures.measuring import KEPT, TIME, kept_bytes, random, ratios, rms, step
from headwise import kernels
from headwise.dims import Dims
from headwise.kernels.attention import sdpa
from headwise.position.alibi import ALiBiEncoding, slopes
from headwise.position.rope import RoPEEncoding
from headwise.registry import POSITION
from tables import Table, table


def positions() -> Table:
    """Each position code in the same small model, against no position code."""
    length = 512
    codes = [
        "none", "learned", "sinusoidal", "rope", "rope(pairing=interleaved)", "rope(partial_rotary_factor=0.25)",
        "rope(scaling=yarn(4, original_max_position_embeddings=128))", "alibi",
    ]  # fmt: skip
    widths = f"d_model=256, n_layers=2, n_heads=8, vocab_size=65, max_seq_len={length}"
    ids_BT = torch.randint(65, (2, length), generator=torch.Generator().manual_seed(0))
    models = {f"`{code}`": hw.build(f"llama({widths}, position={code})") for code in codes}
    forward = {label: partial(model, ids_BT) for label, model in models.items()}
    time_ratio = ratios({label: step(task) for label, task in forward.items()})
    none = kept_bytes(forward["`none`"], models["`none`"])
    rows = [
        {"name": label, "time": time_ratio[label], "kept": kept_bytes(forward[label], model) - none,
         "params": sum(p.numel() for p in model.stack.positions.parameters())}
        for label, model in models.items()
    ]  # fmt: skip
    return table(
        f"A decoder of 2 layers, width 256, 8 heads; 2 sequences of {length} tokens, float32. Memory: what is kept "
        "beyond `none`.",
        ("name", "position", "text"), TIME, ("kept", "more kept for backward", "bytes"),
        ("params", "parameters", "count"), rows=rows,
    )  # fmt: skip


def alibi_cost() -> Table:
    """ALiBi on the fused kernel against no bias, and against a bias that is written out."""
    n_heads, length, width = 4, 2048, 32
    q, k, v = (random(1, n_heads, length, width, seed=s).requires_grad_() for s in range(3))
    encoding = ALiBiEncoding(torch.tensor(slopes(n_heads)), length, length)
    scale = width**-0.5
    triangle = torch.ones(length, length, dtype=torch.bool).tril()

    def written_out() -> Tensor:
        bias_HTS = encoding.bias(q, 0, length).masked_fill(~triangle, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HTS[None], scale=scale)

    tasks: dict[str, Callable[[], Tensor]] = {
        "no bias": lambda: sdpa.attention(q, k, v, scale=scale),
        "ALiBi, two more dimensions": lambda: sdpa.attention(
            q, k, v, scale=scale, bias_factors=encoding.bias_factors(q)
        ),
        "ALiBi, the bias written out": written_out,
    }
    time_ratio = ratios({name: step(task) for name, task in tasks.items()})
    rows = [{"name": name, "time": time_ratio[name], "kept": kept_bytes(task)} for name, task in tasks.items()]
    return table(
        f"Causal scores alone, {n_heads} heads of width {width}, {length} tokens, float32.",
        ("name", "form", "text"), TIME, KEPT, rows=rows,
    )  # fmt: skip


def alibi_error() -> Table:
    """What the place of the factors, and their splitting in half precision, is worth in accuracy."""
    n_heads, width = 8, 64
    rows = []
    for length in (256, 1024, 4096):
        row: dict[str, Any] = {"name": f"{length} tokens"}
        q, k, v = (random(1, n_heads, length, width, seed=s) for s in range(3))
        scale = width**-0.5
        encoding = ALiBiEncoding(torch.tensor(slopes(n_heads)), length, length)
        for dtype, first, other in ((torch.float32, "first", "last"), (torch.bfloat16, "split", "whole")):
            rounded = [x.to(dtype) for x in (q, k, v)]
            with kernels.naive():
                exact_factors = encoding.bias_factors(q.double())
                exact = sdpa.attention(*(x.double() for x in rounded), scale=scale, bias_factors=exact_factors)
            good = sdpa.attention(*rounded, scale=scale, bias_factors=encoding.bias_factors(rounded[0]))
            if dtype == torch.float32:
                q2, k2 = sdpa.with_bias(rounded[0], rounded[1], encoding.bias_factors(rounded[0]), scale)
                turned = [torch.cat([x[..., 2:], x[..., :2]], -1) for x in (q2, k2)]
                bad = sdpa.attention(*turned, F.pad(rounded[2], (0, 2)), scale=1.0)[..., :width]
            else:
                factors = encoding.bias_factors(q)
                bad = sdpa.attention(*rounded, scale=scale, bias_factors=factors)
            row |= {first: rms(good - exact) / rms(exact), other: rms(bad - exact) / rms(exact)}
        rows.append(row)
    return table(
        f"Relative error (root mean square) of the output against float64; {n_heads} heads of width {width}.",
        ("name", "length", "text"), ("first", "float32, factors first", "error"),
        ("last", "float32, factors last", "error"), ("split", "bfloat16, factors split", "error"),
        ("whole", "bfloat16, factors whole", "error"), rows=rows,
    )  # fmt: skip


def rope_error() -> Table:
    """What it takes to keep far positions apart, and that scores depend on the distance alone."""
    width = 64
    code = POSITION.build("rope", Dims(width, 1))
    q, k = random(1, 1, 1, width, seed=1), random(1, 1, 1, width, seed=2)

    def score(i: int, j: int, dtype: torch.dtype) -> float:
        turned = []
        for x, p in ((q, i), (k, j)):
            encoding = code.encode(torch.tensor([p]), p + 1, width)
            angles = encoding.angles if dtype == torch.float64 else encoding.angles.to(dtype)
            turned.append(RoPEEncoding(angles, 1.0, False).rotate(x.double() if dtype == torch.float64 else x))
        return (turned[0] * turned[1]).sum().item()

    exact = score(9, 2, torch.float64)

    def single(p: int) -> Tensor:
        theta = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        return torch.tensor([float(p)])[:, None] * theta

    rows = []
    for far in (0, 1_000, 100_000, 1_000_000):
        i, j = 9 + far, 2 + far
        stored = [RoPEEncoding(single(p), 1.0, False).rotate(x) for x, p in ((q, i), (k, j))]
        ours = [code.encode(torch.tensor([p]), p + 1, width).rotate(x) for x, p in ((q, i), (k, j))]
        rows.append({
            "name": f"{i:,} and {j:,}",
            "exact": abs(score(i, j, torch.float64) - exact),
            "ours": abs((ours[0] * ours[1]).sum().item() - exact),
            "single": abs((stored[0] * stored[1]).sum().item() - exact),
        })  # fmt: skip
    return table(
        f"A score of two tokens 7 apart, head width {width}: how far it is from the same score at positions 9 and 2.",
        ("name", "positions", "text"), ("exact", "all in float64", "error"),
        ("ours", "angles in float64, turned in float32 (as here)", "error"),
        ("single", "angles in float32", "error"), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {
    "positions": positions,
    "alibi_cost": alibi_cost,
    "alibi_error": alibi_error,
    "rope_error": rope_error,
}
