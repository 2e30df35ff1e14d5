"""How fast the kernels are, against torch's own attention and against what the chip can do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu.situation import Situation, attempt
from headwise.kernels.flash import attention, naive
from headwise.kernels.flash import launch as flash
from tables import Table, table

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
WINDOW = 1024
SOFTCAP = 30.0
ROUNDS = 3
DIRECTIONS = ("forward", "forward + backward")
FLASH, SDPA, FLEX = "headwise flash", "SDPA", "FlexAttention, compiled"


def peaks(here: Situation) -> dict[str, float]:
    """What this chip reaches here and now: a bfloat16 matrix product (FLOP/s), and a copy (bytes/s, read and write)."""
    n, size = (64, 1 << 16) if here.tiny else (8192, 1 << 30)
    a, b = (torch.randn(n, n, device=here.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size // 4, device=here.device)
    target = torch.empty_like(source)
    product = here.milliseconds(lambda: a @ b)
    copy = here.milliseconds(lambda: target.copy_(source))
    return {"matmul_flops": 2 * n**3 / product * 1e3, "copy_bytes": 2 * size / copy * 1e3}


# ---- who takes part ----


def flex(here: Situation, variant: str, T: int, given: dict[str, Tensor]) -> Attention:
    """FlexAttention for a variant, compiled anew: a second shape in one compiled function may fall back to the dense
    form, without a word.
    """
    window = WINDOW if not here.tiny else 8

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window) if variant == "window" else i >= j

    bias_HS = given["bias"][0] if variant == "key bias" else None

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if bias_HS is not None:
            return s + bias_HS[h, j]
        return SOFTCAP * torch.tanh(s / SOFTCAP) if variant == "soft cap" else s

    mask = create_block_mask(seen, None, None, T, T, device=str(here.device))
    torch._dynamo.reset()
    form = flex_attention if here.tiny else torch.compile(flex_attention, dynamic=False, fullgraph=True)
    scored = score if variant in ("key bias", "soft cap") else None
    return lambda q, k, v: form(q, k, v, score_mod=scored, block_mask=mask)


def ours(here: Situation, variant: str, form: Any, given: dict[str, Tensor]) -> Attention:
    """One of our forms for a variant."""
    settings: dict[str, Any] = {"scale": None}
    settings |= {"window": (8 if here.tiny else WINDOW)} if variant == "window" else {}
    settings |= {"softcap": SOFTCAP} if variant == "soft cap" else {}
    settings |= {"key_bias": given["bias"]} if variant == "key bias" else {}
    return lambda q, k, v: form(q, k, v, **{**settings, "scale": q.shape[-1] ** -0.5})[0]


def stock(backend: SDPBackend | None) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def participants(here: Situation, variant: str, T: int, given: dict[str, Tensor]) -> dict[str, Callable[[], Attention]]:
    """Name → what makes it ready. Stock attention knows causality only."""
    made: dict[str, Callable[[], Attention]] = {FLASH: lambda: ours(here, variant, attention, given)}
    if variant == "causal":
        made[SDPA] = lambda: stock(None)
        made["SDPA, flash"] = lambda: stock(SDPBackend.FLASH_ATTENTION)
        made["SDPA, cuDNN"] = lambda: stock(SDPBackend.CUDNN_ATTENTION)
    made[FLEX] = lambda: flex(here, variant, T, given)
    if T <= 4096:  # the naive form writes B·H·T² numbers several times over
        made["naive"] = lambda: ours(here, variant, naive.attention, given)
    return made


# ---- what is measured ----


def measure(here: Situation, variants: list[str], peak: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each variant, width, length, direction and participant; sets the targets."""
    rows: list[dict[str, Any]] = []
    lengths = [32] if here.tiny else [4096, 8192, 16384]
    for variant in variants:
        for D in (16,) if here.tiny else (64, 128):
            # FlexAttention compiles for seconds at each length: the ends of the range will do for what it is asked.
            for T in lengths if variant == "causal" else [lengths[0], lengths[-1]][: len(lengths)]:
                label = f"{variant}, width {D}, {T} tokens"
                if here.time_left(f"speed: {label}"):
                    rows += _rows(here, variant, D, T, lengths[-1], peak)
                    here.say(f"timed {label}")
    return rows


def _rows(
    here: Situation, variant: str, D: int, T: int, tokens: int, peak: dict[str, float]
) -> list[dict[str, Any]]:  # fmt: skip
    B, H = tokens // T, (32 if here.tiny else 2048) // D
    generator = torch.Generator(here.device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=here.device, dtype=dtype)

    q, k, v = (random(B, H, T, D).requires_grad_() for _ in range(3))
    dy = random(B, H, T, D)
    # ALiBi's key bias: the steepest slopes first.
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1, device=here.device) / H)
    given = {"bias": (slopes[:, None] * torch.arange(T, device=here.device))[None]}
    makers = participants(here, variant, T, given)
    ready = {name: attempt(make) for name, make in makers.items()}
    times: dict[tuple[str, str], list[float]] = {}
    notes: dict[tuple[str, str], str | None] = {}
    for _ in range(1 if here.tiny else ROUNDS):
        for name, (form, failed) in ready.items():
            for direction in DIRECTIONS:
                task = _task(form, q, k, v, dy, direction)
                took, wrong = (None, failed) if failed else attempt(lambda task=task: here.milliseconds(task))
                notes[name, direction] = wrong
                if took is not None:
                    times.setdefault((name, direction), []).append(took)
    rows = []
    for direction in DIRECTIONS:
        for name in ready:
            took = times.get((name, direction))
            row: dict[str, Any] = {
                "variant": variant, "D": D, "T": T, "B": B, "H": H, "direction": direction, "name": name,
            }  # fmt: skip
            if took:
                row |= _rates(sorted(took)[len(took) // 2], variant, row, peak, 8 if here.tiny else WINDOW)
            rows.append(row | {"note": notes[name, direction]})
    _judge(here, rows, variant, D, T)
    return rows


def _task(form: Attention, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, direction: str) -> Callable[[], object]:
    if direction == "forward":
        plain = [x.detach() for x in (q, k, v)]
        return lambda: form(*plain)
    return lambda: torch.autograd.grad(form(q, k, v), (q, k, v), dy)


def _rates(
    milliseconds: float, variant: str, row: dict[str, Any], peak: dict[str, float], window: int
) -> dict[str, float]:  # fmt: skip
    """Products of visible scores only, two a score forward and five backward; each tensor moved once."""
    T, D, heads = row["T"], row["D"], row["B"] * row["H"]
    w = min(T, window) if variant == "window" else T
    scores = w * T - w * (w - 1) / 2
    both = row["direction"] != "forward"
    flops = heads * scores * D * 2 * (7 if both else 2)
    numbers = heads * T * D * (4 + (8 if both else 0))
    seconds = milliseconds / 1e3
    return {
        "ms": milliseconds, "tflops": flops / seconds / 1e12, "peak": flops / seconds / peak["matmul_flops"],
        "gbytes": 2 * numbers / seconds / 1e9, "copy": 2 * numbers / seconds / peak["copy_bytes"],
    }  # fmt: skip


def _judge(here: Situation, rows: list[dict[str, Any]], variant: str, D: int, T: int) -> None:
    """Forward within 15 % of stock attention; windows and key biases faster than compiled FlexAttention."""
    for direction in DIRECTIONS:
        ms = {row["name"]: row.get("ms") for row in rows if row["direction"] == direction}
        rival = SDPA if variant == "causal" else FLEX
        if ms[rival] is None and ms[FLASH] is not None:
            here.not_run.append(f"speed: {variant}, width {D}, {T} tokens, {direction}: {rival} gave no time")
            continue
        reached = ms[FLASH] is not None and ms[FLASH] <= (1.15 if variant == "causal" else 1.0) * ms[rival]
        if variant == "causal" and direction == "forward":
            here.targets[f"speed: width {D}, {T} tokens, forward: within 15 % of SDPA"] = reached
        elif variant in ("window", "key bias"):
            here.targets[f"speed: {variant}, width {D}, {T} tokens, {direction}: faster than FlexAttention"] = reached


def as_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """A table for each variant and direction."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["direction"]), []).append(row)
    return [
        table(
            f"**{variant}, {direction}**, bfloat16"
            + (f", window {WINDOW}" if variant == "window" else f", cap {SOFTCAP:g}" if variant == "soft cap" else ""),
            ("D", "width", "count"), ("T", "tokens", "count"), ("B", "batch", "count"), ("H", "heads", "count"),
            ("name", "kernel", "text"), ("ms", "ms", "number"), ("tflops", "TFLOP/s", "number"),
            ("peak", "of the matrix product's", "number"), ("gbytes", "GB/s", "number"),
            ("copy", "of the copy's", "number"), ("note", "note", "text"), rows=group,
        )
        for (variant, direction), group in groups.items()
    ]  # fmt: skip


# ---- other tiles ----

CANDIDATES: dict[tuple[str, int], list[flash.Tiles]] = {
    ("forward", 64): [(128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    ("forward", 128): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)],
    ("dq", 64): [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 4, 2)],
    ("dq", 128): [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (64, 64, 8, 3)],
    ("dkdv", 64): [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 128, 4, 3), (32, 128, 8, 3)],
    ("dkdv", 128): [(64, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2)],
}  # type: ignore[dict-item]


def tune(here: Situation) -> Table:
    """Every candidate for a kernel's tiles, causal: the time of the pass it takes part in."""
    rows = []
    T, B = (32, 1) if here.tiny else (8192, 2)
    for (kernel, D), candidates in CANDIDATES.items():
        key = (kernel, D, True)
        kept = flash.TILES[key]
        q, k, v, dy = (
            torch.randn(B, 1 if here.tiny else 2048 // D, T, D, device=here.device, dtype=torch.bfloat16)
            for _ in range(4)
        )
        for tensor in (q, k, v):
            tensor.requires_grad_()
        task = _task(
            ours(here, "causal", attention, {}), q, k, v, dy, DIRECTIONS[kernel != "forward"]
        )  # fmt: skip
        for candidate in candidates[:1] if here.tiny else candidates:
            if here.time_left(f"tiles: {kernel}, width {D}, {candidate}"):
                flash.TILES[key] = flash.Tiles(*candidate)
                took, failed = attempt(lambda task=task: here.milliseconds(task))
                rows.append({"kernel": kernel, "D": D, "tiles": str(tuple(candidate)), "ms": took, "note": failed})
        flash.TILES[key] = kept
        here.say(f"tried tiles of {kernel}, width {D}")
    return table(
        "Tiles (rows, columns, warps, stages): milliseconds of the forward pass, or of both.",
        ("kernel", "kernel", "text"), ("D", "width", "count"), ("tiles", "tiles", "text"), ("ms", "ms", "number"),
        ("note", "note", "text"), rows=rows,
    )  # fmt: skip
