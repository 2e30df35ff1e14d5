"""Other libraries' attention, measured in the same run where they are installed: x-transformers, transformers and
flash-linear-attention.

Of the first two it is the layer that the library offers, without dropout; transformers' Llama layer rotates queries and
keys (RoPE). Of flash-linear-attention it is the function in the middle, between plain linear maps: in Triton on a GPU,
elsewhere its readable form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.lab.bench.cases import Bed, Case, Work, by_hand, layer_work


def peers(bed: Bed) -> list[Case]:
    """A case for each library that is installed."""
    found = []
    if find_spec("x_transformers"):
        found.append(Case("x-transformers, flash", "peer", lambda length: _x_transformers(bed, length)))
    if find_spec("transformers") and bed.settings.causal:
        found.append(Case("transformers Llama, sdpa", "peer", lambda length: _transformers(bed, length, "sdpa")))
        found.append(Case("transformers Llama, eager", "peer", lambda length: _transformers(bed, length, "eager")))
    if find_spec("fla") and bed.settings.causal:
        form = "Triton" if bed.device.type == "cuda" else "readable"
        for name, rule in RULES.items():
            if form == "Triton" or rule.readable is not None:
                found.append(Case(f"fla {name}, {form}", "peer", partial(_fla, bed, rule)))
    return found


def _x_transformers(bed: Bed, length: int) -> Work:
    from x_transformers.x_transformers import Attention

    s = bed.settings
    layer = Attention(dim=s.width, heads=s.n_heads, dim_head=s.head_dim, causal=s.causal, flash=True)
    layer.to(bed.device, bed.dtype)
    return layer_work(bed, length, layer, lambda x_BTC: layer(x_BTC))


def _transformers(bed: Bed, length: int, implementation: str) -> Work:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    s = bed.settings
    config = LlamaConfig(hidden_size=s.width, num_attention_heads=s.n_heads, head_dim=s.head_dim)
    config._attn_implementation = implementation
    layer = LlamaAttention(config, layer_idx=0).to(bed.device, bed.dtype)
    positions_BT = torch.arange(length, device=bed.device)[None]
    places = LlamaRotaryEmbedding(config).to(bed.device)(bed.random(1), positions_BT)
    mask = None
    if implementation == "eager":  # which knows causality from a mask alone
        mask = torch.full((length, length), -torch.inf, device=bed.device, dtype=bed.dtype).triu(1)[None, None]
    return layer_work(bed, length, layer, lambda x_BTC: layer(x_BTC, places, mask)[0])


class Rule(NamedTuple):
    """A function of flash-linear-attention: where it is, how it is called, and its gates' widths a head."""

    fast: str
    readable: str | None  # None: one token after another, which is no form to be timed
    call: Callable[..., Any]
    gates: Callable[[int], tuple[int, ...]] = lambda head_dim: ()
    chunk: int = 1  # what the readable form's lengths are multiples of
    heads_first: bool = False  # whether the readable form takes [B,H,T,D] in place of [B,T,H,D]


def _features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _linear(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
    return function(_features(q), _features(k), v, normalize=True)


def _gla(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
    return function(q, k, v, F.logsigmoid(gate) / 16)


def _delta(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Any:
    return function(_unit(q), _unit(k), v, beta.squeeze(-1).sigmoid())


def _gated_delta(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Any:
    return function(_unit(q), _unit(k), v, g=F.logsigmoid(gate.squeeze(-1)), beta=beta.squeeze(-1).sigmoid())


RULES = {
    "linear": Rule("linear_attn:chunk_linear_attn", "linear_attn.naive:naive_chunk_linear_attn", _linear, chunk=64),
    "retention": Rule(
        "retention:chunk_retention", "retention.naive:naive_retention", lambda f, *qkv: f(*qkv), heads_first=True
    ),
    "gla": Rule("gla:chunk_gla", None, _gla, lambda head_dim: (head_dim,)),
    "deltanet": Rule(
        "delta_rule:chunk_delta_rule", "delta_rule.naive:delta_rule_chunkwise", _delta, lambda _: (1,), 32, True
    ),
    "gated_deltanet": Rule(
        "gated_delta_rule:chunk_gated_delta_rule",
        "gated_delta_rule.naive:naive_chunk_gated_delta_rule",
        _gated_delta,
        lambda _: (1, 1),
    ),
}


def _fla(bed: Bed, rule: Rule, length: int) -> Work:
    gpu = bed.device.type == "cuda"
    if not gpu and length % rule.chunk:
        raise HeadwiseError(f"takes lengths that {rule.chunk} divides")
    module, _, name = (rule.fast if gpu else str(rule.readable)).partition(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Triton has no GPU
        function = getattr(import_module(f"fla.ops.{module}"), name)

    def meet(*heads_BTHD: Tensor) -> Tensor:
        turn = rule.heads_first and not gpu
        made = rule.call(function, *((x.transpose(1, 2) for x in heads_BTHD) if turn else heads_BTHD))
        y: Tensor = made[0] if isinstance(made, tuple) else made
        return y.transpose(1, 2) if turn else y

    return by_hand(bed, length, meet, rule.gates(bed.settings.head_dim))
