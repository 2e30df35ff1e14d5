"""What a model costs, in closed form: parameters by part, FLOPs a token, bytes of KV cache. Nothing is built.

FLOPs count matrix products only (a multiply-add is 2), as torch's counter does; norms, activations and look-ups are
left out. Causal scores count as exactly half of the full square. Training is three times the forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwise.attention import AttentionSpec
from headwise.errors import Problem, SpecError, short
from headwise.spec.grammar import parse
from headwise.spec.model import ModelSpec

BYTES_PER_NUMBER = 2  # a cache in bfloat16 or float16
BYTES_PER_STATE_NUMBER = 4  # a recurrence's state adds up over all tokens and stays in float32


@dataclass(frozen=True)
class Counts:
    """The cost of one model at one context length.

    Attributes:
        params: trainable numbers; `params_by_part` splits them (embedding, position, attention, ffn, norm, head).
        active_params: those that one token meets; fewer where there are mixtures of experts.
        context: tokens in the context that FLOPs and cache are counted at.
        flops_per_token: forward FLOPs a token, averaged over the context.
        train_flops_per_token: forward and backward.
        kv_bytes_per_token: bytes one token adds to the caches of all layers, at 2 bytes a number.
        kv_cache_bytes: bytes held after `context` tokens (windows forget, a recurrence's state is counted once).
    """

    params: int
    params_by_part: dict[str, int]
    active_params: int
    context: int
    flops_per_token: float
    train_flops_per_token: float
    kv_bytes_per_token: int
    kv_cache_bytes: int


def count(spec: ModelSpec | str | Mapping[str, Any], context: int | None = None) -> Counts:
    """Count a model; open widths are resolved at the default size.

    Args:
        spec: what `parse` returns, or anything it reads.
        context: tokens in the context; None takes max_seq_len. For an encoder–decoder both sides read this many, and
            the FLOPs are per decoder token, the encoder's included.

    Raises:
        SpecError: the spec is no architecture, or the context is shorter than one token.
    """
    spec = parse(spec)
    spec = spec if spec.is_resolved else spec.resolve()
    if context is not None and context < 1:
        raise SpecError([Problem("context", f"at least one token is wanted, not {short(context)}")])
    dims, context = spec.dims, context or spec.dims.max_seq_len
    n_layers = dims.n_layers
    n_encoder = spec.n_encoder_layers or 0
    encodes = spec.architecture == "encoder_decoder"

    attention = [spec.attention.at(i) for i in range(n_layers)]
    ffn = [spec.ffn.at(i) for i in range(n_layers)]
    norm = [spec.norm.at(i) for i in range(n_layers)]
    norms_a_layer = {"sandwich": 4, "parallel": 1}.get(spec.order, 2)
    final_norm = 0 if spec.order == "post" else spec.norm.at(n_layers).param_count(dims)

    parts = {
        "embedding": dims.vocab_size * dims.d_model,
        "position": sum(p.param_count(dims) for p in spec.position.each()),
        "attention": sum(a.param_count(dims) for a in attention),
        "ffn": sum(f.param_count(dims) for f in ffn),
        "norm": sum(n.param_count(dims) for n in norm) * norms_a_layer + final_norm,
        "head": (0 if spec.tie_embeddings else dims.vocab_size * dims.d_model)
        + (dims.vocab_size if spec.head_bias else 0),
    }
    enc_ffn = [spec.ffn.at(i) for i in range(n_encoder)] if encodes else []
    flops = sum(a.flops_per_token(dims, context, causal=spec.causal) for a in attention)
    flops += sum(f.flops_per_token(dims, context, causal=spec.causal) for f in ffn)
    flops += 2 * dims.d_model * dims.vocab_size
    if spec.embedding_norm:
        parts["norm"] += spec.norm.at(0).param_count(dims)
    if encodes:
        cross = spec.cross_attention
        enc_attention = [spec.attention.at(i) for i in range(n_encoder)]
        parts["attention"] += sum(a.param_count(dims) for a in enc_attention) + n_layers * cross.param_count(dims)
        parts["ffn"] += sum(f.param_count(dims) for f in enc_ffn)
        norm_encoder = sum(spec.norm.at(i).param_count(dims) for i in range(n_encoder)) * norms_a_layer
        if spec.order != "post":
            norm_encoder += spec.norm.at(n_encoder).param_count(dims)
        norm_cross = sum(n.param_count(dims) for n in norm) * (norms_a_layer // 2)
        parts["norm"] += norm_encoder + norm_cross
        parts["position"] *= 2  # each side has its own
        flops += sum(a.flops_per_token(dims, context, causal=False) for a in enc_attention)
        flops += sum(f.flops_per_token(dims, context, causal=False) for f in enc_ffn)
        flops += n_layers * cross.flops_per_token(dims, context, causal=False)

    resting = sum(f.param_count(dims) - f.active_param_count(dims) for f in (*ffn, *enc_ffn))
    cached = [a for a in attention if isinstance(a, AttentionSpec)] if spec.causal else []
    numbers = [(a.kv_numbers_per_token(dims), a.tokens_cached(context)) for a in cached]
    return Counts(
        params=sum(parts.values()),
        params_by_part=parts,
        active_params=sum(parts.values()) - resting,
        context=context,
        flops_per_token=flops,
        train_flops_per_token=3 * flops,
        kv_bytes_per_token=BYTES_PER_NUMBER * sum(n for n, _ in numbers),
        kv_cache_bytes=BYTES_PER_NUMBER * sum(n * tokens for n, tokens in numbers)
        + BYTES_PER_STATE_NUMBER * sum(a.state_numbers(dims) for a in cached),
    )
