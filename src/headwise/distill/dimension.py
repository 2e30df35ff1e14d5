"""The flat baseline (document 004): all heads of a token side by side, through one small network, and apart again.

It knows nothing of heads, and has m·H_s·D_s·(H_t·D_t + H_s·D_s) weights where `HeadwiseMapProjector` has
H_t·H_s + D_t·D_s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.errors import HeadwiseError, SettingsError


class KVDimensionProjector(nn.Module):
    """[…,H_t·D_t] → […,H_s·D_s]: LayerNorm → Linear → SiLU → dropout → Linear.

    Between the two linear maps stand `mlp_ratio`·H_s·D_s numbers; `mlp_ratio=0` leaves one linear map after the norm.

    `use_elastic` makes nested networks of it, as in MatFormer (arXiv:2310.07707): the first 1, 2, … mlp_ratio parts of
    the hidden numbers each serve alone. A training pass draws how many it uses, from torch's global generator;
    `projector.parts = n` narrows it for good, and outside training all are used.

    Args:
        teacher_heads, student_heads: H_t and H_s, key/value heads.
        teacher_head_dim, student_head_dim: D_t and D_s.
        mlp_ratio: hidden numbers for each number that comes out.
        use_elastic: nested hidden widths.
        dropout: of the hidden numbers.

    Raises:
        SettingsError: a ratio below 0, or an elastic projector without parts to choose from.
    """

    def __init__(
        self,
        teacher_heads: int,
        student_heads: int,
        teacher_head_dim: int,
        student_head_dim: int,
        mlp_ratio: int = 4,
        use_elastic: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mlp_ratio < 0 or (use_elastic and mlp_ratio < 2):
            least = "2 for an elastic projector" if use_elastic else "0"
            raise SettingsError(f"mlp_ratio={mlp_ratio} given; at least {least} is wanted")
        into, self.out = teacher_heads * teacher_head_dim, student_heads * student_head_dim
        self.mlp_ratio, self.use_elastic = mlp_ratio, use_elastic
        self.parts: int | None = None
        self.norm = nn.LayerNorm(into)
        self.up = nn.Linear(into, mlp_ratio * self.out) if mlp_ratio else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(mlp_ratio * self.out if mlp_ratio else into, self.out)

    def forward(self, x: Tensor) -> Tensor:
        """float […,H_t·D_t] → […,H_s·D_s].

        Raises:
            HeadwiseError: another width than the projector was made for.
        """
        if x.shape[-1] != self.norm.normalized_shape[0]:
            wanted = self.norm.normalized_shape[0]
            raise HeadwiseError(f"{wanted} numbers a token are wanted, but {x.shape[-1]} were given; flatten the heads")
        x = self.norm(x.to(self.norm.weight.dtype))
        if not isinstance(self.up, nn.Linear):
            return self.down(x)
        n = self._parts() * self.out
        hidden = nn.functional.silu(nn.functional.linear(x, self.up.weight[:n], self.up.bias[:n]))
        return nn.functional.linear(self.dropout(hidden), self.down.weight[:, :n], self.down.bias)

    def _parts(self) -> int:
        """How many parts of the hidden numbers this pass uses."""
        if self.parts is not None:
            return self.parts
        if self.use_elastic and self.training:
            return int(torch.randint(1, self.mlp_ratio + 1, ()))
        return self.mlp_ratio
