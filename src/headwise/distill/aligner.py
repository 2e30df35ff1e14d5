"""A teacher's cache in the student's shape (document 004): layers, heads, tokens and widths, each by a map of its own.

    k, v, q = aligner(teacher_k, teacher_v, teacher_q, segment_ids)      # [B,L_t,H_t,T_t,D_t] → [B,L_s,H_s,T_s,D_s]

**Positions.** Keys that a cache keeps are turned by RoPE. Turned keys of different frequencies, or of different layers'
codes, cannot be added: neither their heads nor their widths may be mixed. So give keys and queries without positions
(`capture`, or `Encoding.unrotate` of a cache), and work positions in with the student's own code afterwards.

**The collapse.** A trained map on the *teacher's* side can make every target the same and so reach cosine 1 without the
student having learned anything. Compare with shuffled teachers (`similarity`), put the projector on the student's side
(`side="student"`: the student's tensors are brought to the teacher's shape, whose tensors are fixed), or freeze it
(`aligner.frozen()`).
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from headwise.distill.dimension import KVDimensionProjector
from headwise.distill.head_map import HeadwiseMapProjector
from headwise.distill.layer_map import LearnedLayerMap, layer_map
from headwise.distill.shape import KVShape
from headwise.distill.stacking import flatten_kv_heads, unflatten_kv_heads
from headwise.distill.time_warp import TimeWarper
from headwise.errors import HeadwiseError, SettingsError, one_of

MODES = ("structured", "flat")
SIDES = ("teacher", "student")


class MapProjectionAligner(nn.Module):
    """The four maps: layers (`layer_map`), tokens (`TimeWarper`), heads and widths (`HeadwiseMapProjector` or, flat,
    `KVDimensionProjector`), those for keys, values and queries apart, the same in every layer.

    At 24×32×64 → 12×16×64 (layers, heads, width) a structured aligner has 3·(16·32 + 64·64) = 13,824 parameters.

    Args:
        teacher_config, student_config: anything `KVShape.of` takes.
        mode: "structured" or "flat".
        share_dim_proj, init_uniform: of the structured projectors; see there.
        layer_map: "ratio", "uniform", "skip", "learned", or a matrix [L_out,L_in] whose rows add up to 1, such as
            `layer_map("cka", …, similarity)` gives.
        side: which side's tensors are brought to the other's shape.
        mlp_ratio, use_elastic, dropout: of the flat projectors; see there.
        queries: whether queries too have projectors, which only `StructuralKVLoss` asks for.

    Raises:
        SettingsError: an unknown mode, side or layer map, or a matrix of the wrong shape.
    """

    layers_OI: Tensor | None

    def __init__(
        self,
        teacher_config: Any,
        student_config: Any,
        mode: Literal["structured", "flat"] = "structured",
        share_dim_proj: bool = True,
        init_uniform: bool = True,
        layer_map: str | Tensor = "ratio",
        side: Literal["teacher", "student"] = "teacher",
        mlp_ratio: int = 4,
        use_elastic: bool = False,
        dropout: float = 0.0,
        queries: bool = True,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise SettingsError(one_of(mode, MODES, "projection"))
        if side not in SIDES:
            raise SettingsError(one_of(side, SIDES, "side"))
        self.mode, self.side = mode, side
        self.teacher, self.student = KVShape.of(teacher_config), KVShape.of(student_config)
        self.source, self.target = (self.teacher, self.student) if side == "teacher" else (self.student, self.teacher)
        self._map_layers(layer_map)

        def projector(heads: str, width: str) -> HeadwiseMapProjector | KVDimensionProjector:
            n_in, n_out = getattr(self.source, heads), getattr(self.target, heads)
            shape = (n_in, n_out, getattr(self.source, width), getattr(self.target, width))
            if mode == "structured":
                return HeadwiseMapProjector(*shape, share_dim_proj, init_uniform)
            return KVDimensionProjector(*shape, mlp_ratio, use_elastic, dropout)

        self.keys, self.values = projector("kv_heads", "key_dim"), projector("kv_heads", "value_dim")
        self.queries = projector("n_heads", "key_dim") if queries else None

    def _map_layers(self, kind: str | Tensor) -> None:
        shape = (self.target.n_layers, self.source.n_layers)
        self.learned = LearnedLayerMap(shape[1], shape[0]) if isinstance(kind, str) and kind == "learned" else None
        matrix_OI = None
        if isinstance(kind, Tensor):
            matrix_OI = kind.detach().float()
            sums_O = matrix_OI.sum(-1) if matrix_OI.shape == shape else torch.zeros(1)
            if not torch.allclose(sums_O, torch.ones_like(sums_O), atol=1e-4):
                raise SettingsError(
                    f"a layer map {list(shape)} whose rows add up to 1 is wanted, but one of {list(kind.shape)} was "
                    "given; make it with layer_map()"
                )
        elif self.learned is None:
            matrix_OI = layer_map(kind, shape[1], shape[0])
        self.register_buffer("layers_OI", matrix_OI)

    def frozen(self) -> Self:
        """The same without gradients, structured projectors at their uniform start: targets that training cannot
        move."""
        for projector in (self.keys, self.values, self.queries):
            if isinstance(projector, HeadwiseMapProjector) and not projector.init_uniform:
                projector.init_uniform = True
                projector.reset_parameters()
        return self.requires_grad_(False)

    def forward(
        self,
        k: Tensor,
        v: Tensor,
        q: Tensor | None = None,
        segment_ids: Tensor | None = None,
        student_segment_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and queries in the other side's shape, [B,L_s,H_s,T_s,D_s] each (side="student": the teacher's).

        Args:
            k, v, q: float [B,L,H,T,·] of the side that is brought to the other's; the teacher's get no gradient.
            segment_ids: int64 [B,T_t], the teacher tokens' segments, −1 at padding; None: one segment.
            student_segment_ids: int64 [B,T_s]; None: as the teacher's, and tokens stay where they are.

        Raises:
            HeadwiseError: tensors of another shape than the aligner was made for, queries without projectors, or
                segments of the student alone.
        """
        self._check(k, v, q)
        warp = None
        if segment_ids is not None:
            own = segment_ids if student_segment_ids is None else student_segment_ids
            warp = TimeWarper(segment_ids, own) if self.side == "teacher" else TimeWarper(own, segment_ids)
        elif student_segment_ids is not None:
            raise HeadwiseError("segments of the student's tokens but none of the teacher's; give segment_ids too")
        out = [
            None if x is None else self._align(x, projector, heads, warp)
            for x, projector, heads in (
                (k, self.keys, self.target.kv_heads),
                (v, self.values, self.target.kv_heads),
                (q, self.queries, self.target.n_heads),
            )
        ]
        return out[0], out[1], out[2]  # type: ignore[return-value]

    def _align(self, x: Tensor, projector: nn.Module | None, heads: int, warp: TimeWarper | None) -> Tensor:
        assert projector is not None
        if self.side == "teacher":
            x = x.detach()
        matrix_OI = self.layers_OI if self.learned is None else self.learned()
        assert matrix_OI is not None
        x = (matrix_OI.to(x) @ x.flatten(2)).unflatten(2, x.shape[2:])
        if warp is not None:
            x = warp(x)
        if isinstance(projector, HeadwiseMapProjector):
            return projector(x)
        return unflatten_kv_heads(projector(flatten_kv_heads(x)), heads)

    def _check(self, k: Tensor, v: Tensor, q: Tensor | None) -> None:
        shape = self.source
        wanted = {"keys": (k, shape.kv_heads, shape.key_dim), "values": (v, shape.kv_heads, shape.value_dim)}
        if q is not None:
            wanted["queries"] = (q, shape.n_heads, shape.key_dim)
        for name, (x, heads, width) in wanted.items():
            if x.dim() != 5 or (x.shape[1], x.shape[2], x.shape[4]) != (shape.n_layers, heads, width):
                raise HeadwiseError(
                    f"{name} of the {self.side} are {list(x.shape)}, but the aligner was made for "
                    f"[B,{shape.n_layers},{heads},T,{width}]; give it the configurations of these two models"
                )
        if q is not None and self.queries is None:
            raise HeadwiseError("queries given to an aligner without projectors for them; make it with queries=True")
