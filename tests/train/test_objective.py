"""Objectives: what is asked of each architecture, and that it depends on nothing but (seed, step)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.data import Batch
from headwise.spec import parse
from headwise.train.objective import (
    IGNORED,
    Example,
    loss_sum,
    make_objective,
    masked_tokens,
    second_half,
    vocab_needed,
)

MASK = 99


def batch(rows: int, seq_len: int, segments: bool = False) -> Batch:
    window = torch.arange(rows * (seq_len + 1)).view(rows, seq_len + 1) % 50
    return Batch(
        ids=window[:, :-1], targets=window[:, 1:], segments=torch.zeros(rows, seq_len).long() if segments else None
    )


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), rows=st.integers(1, 4), seq_len=st.integers(2, 40))
def test_masking_is_a_pure_function_and_asks_exactly_for_what_it_hides(
    seed: int, step: int, rows: int, seq_len: int
) -> None:
    given_batch = batch(rows, seq_len)
    example, again = (masked_tokens(MASK, seed)(given_batch, step) for _ in range(2))
    assert torch.equal(example.ids_BT, again.ids_BT)
    hidden = example.ids_BT == MASK
    assert torch.equal(hidden, example.targets_BT != IGNORED)
    assert torch.equal(example.targets_BT[hidden], given_batch.ids[hidden])
    assert torch.equal(example.ids_BT[~hidden], given_batch.ids[~hidden])


def test_positions_without_a_target_are_never_masked() -> None:
    filled = batch(4, 64)
    filled.targets[2:] = IGNORED
    hidden = masked_tokens(MASK, 0)(filled, 0).ids_BT == MASK
    assert bool(hidden[:2].any())
    assert not bool(hidden[2:].any())


def test_masks_differ_between_steps_and_seeds_and_hide_fifteen_percent() -> None:
    """Of 64,000 positions the masked share lies within 0.006 of 0.15 (four standard deviations)."""
    big = batch(250, 256)
    masks = {
        (seed, step): masked_tokens(MASK, seed)(big, step).ids_BT == MASK for seed, step in ((0, 0), (0, 1), (1, 0))
    }
    for mask in masks.values():
        assert float(mask.float().mean()) == pytest.approx(0.15, abs=0.006)
    assert not torch.equal(masks[0, 0], masks[0, 1])
    assert not torch.equal(masks[0, 0], masks[1, 0])


@given(seq_len=st.integers(2, 33), segments=st.booleans())
def test_the_second_half_is_predicted_from_the_first_and_itself(seq_len: int, segments: bool) -> None:
    window = batch(2, seq_len, segments)
    example = second_half(window, 0)
    assert example.encoder_ids_BS is not None
    half = example.encoder_ids_BS.shape[1]
    assert torch.equal(torch.cat([example.encoder_ids_BS, example.targets_BT], dim=1), window.ids)
    assert half == max(1, seq_len // 2)
    assert torch.equal(example.ids_BT[:, 0], example.encoder_ids_BS[:, -1])
    assert torch.equal(example.ids_BT[:, 1:], example.targets_BT[:, :-1])
    assert (example.segments_BT is None) == (example.encoder_segments_BS is None) == (not segments)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_splitting_keeps_every_row_once(parts: int) -> None:
    example = second_half(batch(6, 8, segments=True), 0)
    pieces = example.split(parts)
    assert len(pieces) == parts
    for name in Example.__slots__:
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(example, name))
    assert sum(piece.count() for piece in pieces) == example.count()


class _Fixed(torch.nn.Module):
    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids_BT: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.logits(ids_BT)


def test_the_loss_adds_up_counted_targets_only() -> None:
    model = _Fixed(lambda ids: torch.zeros(*ids.shape, 7))
    targets = torch.tensor([[1, IGNORED, 3], [IGNORED, IGNORED, 0]])
    example = Example(torch.zeros(2, 3).long(), targets)
    assert example.count() == 3
    assert float(loss_sum(model, example)) == pytest.approx(3 * torch.log(torch.tensor(7.0)).item())


def test_an_encoder_gets_one_id_more_and_masks_with_the_last() -> None:
    assert [vocab_needed(kind, 65) for kind in ("decoder", "encoder_decoder", "encoder")] == [65, 65, 66]
    spec = parse("gpt2(architecture=encoder, d_model=16, n_layers=1, n_heads=2)").resolve(vocab_size=66)
    assert 65 in make_objective(spec, 0)(batch(4, 32), 0).ids_BT
