"""The figures on the pages of docs/mechanisms: `python benchmarks/mechanisms.py [--json] [--save] [TABLE …]`

Every time is a ratio to the first row of its table, measured in turn with it on one thread, as the median of the
rounds and its interval; memory is what a forward pass keeps for the backward pass, counted exactly. `--save` writes
docs/figures/mechanisms.json, from which the pages are filled when the documentation is built.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwise as hw
from common import interleaved, machine
from headwise import kernels
from headwise.attention import Attention, Context
from headwise.cache import LayerCache
from headwise.dims import Dims
from headwise.kernels.attention import sdpa
from headwise.lab.stats import ratio_summary
from headwise.model.base import LanguageModel
from headwise.position.alibi import ALiBiEncoding, slopes
from headwise.position.rope import RoPEEncoding
from headwise.registry import POSITION
from tables import Table, markdown, table

FIGURES = Path(__file__).parent.parent / "docs" / "figures" / "mechanisms.json"
ROUNDS = 11
DEPTHS = (6, 24, 96)
SLICE_SECONDS = 0.03  # a task is repeated until one round's share takes about this long
TIME = ("time", "forward + backward", "ratio")
KEPT = ("kept", "kept for backward", "bytes")


def ratios(tasks: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, list[float | None]]:
    """Time of each task as a ratio to the first one's: [median, lowest, highest of its interval]."""
    first = next(iter(tasks))
    tasks[first]()
    began = time.perf_counter()
    tasks[first]()
    times = max(1, round(SLICE_SECONDS / (time.perf_counter() - began)))

    def repeated(task: Callable[[], object]) -> Callable[[], object]:
        return lambda: [task() for _ in range(times)]

    seconds = interleaved({name: repeated(task) for name, task in tasks.items()}, rounds)
    found: dict[str, list[float | None]] = {}
    for name in tasks:
        summary = ratio_summary(seconds[name], seconds[first])
        assert summary is not None
        found[name] = [1.0, None, None] if name == first else [summary.ratio, summary.lo, summary.hi]
    return found


def kept_bytes(forward: Callable[[], Tensor], own: nn.Module | None = None) -> int:
    """Bytes of the tensors that autograd keeps until the backward pass; parameters of `own` are not counted."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for parameter in own.parameters() if own is not None else ():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(storage.nbytes() for storage in kept.values())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients add up, which costs every task the same."""
    return lambda: forward().sum().backward()


def layers(
    kinds: dict[str, dict[str, Any]], d_model: int, n_heads: int, length: int
) -> dict[str, tuple[Attention, Callable[[], Tensor]]]:
    """Causal attention layers by label, each with its forward pass on one sequence."""
    x_BTC = random(1, length, d_model).requires_grad_()

    def forward(layer: Attention) -> Tensor:
        return layer(x_BTC, context=Context(causal=True))[0]

    made = {label: hw.get_attention(d_model=d_model, n_heads=n_heads, **fields) for label, fields in kinds.items()}
    return {label: (layer, partial(forward, layer)) for label, layer in made.items()}


def heads() -> Table:
    """Numbers of key/value heads: training, decoding, cache; and what the fused form saves."""
    d_model, n_heads, length, held, batch = 256, 8, 1024, 2048, 8
    kinds: dict[str, dict[str, Any]] = {
        "`softmax` (MHA)": {"kind": "softmax"},
        "`gqa(kv_heads=2)`": {"kind": "gqa", "kv_heads": 2},
        "`mqa`": {"kind": "mqa"},
        "`softmax(qk_norm=true)`": {"kind": "softmax", "qk_norm": True},
    }
    made = layers(kinds, d_model, n_heads, length)
    plain = next(iter(made.values()))[1]

    def readable() -> Tensor:
        with kernels.naive():
            return plain()

    tasks = {label: step(forward) for label, (_, forward) in made.items()}
    time_ratio = ratios({**tasks, "`softmax`, readable form": step(readable)})
    token_BTC = random(batch, 1, d_model)
    caches = {}
    for label, (layer, _) in made.items():
        caches[label] = LayerCache()
        caches[label].append(*(random(batch, layer.kv_heads, held, layer.head_dim, seed=s) for s in (1, 2)))

    def decode(label: str) -> None:
        with torch.no_grad():
            made[label][0](token_BTC, context=Context(causal=True, cache=caches[label]))
            caches[label].crop(held)

    decode_ratio = ratios({label: partial(decode, label) for label in made})
    rows = [
        {
            "name": label,
            "time": time_ratio[label],
            "kept": kept_bytes(forward, layer),
            "decode": decode_ratio[label],
            "cache": 2 * layer.spec.kv_numbers_per_token(Dims(d_model, n_heads)),
        }
        for label, (layer, forward) in made.items()
    ]
    last = "`softmax`, readable form"
    layer = next(iter(made.values()))[0]
    rows.append({"name": last, "time": time_ratio[last], "kept": kept_bytes(readable, layer)})
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, float32. Training: 1 sequence of {length} tokens. "
        f"Decoding: {batch} sequences, one token against {held} cached ones. Cache: bytes a token at 2 bytes a number.",
        ("name", "attention", "text"), TIME, KEPT, ("decode", "decoding a token", "ratio"), ("cache", "cache", "bytes"),
        rows=rows,
    )  # fmt: skip


def window() -> Table:
    """Windows against full attention: cost follows the window."""
    d_model, n_heads, length = 128, 4, 4096
    kinds: dict[str, dict[str, Any]] = {"`softmax`": {"kind": "softmax"}}
    kinds |= {f"`window({w})`": {"kind": "window", "window": w} for w in (2048, 1024, 512, 256, 64)}
    made = layers(kinds, d_model, n_heads, length)
    time_ratio = ratios({label: step(forward) for label, (_, forward) in made.items()})
    rows = [
        {"name": label, "time": time_ratio[label], "kept": kept_bytes(forward, layer),
         "keys": layer.spec.keys_seen(length, causal=True) / (length / 2)}
        for label, (layer, forward) in made.items()
    ]  # fmt: skip
    return table(
        f"One causal layer, width {d_model}, {n_heads} heads, {length} tokens, float32.",
        ("name", "attention", "text"), TIME, KEPT, ("keys", "share of the scores", "number"), rows=rows,
    )  # fmt: skip


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
    "heads": heads,
    "window": window,
    "positions": positions,
    "alibi_cost": alibi_cost,
    "alibi_error": alibi_error,
    "rope_error": rope_error,
    "norms": norms,
    "feed_forward": feed_forward,
    "orders": orders,
    "initialisation": initialisation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The figures on the pages of docs/mechanisms.")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"only these: {', '.join(TABLES)}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--save", action="store_true", help="write docs/figures/mechanisms.json (all tables)")
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    if arguments.save and arguments.tables:
        parser.error("--save keeps all tables together; leave the names out")
    torch.set_num_threads(1)
    made = {name: TABLES[name]() for name in arguments.tables or TABLES}
    result = {"command": "python benchmarks/mechanisms.py", "machine": machine(), "tables": made}
    if arguments.save:
        FIGURES.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        print("\n".join(f"{name}\n{markdown(each)}" for name, each in made.items()))


if __name__ == "__main__":
    main()
