"""Floor 6: the documents' own interfaces, under the names their readers know (`vein`: document 000)."""

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

__all__ = [
    "NormalCompensator",
    "TVAAttention",
    "VFTBlock",
    "VFTFeedForward",
    "VeinProjector",
    "VeinSubspaceShared",
    "create_vft_block",
    "get_attention",
    "get_ffn",
    "list_attention",
    "list_ffn",
    "recommend_rank",
    "register_attn",
    "register_ffn",
]
