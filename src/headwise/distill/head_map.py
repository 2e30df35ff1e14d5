"""Mixing heads without flattening them (document 004): a student's head is a mean of teacher heads, in its own width.

    y_{h'} = P·Σ_h M_{h'h} x_h,   M: H_t → H_s,   P: D_t → D_s

for every layer and token alike: H_s·H_t + D_s·D_t numbers, where a map of the heads side by side has H_s·D_s·H_t·D_t.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.distill.layer_map import group_means
from headwise.errors import HeadwiseError


class HeadwiseMapProjector(nn.Module):
    """[…,H_t,T,D_t] → […,H_s,T,D_s], K, V and Q each with a projector of its own.

    Args:
        teacher_heads, student_heads: H_t and H_s (of keys and values: key/value heads).
        teacher_head_dim, student_head_dim: D_t and D_s.
        share_dim_proj: one P for all heads; else one for each student head.
        init_uniform: row h' of M starts as the mean of its group of teacher heads, h'·H_t/H_s … (h'+1)·H_t/H_s; else
            uniformly drawn from ±1/√H_t, as a linear layer.

    P starts as the identity, and where the widths differ with orthonormal rows or columns, which keeps lengths and
    products as far as it can.

    Attributes:
        heads_SH: M, [H_s,H_t].
        widths_DE: P, [D_s,D_t], or [H_s,D_s,D_t].
    """

    def __init__(
        self,
        teacher_heads: int,
        student_heads: int,
        teacher_head_dim: int,
        student_head_dim: int,
        share_dim_proj: bool = True,
        init_uniform: bool = True,
    ) -> None:
        super().__init__()
        self.init_uniform = init_uniform
        own = () if share_dim_proj else (student_heads,)
        self.heads_SH = nn.Parameter(torch.empty(student_heads, teacher_heads))
        self.widths_DE = nn.Parameter(torch.empty(*own, student_head_dim, teacher_head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, from torch's global generator where something is drawn."""
        n_student, n_teacher = self.heads_SH.shape
        if self.init_uniform:
            self.heads_SH.copy_(group_means(n_teacher, n_student))
        else:
            nn.init.uniform_(self.heads_SH, -(n_teacher**-0.5), n_teacher**-0.5)
        if self.widths_DE.shape[-1] == self.widths_DE.shape[-2]:
            self.widths_DE.copy_(torch.eye(self.widths_DE.shape[-1]))
        else:
            # One draw for all heads: at the start they differ by M alone, shared or not.
            self.widths_DE.copy_(nn.init.orthogonal_(torch.empty(self.widths_DE.shape[-2:])))

    def forward(self, x: Tensor) -> Tensor:
        """float […,H_t,T,D_t] → […,H_s,T,D_s].

        Raises:
            HeadwiseError: other heads or widths than the projector was made for.
        """
        heads, width = self.heads_SH.shape[1], self.widths_DE.shape[-1]
        if x.shape[-3] != heads or x.shape[-1] != width:
            raise HeadwiseError(f"a tensor […,{heads},T,{width}] is wanted, but {list(x.shape)} was given")
        mixed = torch.einsum("sh,...htd->...std", self.heads_SH.to(x.dtype), x)
        return mixed @ self.widths_DE.to(x.dtype).transpose(-1, -2)
