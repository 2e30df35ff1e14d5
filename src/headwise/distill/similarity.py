"""How alike a student's layers and their targets are, and whether that says anything: the control by shuffled teachers.

A trained projector on the teacher's side can make all targets alike; the student then meets them whatever it reads. So
every figure stands beside the same figure against the targets of *other sequences* (each row of the batch gets the next
row's). What the student knows of its own text is the gap between the two.

* cosine: the mean over heads and tokens of cos(student's vector, target's vector);
* linear CKA (Kornblith et al. 2019, arXiv:1905.00414): ‖XᵀY‖²/(‖XᵀX‖·‖YᵀY‖) of all heads side by side, centred over
  the tokens. It does not change when either side is turned or stretched, and is 0 where one side is constant. Of few
  tokens (not many more than the numbers of one token) it is high for anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headwise.distill.losses import check_alike
from headwise.errors import HeadwiseError


@torch.no_grad()
def cosine(student: Tensor, target: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The mean cosine of a layer's heads and tokens, float32 [L].

    Args:
        student, target: float [B,L,H,T,D].
        mask_BT: bool, True where a token counts.

    Raises:
        HeadwiseError: shapes that differ.
    """
    check_alike(student, target)
    cos_BLHT = F.cosine_similarity(student.float(), target.float(), dim=-1)
    if mask_BT is None:
        return cos_BLHT.mean((0, 2, 3))
    counted = mask_BT.bool()[:, None, None, :].expand_as(cos_BLHT)
    return torch.where(counted, cos_BLHT, 0).sum((0, 2, 3)) / counted.sum((0, 2, 3)).clamp(min=1)


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """CKA of layer l of the one with layer l of the other, float32 [L].

    Args:
        x, y: float [B,L,H,T,·] of equally many layers and tokens; heads and widths may differ.
        mask_BT: bool, True where a token counts.

    Raises:
        HeadwiseError: layers, sequences or tokens that differ in number.
    """
    _check_tokens(x, y)
    if x.shape[1] != y.shape[1]:
        raise HeadwiseError(f"{x.shape[1]} layers and {y.shape[1]} given; align them, or ask for cka_matrix")
    pairs = zip(_layers(x, mask_BT), _layers(y, mask_BT))
    return torch.stack([_cka(x_NF, y_NG) for x_NF, y_NG in pairs])


@torch.no_grad()
def cka_matrix(x: Tensor, y: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """CKA of each layer of the one with each of the other, float32 [L_x,L_y]: what `layer_map("cka", …)` chooses by.

    Args:
        x, y: float [B,L_x,H,T,·] and [B,L_y,H',T,·], such as a student's and a teacher's values.
        mask_BT: bool, True where a token counts.

    Raises:
        HeadwiseError: sequences or tokens that differ in number.
    """
    _check_tokens(x, y)
    of_x, of_y = _layers(x, mask_BT), _layers(y, mask_BT)
    return torch.stack([torch.stack([_cka(x_NF, y_NG) for y_NG in of_y]) for x_NF in of_x])


def _check_tokens(x: Tensor, y: Tensor) -> None:
    if x.dim() != 5 or y.dim() != 5 or (x.shape[0], x.shape[3]) != (y.shape[0], y.shape[3]):
        raise HeadwiseError(
            f"two tensors [B,L,H,T,·] of the same tokens are wanted, not {list(x.shape)} and {list(y.shape)}"
        )


def _layers(x: Tensor, mask_BT: Tensor | None) -> list[Tensor]:
    """Each layer's tokens that count, centred, [N,H·D]."""
    found = []
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    for x_BHTD in x.unbind(1):
        x_BTF = x_BHTD.transpose(1, 2).flatten(2)
        x_NF = (x_BTF.flatten(0, 1) if mask_BT is None else x_BTF[mask_BT.bool()]).to(exact)
        found.append(x_NF - x_NF.mean(0))
    return found


def _cka(x_NF: Tensor, y_NG: Tensor) -> Tensor:
    sizes = (x_NF.T @ x_NF).norm() * (y_NG.T @ y_NG).norm()
    # What centring leaves of a constant is rounding.
    return torch.where(sizes > 1e-20, (x_NF.T @ y_NG).square().sum() / sizes, 0).float()


def shuffled(target: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Targets of other sequences, [B,…], and which tokens both sequences have, bool [B,T].

    Raises:
        HeadwiseError: there is one sequence alone.
    """
    if len(target) < 2:
        raise HeadwiseError("one sequence has no other to be compared with; give a batch of 2 at least")
    mask_BT = None if mask_BT is None else mask_BT.bool() & mask_BT.bool().roll(1, 0)
    return target.roll(1, 0), mask_BT


def likeness(student: Tensor, target: Tensor, mask_BT: Tensor | None = None) -> dict[str, list[float]]:
    """Lists a layer: `cosine` and `cka`, and the same against shuffled targets, `cosine_shuffled` and `cka_shuffled`.

    Args:
        student, target: float [B,L,H,T,D] of 2 sequences at least.
        mask_BT: bool, True where a token counts.

    Raises:
        HeadwiseError: shapes that differ, or one sequence alone.
    """
    other, both_BT = shuffled(target, mask_BT)
    return {
        "cosine": cosine(student, target, mask_BT).tolist(),
        "cosine_shuffled": cosine(student, other, both_BT).tolist(),
        "cka": linear_cka(student, target, mask_BT).tolist(),
        "cka_shuffled": linear_cka(student, other, both_BT).tolist(),
    }
