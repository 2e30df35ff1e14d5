"""What decoder, encoder and encoder–decoder share: a stack of blocks, and token embeddings with an output head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headwise.attention import AttentionSpec, Context
from headwise.cache import ModelCache, Placed, new_model_cache
from headwise.errors import HeadwiseError
from headwise.kernels.segments import segment_positions as segment_positions
from headwise.linear import Linear
from headwise.model.block import Block
from headwise.position import Encoding, Position
from headwise.registry import NORM, POSITION
from headwise.spec import ModelSpec


class Stack(nn.Module):
    """Blocks with their position codes and the final norm: vectors [B,T,C] → [B,T,C]."""

    def __init__(self, spec: ModelSpec, n_layers: int, *, causal: bool, cross: bool = False) -> None:
        super().__init__()
        dims = spec.dims
        self.causal = causal
        self.activation_checkpointing = False
        self.positions = nn.ModuleList(POSITION.build(code, dims) for code in spec.position.each())
        self.blocks = nn.ModuleList(Block(spec, dims, layer, cross=cross) for layer in range(n_layers))
        self.final_norm = NORM.build(spec.norm.at(n_layers), dims) if spec.order != "post" else nn.Identity()
        specs = [spec.attention.at(layer) for layer in range(n_layers)]
        self.rotary_dims = [a.rotary_dim(dims) if isinstance(a, AttentionSpec) else dims.head_dim for a in specs]

    def place(self, x_BTC: Tensor, placed: Placed) -> Tensor:
        """Embeddings with absolute positions added, where the code does that; refuses lengths it cannot place."""
        unequal = placed.positions.dim() == 2 and placed.segments is None
        for code in self._codes():
            code.check_length(placed.seq_len)
            if unequal and code.by_length(placed.seq_len):
                raise HeadwiseError(
                    f"at {placed.seq_len} tokens this model's positions depend on the length of a whole input, which "
                    "rows of unequal length in one batch do not share; give such texts one by one"
                )
            x_BTC = code.embed(x_BTC, placed.positions)
        return x_BTC

    def new_cache(self, kind: str = "auto", **options: Any) -> ModelCache:
        """An empty cache for these blocks. Raises as `new_model_cache`."""
        needs = [block.attention.cache_needs() for block in self.blocks]  # type: ignore[operator, union-attr]
        return new_model_cache(needs, kind, **options)

    def _codes(self) -> Sequence[Position]:
        return list(self.positions)  # type: ignore[arg-type]

    def contexts(self, placed: Placed, cache: ModelCache | None = None) -> list[Context]:
        """What each layer is told of new tokens that stand as `placed` says."""
        codes = self._codes()
        encodings: dict[tuple[int, int], Encoding] = {}
        contexts = []
        for layer, rotary_dim in enumerate(self.rotary_dims):
            key = (layer % len(codes), rotary_dim)
            if key not in encodings:
                encodings[key] = codes[key[0]].encode(placed.positions, placed.seq_len, rotary_dim)
                if placed.segments is not None:
                    encodings[key] = encodings[key].in_segments(placed.segments[1])
            held = cache.layers[layer] if cache is not None else None
            contexts.append(Context(self.causal, encodings[key], placed.segments, held))
        return contexts

    def forward(
        self,
        x_BTC: Tensor,
        placed: Placed,
        *,
        cache: ModelCache | None = None,
        memory_BSC: Tensor | None = None,
        memory_segments: tuple[Tensor, Tensor] | None = None,
        last: bool = False,
    ) -> Tensor:
        """Run the blocks on new tokens that stand as `placed` says; `memory_BSC` is what cross-attention looks at.

        With `last`, where there is a cache, [B,1,C]: the last token's vector alone, and the last block computes no more
        of the others than the cache keeps. Without a cache someone may be watching what is made of them.
        """
        last = last and cache is not None
        memory_context = Context(segments=memory_segments)
        for n, (block, context) in enumerate(zip(self.blocks, self.contexts(placed, cache)), 1):
            args = (x_BTC, context, memory_BSC, memory_context)
            if self.activation_checkpointing and self.training:
                x_BTC = checkpoint(block, *args, use_reentrant=False)
            else:
                x_BTC = block(*args, last=last and n == len(self.blocks))
        return self.final_norm(x_BTC[:, -1:] if last else x_BTC)


class LanguageModel(nn.Module, ABC):
    """Token embeddings in, logits out; subclasses say what stands between.

    Attributes:
        spec: the resolved spec the module was built from.
        activation_checkpointing: recompute each block in the backward pass in place of keeping its activations.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        dims = spec.dims
        self.embedding = nn.Embedding(dims.vocab_size, dims.d_model)
        self.embedding_norm = NORM.build(spec.norm.at(0), dims) if spec.embedding_norm else nn.Identity()
        self.embedding_scale = math.sqrt(dims.d_model) if spec.scale_embeddings else None
        self.head = Linear(dims.d_model, dims.vocab_size, bias=spec.head_bias)
        if spec.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.dropout = dims.dropout

    @abstractmethod
    def decoding_stack(self) -> Stack:
        """The blocks that a cache is for."""

    def new_cache(self, kind: str = "auto", **options: Any) -> ModelCache:
        """An empty cache for decoding; hand it to every call.

        Args:
            kind: "auto" (each layer's own: rolling for windows, latent, recurrent, else growing), "contiguous"
                (growing), "static" (room for `max_len` tokens, by default the model's `max_seq_len`), "rolling",
                "paged" (`block_size`, `num_blocks`; without the latter it grows), "int8" or "int4" (`group_size`,
                `symmetric`).
            options: the kind's own; for "auto" `slack`, the tokens that a rolling cache can take back, and
                `checkpoints`, the earlier states that a recurrent one keeps to be cropped to.

        Raises:
            SettingsError: an unknown kind or option, a value out of range, or a kind that cannot serve a layer.
        """
        if kind == "static":
            options.setdefault("max_len", self.spec.dims.max_seq_len)
        return self.decoding_stack().new_cache(kind, **options)

    @property
    def activation_checkpointing(self) -> bool:
        return any(m.activation_checkpointing for m in self.modules() if isinstance(m, Stack))

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        for module in self.modules():
            if isinstance(module, Stack):
                module.activation_checkpointing = wanted

    def aux_loss(self) -> Tensor | None:
        """What the modules add to the training loss (0-d, for the last forward pass); None where none does.

        A module takes part by setting `aux_loss` in its forward pass.
        """
        found = (getattr(module, "aux_loss", None) for module in self.modules())
        losses = [loss for loss in found if isinstance(loss, Tensor)]
        return torch.stack(losses).sum() if losses else None

    def metrics(self) -> dict[str, float]:
        """What the modules measured of themselves in the last forward pass, as `MODULE.NAME` → value.

        A module takes part by setting `metrics`, a dict of 0-d tensors without gradient, in its forward pass.
        """
        found = {
            f"{name}.{key}": value
            for name, module in self.named_modules()
            if module is not self and isinstance(getattr(module, "metrics", None), dict)
            for key, value in module.metrics.items()
        }
        return dict(zip(found, torch.stack(list(found.values())).tolist())) if found else {}

    def embed(self, ids_BT: Tensor, stack: Stack, placed: Placed) -> Tensor:
        """Token ids, int64 [B,T], to the vectors that enter the stack, float [B,T,C].

        Raises:
            HeadwiseError: the ids are not int64 [B,T].
        """
        x_BTC = self.embedding(ids_BT)
        if self.embedding_scale is not None:
            x_BTC = x_BTC * self.embedding_scale
        x_BTC = stack.place(self.embedding_norm(x_BTC), placed)
        return F.dropout(x_BTC, self.dropout, self.training) if self.dropout else x_BTC

    def logits(self, y_BTC: Tensor) -> Tensor:
        """What the head makes of the stack's vectors: float [B,T,V], bent by the soft cap c to c·tanh(x/c)."""
        logits_BTV, cap = self.head(y_BTC), self.spec.logit_softcap
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)


def check_ids(ids: Tensor, name: str = "ids") -> None:
    """Refuse token ids that are not int64 [B,T] with at least one token.

    Raises:
        HeadwiseError: naming what came and what is wanted.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.shape[1] == 0:
        raise HeadwiseError(f"{name} must be integers of shape [B,T] with T ≥ 1, not {ids.dtype} {list(ids.shape)}")
