"""Other libraries' attention, measured in the same run where they are installed: x-transformers and transformers.

Each is the layer its library offers, without dropout; transformers' Llama layer rotates queries and keys (RoPE).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from headwise.lab.bench.cases import Bed, Case, Work, layer_work


def peers(bed: Bed) -> list[Case]:
    """A case for each library that is installed."""
    found = []
    if find_spec("x_transformers"):
        found.append(Case("x-transformers, flash", "peer", lambda length: _x_transformers(bed, length)))
    if find_spec("transformers") and bed.settings.causal:
        found.append(Case("transformers Llama, sdpa", "peer", lambda length: _transformers(bed, length, "sdpa")))
        found.append(Case("transformers Llama, eager", "peer", lambda length: _transformers(bed, length, "eager")))
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
