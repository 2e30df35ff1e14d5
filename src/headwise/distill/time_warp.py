"""Bringing a teacher's tokens to a student's, segment by segment (document 004).

Where the two have different tokenizers, or different texts of one structure, segment n of the one (a prompt, a piece of
reasoning, the characters between two common token borders) is stretched over segment n of the other:

    student token i of n_s stands at u_i = i·(n_t − 1)/(n_s − 1) of the teacher's n_t, and gets the linear interpolation
    between teacher tokens ⌊u_i⌋ and ⌊u_i⌋ + 1.

So the first token falls on the first, the last on the last, and order is kept. A segment of one student token gets the
teacher's last, the only one that has read the whole segment too. Every sequence of a batch has segments of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.errors import HeadwiseError


class TimeWarper:
    """[B,L,H,T_t,·] → [B,L,H,T_s,·] by segments.

    Args:
        segment_ids: int64 [B,T_t], the teacher tokens' segments; tokens of one number, in order, are a segment. −1 is
            padding.
        student_segment_ids: int64 [B,T_s]; None: the teacher's, which makes the warp the identity, bit for bit.

    Padding of the student gets zeros. A teacher's segment that the student lacks is passed over.

    Raises:
        HeadwiseError: shapes that do not fit, or a student's segment that the teacher does not have.
    """

    def __init__(self, segment_ids: Tensor, student_segment_ids: Tensor | None = None) -> None:
        student_segment_ids = segment_ids if student_segment_ids is None else student_segment_ids
        given = [list(ids.shape) for ids in (segment_ids, student_segment_ids)]
        if any(len(shape) != 2 for shape in given) or given[0][0] != given[1][0]:
            raise HeadwiseError(
                f"segments [B,T_t] of the teacher and [B,T_s] of the student are wanted, not {given[0]} and {given[1]}"
            )
        self.n_teacher = segment_ids.shape[1]
        self.identity = segment_ids is student_segment_ids or torch.equal(segment_ids, student_segment_ids)
        if not self.identity:
            self._lay_out(segment_ids, student_segment_ids)

    def _lay_out(self, teacher_BT: Tensor, student_BS: Tensor) -> None:
        """`left_BS`, `right_BS`: the two teacher tokens of each student token; `share_BS`: the right one's weight."""
        order_BT, starts_BS, n_t = _segments(teacher_BT, student_BS)
        _, own_starts_BS, n_s = _segments(student_BS, student_BS)
        self.padding_BS = student_BS < 0
        if bool(((n_t == 0) & ~self.padding_BS).any()):
            row, place = ((n_t == 0) & ~self.padding_BS).nonzero()[0].tolist()
            raise HeadwiseError(
                f"row {row}: the student's token {place} is of segment {int(student_BS[row, place])}, which the "
                "teacher does not have; give both the same segments"
            )
        # Its place in its own segment: in the order by segments every segment is one run.
        rank_BS = student_BS.argsort(dim=1, stable=True).argsort(dim=1) - own_starts_BS
        last_t, last_s = (n_t - 1).clamp(min=0), n_s - 1
        alone = last_s == 0
        steps, gaps = torch.where(alone, last_t, rank_BS * last_t), torch.where(alone, 1, last_s)
        lower = steps // gaps  # in whole numbers, so that whole places are exact
        self.share_BS = (steps % gaps) / gaps
        upper = torch.minimum(lower + 1, last_t)
        last = self.n_teacher - 1
        self.left_BS, self.right_BS = (
            order_BT.gather(1, (starts_BS + place).clamp(max=last)) for place in (lower, upper)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """float [B,…,T_t,D] → [B,…,T_s,D].

        Raises:
            HeadwiseError: another number of tokens than the segments have.
        """
        if x.shape[-2] != self.n_teacher:
            raise HeadwiseError(f"{x.shape[-2]} tokens given, but segments for {self.n_teacher}; give both of one text")
        if self.identity:
            return x
        inner = x.dim() - 3

        def at(index_BS: Tensor) -> Tensor:
            index = index_BS.reshape(len(index_BS), *[1] * inner, -1, 1)
            return x.gather(-2, index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1]))

        share = self.share_BS.to(x.dtype).reshape(len(x), *[1] * inner, -1, 1)
        y = torch.lerp(at(self.left_BS), at(self.right_BS), share)
        return y.masked_fill(self.padding_BS.reshape(share.shape), 0)


def _segments(segments_BT: Tensor, wanted_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ordered by segment [B,T]; of each wanted segment where it starts in that order, and its length, [B,S]."""
    ordered_BT, order_BT = segments_BT.contiguous().sort(dim=1, stable=True)
    wanted_BS = wanted_BS.contiguous()
    first = torch.searchsorted(ordered_BT, wanted_BS)
    return order_BT, first, torch.searchsorted(ordered_BT, wanted_BS, right=True) - first
