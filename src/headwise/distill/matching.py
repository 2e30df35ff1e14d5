"""What a student's layers are to come near to: one teacher's signals in the student's shape, and the losses between.

A layer that keeps keys and values is matched by these, a recurrent one by what its attention makes before `wo`; hidden
states go by the same layer map. Keys are compared without positions (`rope="unrotate"`): turning both sides by the
student's code, as attention will, changes no length and no angle between them, so neither the squared error nor the
cosine. `asis` compares each side's turned keys. The structural loss always sees turned queries and keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwise.distill.aligner import MapProjectionAligner
from headwise.distill.capture import Signals, match_of
from headwise.distill.layer_map import layer_map
from headwise.distill.losses import StructuralKVLoss, hidden_loss, kv_loss
from headwise.distill.shape import KVShape
from headwise.distill.similarity import cka_matrix
from headwise.distill.time_warp import TimeWarper
from headwise.errors import HeadwiseError, SettingsError

if TYPE_CHECKING:
    from headwise.distill.settings import DistillSettings
    from headwise.position import Encoding
    from headwise.spec import ModelSpec


@dataclass(frozen=True)
class Seen:
    """One teacher's side of a batch.

    Attributes:
        signals: as `Teacher.signals` gives them.
        encodings: its layers' position codes for these tokens.
        mask_BT: bool, the student's tokens that are compared.
        segments: int64 (its tokens [B,S], the student's [B,T]), where the two have different tokens.
    """

    signals: dict[str, Tensor]
    encodings: Sequence[Encoding]
    mask_BT: Tensor
    segments: tuple[Tensor, Tensor] | None = None


Pairs = dict[str, tuple[Tensor, Tensor]]
"""By name (k, v, output, hidden, struct_k, …): what learns, and what it learns from; float [B,L,…,T,·] of one shape."""


class Matching(nn.Module):
    """One teacher and the student. `similarity_ST`: what layer map `cka` chooses by, see `similarity`.

    Attributes:
        kv, recurrent: the student's layers that are matched by keys and values, and by outputs.
        of_teacher, of_student: the signals that training needs; `measured` those that measuring needs.
    """

    rows_ST: Tensor | None

    def __init__(
        self, teacher: ModelSpec, student: ModelSpec, settings: DistillSettings, similarity_ST: Tensor | None = None
    ) -> None:
        super().__init__()
        self.settings = settings
        n_t, n_s = teacher.dims.n_layers, student.dims.n_layers
        self.kv = [layer for layer in range(n_s) if match_of(student, layer) == "kv"]
        self.recurrent = [layer for layer in range(n_s) if layer not in self.kv]
        # Until the similarity has been measured, ratio stands in for cka.
        self.kind = "ratio" if settings.layer_map == "cka" and similarity_ST is None else settings.layer_map
        rows_ST = None if self.kind == "learned" else layer_map(self.kind, n_t, n_s, similarity_ST)
        self.register_buffer("rows_ST", rows_ST)
        self.keys_values = self.outputs = None
        try:
            if self.kv:
                shapes = (KVShape.of(teacher), KVShape.of(student, self.kv))
                self.keys_values = self._aligner(*shapes, self.kv, similarity_ST, settings.structural_loss)
            if self.recurrent:
                shapes = (KVShape.of(teacher, match="output"), KVShape.of(student, self.recurrent, "output"))
                self.outputs = self._aligner(*shapes, self.recurrent, similarity_ST)
                self.outputs.keys = self.outputs.values  # one kind of tensor, one projector
        except HeadwiseError:
            if settings.projection != "none":
                raise
            self.keys_values = self.outputs = None  # what is not trained on need not be measured
            self.rows_ST = layer_map("ratio", n_t, n_s) if self.rows_ST is None else self.rows_ST
        self.measured = ({"keys", "values"} if self.keys_values is not None else set[str]()) | (
            {"outputs"} if self.outputs is not None else set[str]()
        )
        trained = self.measured if settings.projection != "none" and settings.lambda_kv else set()
        if settings.structural_loss and self.kv:
            trained = trained | {"keys", "values", "queries"}
        self.widths: nn.Module = nn.Identity()
        if settings.hidden:
            trained = trained | {"hidden"}
            if teacher.dims.d_model != student.dims.d_model:
                self.widths = nn.Linear(student.dims.d_model, teacher.dims.d_model, bias=False)
        self.of_student = frozenset(trained)
        own = {"final"} if settings.logit_kd or settings.teacher_weights == "router" else set()
        self.of_teacher = frozenset(trained | own)
        self.distance, self.structure = kv_loss(settings.kv_loss), StructuralKVLoss()

    def _aligner(
        self,
        teacher: KVShape,
        student: KVShape,
        layers: list[int],
        similarity_ST: Tensor | None,
        queries: bool = False,
    ) -> MapProjectionAligner:
        settings = self.settings
        rows: str | Tensor = "learned"
        if self.rows_ST is not None:
            rows = self.rows_ST[layers]
            if settings.side == "student":
                alike = None if similarity_ST is None else similarity_ST[layers].T
                rows = layer_map(self.kind, len(layers), teacher.n_layers, alike)
        elif self.kv and self.recurrent:
            raise SettingsError("layer_map: learned is for students whose layers are all matched alike; choose ratio")
        made = MapProjectionAligner(
            teacher,
            student,
            "structured" if settings.projection == "none" else settings.projection,
            settings.share_dim_proj,
            settings.init_uniform,
            rows,
            settings.side,
            settings.mlp_ratio,
            settings.use_elastic,
            settings.projector_dropout,
            queries,
        )
        return made.frozen() if settings.freeze_projector or settings.projection == "none" else made

    def about(self) -> str:
        """The projection in a line, with the shapes it brings together; B, T as letters."""
        if self.settings.projection == "none":
            return "projection none: nothing of the teacher's layers is projected"
        told = []
        for aligner, name in ((self.keys_values, "keys and values"), (self.outputs, "outputs")):
            if aligner is not None:
                shapes = [
                    f"[B,{s.n_layers},{s.kv_heads},T,{s.key_dim}]"
                    + (f" and [B,{s.n_layers},{s.kv_heads},T,{s.value_dim}]" if s.value_dim != s.key_dim else "")
                    for s in (aligner.source, aligner.target)
                ]
                told.append(f"{name} {' → '.join(shapes)}")
        n_params = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return f"projection {self.settings.projection}: {'; '.join(told)}, {n_params:,} parameters trained"

    def similarity(self, student: Signals, seen: Seen) -> Tensor:
        """CKA of each of the student's layers with each of the teacher's, float [L_s,L_t]: of their values, of a
        recurrent layer's outputs."""
        teacher = dict(seen.signals)
        if seen.segments is not None:
            teacher = {name: TimeWarper(*seen.segments)(x) for name, x in teacher.items()}
        depth = len(self.kv) + len(self.recurrent)
        found_ST = torch.zeros(depth, len(seen.encodings))
        for layers, own, name in ((self.kv, student.values, "values"), (self.recurrent, student.outputs, "outputs")):
            if layers:
                found_ST[layers] = cka_matrix(_stacked(own, layers), teacher[name], seen.mask_BT).cpu()
        return found_ST

    # ---- comparing ----

    def raw_pairs(self, student: Signals, seen: Seen) -> Pairs:
        """The same tensors before any projector, with the student's layers and tokens: what CKA compares, which a
        projector cannot flatter. Heads and widths may differ."""
        made: Pairs = {}
        if self.keys_values is not None:
            for name, signal in (("k", "keys"), ("v", "values")):
                teacher = self.matched(seen.signals[signal], seen)[:, self.kv]
                made[name] = (_stacked(getattr(student, signal), self.kv), teacher)
        if self.outputs is not None:
            teacher = self.matched(seen.signals["outputs"], seen)[:, self.recurrent]
            made["output"] = (_stacked(student.outputs, self.recurrent), teacher)
        return made

    def pairs(self, student: Signals, seen: Seen, wanted: Collection[str]) -> Pairs:
        """What is compared, of the student's signals and the teacher's. `wanted` are names of signals: keys and values
        give k and v, outputs output, hidden hidden, queries besides the turned struct_k, struct_v and struct_q."""
        made: Pairs = {}
        teacher, queries = seen.signals, "queries" in wanted
        if self.keys_values is not None and "keys" in wanted:
            s_q, t_q = (_stacked(student.queries, self.kv), teacher["queries"]) if queries else (None, None)
            s = (_stacked(student.keys, self.kv), _stacked(student.values, self.kv), s_q)
            t = (teacher["keys"], teacher["values"], t_q)
            s_codes, t_codes = [student.encodings[layer] for layer in self.kv], seen.encodings
            if self.settings.rope == "asis":
                s, t = _turned(s, s_codes), _turned(t, t_codes)
            s, t = self._aligned(self.keys_values, s, t, seen)
            made |= {"k": (s[0], t[0]), "v": (s[1], t[1])}
            if queries:
                if self.settings.rope == "unrotate":
                    codes = s_codes if self.settings.side == "teacher" else t_codes
                    s, t = _turned(s, codes), _turned(t, codes)
                made |= {f"struct_{name}": pair for name, pair in zip("kvq", zip(s, t))}  # type: ignore[misc]
        if self.outputs is not None and "outputs" in wanted:
            y, x = _stacked(student.outputs, self.recurrent), teacher["outputs"]
            s, t = self._aligned(self.outputs, (y, y, None), (x, x, None), seen)
            made["output"] = (s[1], t[1])
        if "hidden" in wanted:
            made["hidden"] = (
                self.widths(_stacked(student.hidden, range(len(student.hidden)))),
                self.matched(teacher["hidden"], seen),
            )
        return made

    def _aligned(self, aligner: MapProjectionAligner, s: Triple, t: Triple, seen: Seen) -> tuple[Triple, Triple]:
        segments = seen.segments or (None, None)
        if self.settings.side == "teacher":
            return s, aligner(*t, *segments)
        return aligner(*s, *segments), t

    def matched(self, x_BL: Tensor, seen: Seen) -> Tensor:
        """A teacher's tensor [B,L_t,…,T_t,·] with the student's layers and tokens [B,L_s,…,T_s,·], not projected."""
        rows_ST = self.rows_ST
        if rows_ST is None:
            rows_ST = (self.keys_values or self.outputs).learned().detach()  # type: ignore[union-attr, misc]
        x_BL = (rows_ST.to(x_BL) @ x_BL.flatten(2)).unflatten(2, x_BL.shape[2:])
        return x_BL if seen.segments is None else TimeWarper(*seen.segments)(x_BL)

    def losses(self, pairs: Pairs, mask_BT: Tensor) -> dict[str, Tensor]:
        """0-d each, without weights."""
        own = [name for name in ("k", "v", "output") if name in pairs]
        made: dict[str, Tensor] = {name: self.distance(*pairs[name], mask_BT) for name in own}
        if "hidden" in pairs:
            made["hidden"] = hidden_loss(*pairs["hidden"], mask_BT)
        if "struct_q" in pairs:
            (s_k, t_k), (s_v, t_v), (s_q, t_q) = (pairs[f"struct_{name}"] for name in "kvq")
            made["struct"], _ = self.structure(s_k, s_v, s_q, t_k, t_v, t_q, mask_BT)
        return made


Triple = tuple[Tensor, Tensor, Tensor | None]


def _stacked(signals: Sequence[Tensor | None], layers: Sequence[int]) -> Tensor:
    return torch.stack([signals[layer] for layer in layers], 1)  # type: ignore[misc]


def _turned(x: Triple, codes: Sequence[Encoding]) -> Triple:
    """Keys and queries [B,L,H,T,E] with each layer's positions worked in; values as they are."""

    def turn(y_BLHTE: Tensor) -> Tensor:
        return torch.stack([code.rotate(y_BLHTE[:, layer]) for layer, code in enumerate(codes)], 1)

    return turn(x[0]), x[1], None if x[2] is None else turn(x[2])
