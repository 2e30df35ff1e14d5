"""Which teacher layers a student's layer is matched with: a matrix `[L_s,L_t]` whose rows add up to 1.

Row l says what mean of the teacher's layers student layer l is to follow, so that no layer is ever without a target,
also where the teacher has the fewer layers:

* `ratio`: the mean of its group, the teacher's layers l·L_t/L_s … (l+1)·L_t/L_s; a layer that two groups share counts
  in each by its share (30 layers → 12: groups of 2½);
* `uniform`: one layer, at even distances, the first with the first and the last with the last;
* `skip`: one layer, the last of each group (every second of twice as many; Sun et al. 2019, arXiv:1908.09355);
* `learned`: trained along, a softmax a row, from near `ratio` (`LearnedLayerMap`);
* `cka`: one layer, chosen by linear CKA (Kornblith et al. 2019, arXiv:1905.00414) on a calibration batch: of all maps
  that keep the layers in order, the one of the largest sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.errors import SettingsError, one_of

KINDS = ("ratio", "uniform", "skip", "learned", "cka")


def group_means(n_in: int, n_out: int) -> Tensor:
    """The matrix float32 [n_out,n_in] that averages groups: row i the items i·n_in/n_out … (i+1)·n_in/n_out, an item
    that lies only partly in a group by that part. Rows add up to 1; the identity where the two numbers agree."""
    # In units of 1/n_out of an item, where every border is a whole number.
    first, item = torch.arange(n_out)[:, None] * n_in, torch.arange(n_in)[None, :] * n_out
    shared = torch.minimum(first + n_in, item + n_out) - torch.maximum(first, item)
    return shared.clamp(min=0) / n_in


class LearnedLayerMap(nn.Module):
    """A row-stochastic matrix that is trained: the softmax of each row of `logits_ST`. Called, it gives the matrix."""

    def __init__(self, n_teacher: int, n_student: int) -> None:
        super().__init__()
        # A layer outside the group starts with a share of about 1 %, from where it can grow.
        start_ST = 0.99 * group_means(n_teacher, n_student) + 0.01 / n_teacher
        self.logits_ST = nn.Parameter(start_ST.log())

    def forward(self) -> Tensor:
        return self.logits_ST.softmax(-1)


def layer_map(kind: str, n_teacher: int, n_student: int, similarity: Tensor | None = None) -> Tensor:
    """The matrix float32 [L_s,L_t] of a kind; of `learned` where it starts.

    Args:
        kind: ratio, uniform, skip, learned or cka.
        n_teacher, n_student: L_t and L_s, at least 1.
        similarity: float [L_s,L_t], the CKA of each pair of layers, which `cka` needs.

    Raises:
        SettingsError: an unknown kind, numbers below 1, or `cka` without a similarity of the right shape.
    """
    if kind not in KINDS:
        raise SettingsError(one_of(kind, KINDS, "layer map"))
    if n_teacher < 1 or n_student < 1:
        raise SettingsError(f"a layer map of {n_teacher} teacher layers to {n_student} was asked for; give 1 at least")
    if kind == "ratio":
        return group_means(n_teacher, n_student)
    if kind == "learned":
        return LearnedLayerMap(n_teacher, n_student)().detach()
    l_S = torch.arange(n_student)
    if kind == "uniform":
        # Rounded half up, in whole numbers; a student of one layer follows the teacher's last.
        gaps = n_student - 1
        chosen_S = (2 * l_S * (n_teacher - 1) + gaps) // (2 * gaps) if gaps else l_S + n_teacher - 1
    elif kind == "skip":
        chosen_S = ((l_S + 1) * n_teacher - 1) // n_student
    else:
        if similarity is None or similarity.shape != (n_student, n_teacher):
            given = "none" if similarity is None else list(similarity.shape)
            raise SettingsError(
                f"layer map cka needs the CKA of each pair of layers, [{n_student},{n_teacher}], but {given} was "
                "given; measure it on a calibration batch (similarity.cka_matrix), or take ratio"
            )
        chosen_S = _in_order(similarity)
    return nn.functional.one_hot(chosen_S, n_teacher).float()


def _in_order(similarity_ST: Tensor) -> Tensor:
    """The teacher layers c_0 ≤ c_1 ≤ … of the largest sum of similarities, int64 [L_s]."""
    gain_ST = similarity_ST.detach().double().cpu()
    best_T, came_from = gain_ST[0], []
    for row_T in gain_ST[1:]:
        top_T, at_T = best_T.cummax(0)  # the best beginning that ends at this layer or before it
        came_from.append(at_T)
        best_T = top_T + row_T
    chosen = [int(best_T.argmax())]
    for at_T in reversed(came_from):
        chosen.append(int(at_T[chosen[-1]]))
    return torch.tensor(chosen[::-1])
