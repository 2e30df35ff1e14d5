"""Time warping against its definition, token by token: ends on ends, in order, each row by its own segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_models import drawn
from torch import Tensor

from headwise.distill.time_warp import TimeWarper
from headwise.errors import HeadwiseError


def naive_warp(x_BLHTD: Tensor, teacher_BT: list[list[int]], student_BS: list[list[int]]) -> Tensor:
    rows = []
    for x, teacher, student in zip(x_BLHTD, teacher_BT, student_BS):
        columns = []
        for s, segment in enumerate(student):
            if segment < 0:
                columns.append(torch.zeros_like(x[:, :, 0]))
                continue
            theirs = [t for t, other in enumerate(teacher) if other == segment]
            own = [i for i, other in enumerate(student) if other == segment]
            u = own.index(s) * (len(theirs) - 1) / (len(own) - 1) if len(own) > 1 else len(theirs) - 1
            low = min(int(u + 1e-9), len(theirs) - 1)
            high = min(low + 1, len(theirs) - 1)
            share = u - low
            columns.append((1 - share) * x[:, :, theirs[low]] + share * x[:, :, theirs[high]])
        rows.append(torch.stack(columns, 2))
    return torch.stack(rows)


def lengths() -> st.SearchStrategy[list[tuple[int, int]]]:
    """Of each of three segments, the tokens of the teacher and of the student."""
    return st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=3, max_size=3)


def rows(batch: list[list[tuple[int, int]]], side: int) -> list[list[int]]:
    """Segments 0, 1, 2 by their lengths, padded with −1 behind."""
    texts = [[n for n, both in enumerate(row) for _ in range(both[side])] for row in batch]
    longest = max(1, *map(len, texts))
    return [text + [-1] * (longest - len(text)) for text in texts]


@given(st.lists(lengths(), min_size=1, max_size=3), st.integers(0, 5))
def test_warping_is_interpolation_inside_each_segment(batch: list[list[tuple[int, int]]], seed: int) -> None:
    teacher, student = rows(batch, 0), rows(batch, 1)
    x = drawn(len(batch), 2, 3, len(teacher[0]), 4, seed=seed)
    warped = TimeWarper(torch.tensor(teacher), torch.tensor(student))(x)
    torch.testing.assert_close(warped, naive_warp(x, teacher, student))


@given(st.integers(1, 40), st.integers(2, 40))
def test_ends_fall_on_ends_and_order_is_kept(n_t: int, n_s: int) -> None:
    x = torch.arange(n_t).double()[None, None, None, :, None]
    u = TimeWarper(torch.zeros(1, n_t, dtype=torch.int64), torch.zeros(1, n_s, dtype=torch.int64))(x).flatten()
    assert float(u[0]) == 0
    assert float(u[-1]) == n_t - 1
    assert bool((u.diff() >= 0).all())
    torch.testing.assert_close(u, torch.arange(n_s).double() * (n_t - 1) / (n_s - 1))


def test_one_token_of_the_student_gets_the_last_that_read_the_segment() -> None:
    warper = TimeWarper(torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 1]]))
    assert warper(torch.arange(5.0)[None, None, None, :, None]).flatten().tolist() == [2.0, 4.0]


@given(st.lists(lengths(), min_size=1, max_size=3))
def test_the_same_segments_change_no_bit(batch: list[list[tuple[int, int]]]) -> None:
    segments = torch.tensor(rows(batch, 0))
    x = drawn(len(batch), 2, 3, segments.shape[1], 4)
    assert TimeWarper(segments)(x) is x
    assert TimeWarper(segments, segments.clone())(x) is x


def test_whole_places_are_exact() -> None:
    """Every second of 2n − 1 teacher tokens, with nothing blended in."""
    x = drawn(1, 1, 1, 199, 3, dtype=torch.float32)
    zeros = torch.zeros(1, 199, dtype=torch.int64)
    assert torch.equal(TimeWarper(zeros, zeros[:, :100])(x), x[..., ::2, :])


def test_rows_go_by_their_own_segments() -> None:
    teacher, student = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    x = torch.arange(4.0)[None, None, None, :, None].expand(2, 1, 1, 4, 1)
    warped = TimeWarper(teacher, student)(x)[:, 0, 0, :, 0].tolist()
    assert warped == [[0.0, 2.0, 3.0, 3.0], [0.0, 0.0, 1.0, 3.0]]


def test_gradients_flow_through_the_warp() -> None:
    x = drawn(1, 1, 2, 4, 3).requires_grad_()
    warper = TimeWarper(torch.tensor([[0, 0, 0, -1]]), torch.tensor([[0, 0, 0, 0, 0]]))
    torch.autograd.gradcheck(warper, (x,))
    warper(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad[..., 3, :].abs().sum()) == 0


def test_segments_that_do_not_fit_are_errors() -> None:
    teacher = torch.tensor([[0, 0, 1], [0, 0, 0]])
    with pytest.raises(HeadwiseError, match="row 1: the student's token 2 is of segment 1, which the teacher does not"):
        TimeWarper(teacher, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    with pytest.raises(HeadwiseError, match=r"not \[2, 3\] and \[1, 3\]"):
        TimeWarper(teacher, teacher[:1])
    with pytest.raises(HeadwiseError, match="4 tokens given, but segments for 3"):
        TimeWarper(teacher)(torch.zeros(2, 1, 1, 4, 1))
