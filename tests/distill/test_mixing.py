"""Losses layer by layer: zero for a copy, gradients in the layer alone, and matrices that mix as the layer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_models import attention_lines, kv_lines, small, tokens
from torch import Tensor

from headwise.attention.base import split_heads
from headwise.attention.recurrence import resets
from headwise.cache import Placed, place
from headwise.distill.capture import capture
from headwise.distill.mixing import attention_transfer, block_alignment, check_layerwise, matrix_mixing, mixing_matrix
from headwise.errors import HeadwiseError
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.model.surgery import swap


def states(model: LanguageModel, segments: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the blocks read and leave, and what attention makes, of two texts."""
    with capture(model, {"inputs", "hidden", "outputs"}) as signals, torch.no_grad():
        model(tokens(2, 11), segments=segments)
    return tuple(
        torch.stack([x for x in xs if x is not None], 1) for xs in (signals.inputs, signals.hidden, signals.outputs)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["pre", "post", "sandwich", "reordered", "parallel", "parallel_two_norms"])
def test_a_copy_of_the_teacher_costs_nothing(order: str) -> None:
    """So each layer reads what the teacher's reads, by the same norms, positions and segments."""
    teacher = small(f"order={order}")
    segments = torch.tensor([[0] * 6 + [1] * 5, [0] * 11])
    inputs, hidden, outputs = states(teacher, segments)
    assert float(attention_transfer(teacher, inputs, outputs, segments_BT=segments).detach()) < 1e-10
    assert float(block_alignment(teacher, inputs, hidden, segments_BT=segments).detach()) < 1e-10
    assert float(matrix_mixing(teacher, teacher, inputs, segments_BT=segments).detach()) < 1e-10
    assert float(attention_transfer(teacher, inputs, outputs).detach()) > 1e-6  # without segments it is another layer


@pytest.mark.parametrize("call", kv_lines())
def test_the_matrix_is_that_of_the_weights(call: str) -> None:
    model = small(f"attention={call}")
    inputs, _, _ = states(model)
    block: Any = model.decoding_stack().blocks[1]
    matrix = mixing_matrix(block, inputs[:, 1], model.decoding_stack().contexts(_placed(11))[1])
    assert matrix.shape == (2, 4, 11, 11)
    assert float(matrix.detach().triu(1).abs().max()) == 0  # causal
    if not getattr(block.attention.spec, "sink", False):
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, 11))


@pytest.mark.parametrize("call", [call for call in attention_lines() if call not in kv_lines()])
def test_the_matrix_of_a_recurrence_mixes_values_as_the_recurrence_does(call: str) -> None:
    model = small(f"attention={call}")
    inputs, _, _ = states(model)
    block: Any = model.decoding_stack().blocks[1]
    segments = torch.tensor([[0] * 6 + [1] * 5, [0] * 11])
    context = model.decoding_stack().contexts(_placed(11, segments))[1]
    attention, h = block.attention, block.attention_norm(inputs[:, 1])
    matrix = mixing_matrix(block, inputs[:, 1], context)
    assert float(matrix.detach().triu(1).abs().max()) == 0
    q, k, v = attention._heads(h, context)
    assert float(matrix[0, :, 6:, :6].detach().abs().max()) == 0  # the second text of the first row
    y, _ = attention.recur(q, k, v, attention.gates(h), resets(context.segments), None)
    torch.testing.assert_close(matrix @ v.repeat_interleave(4 // attention.kv_heads, 1), y, rtol=1e-3, atol=1e-4)


def _placed(T: int, segments: Tensor | None = None) -> Placed:
    return place(torch.zeros(2, T, dtype=torch.int64), segments, None)


def test_softmax_matrices_are_the_weights() -> None:
    model = small("attention=gqa(kv_heads=2)", preset="gpt2")
    inputs, _, outputs = states(model)
    block: Any = model.decoding_stack().blocks[0]
    matrix = mixing_matrix(block, inputs[:, 0], model.decoding_stack().contexts(_placed(11))[0])
    values = split_heads(block.attention.wv(block.attention_norm(inputs[:, 0])), 2).repeat_interleave(2, 1)
    torch.testing.assert_close(matrix @ values, outputs[:, 0])


@pytest.mark.parametrize("call", ["linear", "gla", "window(3)", "gqa(kv_heads=2)"])
def test_losses_fall_in_training_and_move_the_chosen_layers_alone(call: str) -> None:
    teacher = small()
    student = swap(teacher, attention=call, calibration=tokens(4, 11, seed=3))
    inputs, hidden, outputs = states(teacher)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 8:] = False
    for loss_of in (
        lambda: attention_transfer(student, inputs, outputs, mask, layers=[1]),
        lambda: matrix_mixing(student, teacher, inputs, mask, layers=[1]),
        lambda: block_alignment(student, inputs, hidden, mask, layers=[1]),
    ):
        student.zero_grad()
        optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
        first = loss_of()
        first.backward()
        assert all(p.grad is None for p in student.decoding_stack().blocks[0].parameters())
        assert student.embedding.weight.grad is None
        assert all(p.grad is None for p in teacher.parameters())
        for _ in range(5):
            optimiser.step()
            optimiser.zero_grad()
            loss_of().backward()
        assert float(loss_of().detach()) < float(first.detach())


def test_padding_and_what_reads_it_count_for_nothing() -> None:
    teacher, student = small(), small("attention=linear")
    inputs, hidden, outputs = states(teacher)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 8:] = False
    changed = [x.clone() for x in (inputs, hidden, outputs)]
    for x in changed[:2]:
        x[1, :, 8:] = 5.0
    changed[2][1, :, :, 8:] = 5.0
    for one, other in (
        (attention_transfer(student, inputs, outputs, mask), attention_transfer(student, changed[0], changed[2], mask)),
        (block_alignment(student, inputs, hidden, mask), block_alignment(student, changed[0], changed[1], mask)),
        (matrix_mixing(student, teacher, inputs, mask), matrix_mixing(student, teacher, changed[0], mask)),
    ):
        torch.testing.assert_close(one, other)


def test_layers_that_do_not_match_are_errors() -> None:
    teacher = small()
    inputs, _, outputs = states(teacher)
    with pytest.raises(HeadwiseError, match=r"layer 0: the student's heads make \[2, 4, 11, 4\] and the teacher's"):
        attention_transfer(small("attention=tva(rank=4)"), inputs, outputs)
    narrow = small().spec.replace(d_model=16, n_layers=3)
    with pytest.raises(HeadwiseError, match=r"has d_model=16 \(teacher: 32\) and n_layers=3 \(teacher: 2\)"):
        check_layerwise(narrow, teacher.spec)
    check_layerwise(small("attention=linear").spec, teacher.spec)
    fewer = small("attention=softmax(head_dim=16)").spec.replace(n_heads=2)
    with pytest.raises(HeadwiseError, match="layer 0: the student mixes with 2 heads and the teacher with 4"):
        matrix_mixing(build(fewer), teacher, inputs)
