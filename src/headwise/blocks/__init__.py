"""Floor 6: the documents' own interfaces under their own names (`vein`: document 000, `paged`: document 002,
`wasserstein`: document 003)."""

from headwise.blocks.paged import KVCache, PagedAttention
from headwise.blocks.vein import (
    NormalCompensator,
    TVAAttention,
    VeinProjector,
    VeinSubspaceShared,
    VFTBlock,
    VFTFeedForward,
    create_vft_block,
    get_attention,
    get_ffn,
    list_attention,
    list_ffn,
    recommend_rank,
    register_attn,
    register_ffn,
)
from headwise.blocks.wasserstein import RotaryEmbedding, W2Attention, W2Config, W2TransformerBlock

__all__ = [
    "KVCache",
    "NormalCompensator",
    "PagedAttention",
    "RotaryEmbedding",
    "TVAAttention",
    "VFTBlock",
    "VFTFeedForward",
    "VeinProjector",
    "VeinSubspaceShared",
    "W2Attention",
    "W2Config",
    "W2TransformerBlock",
    "create_vft_block",
    "get_attention",
    "get_ffn",
    "list_attention",
    "list_ffn",
    "recommend_rank",
    "register_attn",
    "register_ffn",
]
