"""The rest of a layer: norms, feed-forwards, orders, initial values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwise as hw
from figures.measuring import KEPT, TIME, kept_bytes, random, ratios, rms, step
from headwise import kernels
from headwise.model.base import LanguageModel
from tables import Table, table

DEPTHS = (6, 24, 96)


def norms() -> Table:
    """RMSNorm against LayerNorm, each also as written on paper."""
    tokens, d_model = 2048, 768
    x = random(tokens, d_model).requires_grad_()
    made = {kind: hw.get_norm(kind, d_model=d_model) for kind in ("layernorm", "rmsnorm")}

    def readable(norm: nn.Module) -> Tensor:
        with kernels.naive():
            return norm(x)

    tasks: dict[str, Callable[[], Tensor]] = {f"`{kind}`": partial(norm, x) for kind, norm in made.items()}
    tasks |= {f"`{kind}`, readable form": partial(readable, norm) for kind, norm in made.items()}

    def no_grad(task: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return task()

        return run

    alone = ratios({name: no_grad(task) for name, task in tasks.items()})
    both = ratios({name: step(task) for name, task in tasks.items()})
    rows = [
        {"name": name, "forward": alone[name], "time": both[name], "kept": kept_bytes(task) - x.nbytes}
        for name, task in tasks.items()
    ]
    return table(
        f"{tokens} tokens of width {d_model}, float32. Memory: what is kept beyond the input itself.",
        ("name", "norm", "text"), ("forward", "forward", "ratio"), TIME, ("kept", "kept for backward", "bytes"),
        rows=rows,
    )  # fmt: skip


def feed_forward() -> Table:
    """Every feed-forward at equal parameters."""
    tokens, d_model = 1024, 384
    x = random(tokens, d_model).requires_grad_()
    fields = {f"`mlp({a})`": {"kind": "mlp", "activation": a} for a in ("gelu", "gelu_tanh", "relu", "silu", "relu2")}
    fields |= {f"`{kind}`": {"kind": kind} for kind in ("glu", "bilinear", "reglu", "geglu", "geglu_tanh", "swiglu")}
    made = {label: hw.get_ffn(d_model=d_model, **each) for label, each in fields.items()}
    forward = {label: partial(ffn, x) for label, ffn in made.items()}
    time_ratio = ratios({label: step(task) for label, task in forward.items()})
    rows = [
        {"name": label, "params": sum(p.numel() for p in ffn.parameters()), "time": time_ratio[label],
         "kept": kept_bytes(forward[label], ffn)}
        for label, ffn in made.items()
    ]  # fmt: skip
    return table(
        f"{tokens} tokens of width {d_model}, float32; default hidden widths (1536, gated 1024), no biases.",
        ("name", "feed-forward", "text"), ("params", "parameters", "count"), TIME, KEPT, rows=rows,
    )  # fmt: skip


def orders() -> Table:
    """Where the norms stand: time, and the gradient that reaches the last layer of models of several depths."""
    length = 256
    ids_BT = torch.randint(65, (2, length + 1), generator=torch.Generator().manual_seed(0))
    names = ("pre", "post", "sandwich", "parallel")

    def build(order: str, depth: int) -> LanguageModel:
        widths = f"d_model=128, n_layers={depth}, n_heads=4, vocab_size=65, max_seq_len={length}"
        return hw.build(f"gpt2({widths}, tie_embeddings=false, init=xavier, order={order})", seed=1)

    def forward(model: LanguageModel) -> Callable[[], Tensor]:
        return partial(model, ids_BT[:, :-1])

    time_ratio = ratios({order: step(forward(build(order, 4))) for order in names})
    rows = []
    for order in names:
        row: dict[str, Any] = {"name": f"`{order}`", "time": time_ratio[order]}
        for depth in DEPTHS:
            model = build(order, depth)
            F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
            row[f"depth{depth}"] = model.get_parameter(f"stack.blocks.{depth - 1}.ffn.w_out.weight").grad.norm().item()
        rows.append(row)
    return table(
        f"Time: a GPT-2 of 4 layers, width 128, {length} tokens, float32. Gradient: its norm at `ffn.w_out` of the "
        "last layer, xavier initialisation, before the first update.",
        ("name", "order", "text"), TIME,
        *((f"depth{depth}", f"gradient, {depth} layers", "number") for depth in DEPTHS), rows=rows,
    )  # fmt: skip


@torch.no_grad()
def initialisation() -> Table:
    """How much the residual stream grows from the first layer to the last, at the start."""
    ids_BT = torch.randint(65, (2, 128), generator=torch.Generator().manual_seed(0))
    rows = []
    for init in ("gpt2", "normal", "xavier"):
        row: dict[str, Any] = {"name": f"`{init}`"}
        for depth in DEPTHS:
            widths = f"d_model=128, n_layers={depth}, n_heads=4, vocab_size=65, max_seq_len=128"
            model = hw.build(f"gpt2({widths}, init={init})", seed=1)
            sizes: list[float] = []
            for place in ("stack.blocks.0", "stack.final_norm"):
                model.get_submodule(place).register_forward_pre_hook(lambda _, args, to=sizes: to.append(rms(args[0])))
            model(ids_BT)
            row[f"depth{depth}"] = sizes[1] / sizes[0]
        rows.append(row)
    return table(
        "Root mean square of the residual stream after the last layer, divided by that before the first: a GPT-2 of "
        "width 128, before the first update.",
        ("name", "init", "text"), *((f"depth{d}", f"{d} layers", "number") for d in DEPTHS), rows=rows,
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {
    "norms": norms,
    "feed_forward": feed_forward,
    "orders": orders,
    "initialisation": initialisation,
}
