"""The order of batches: a pure function of seed and step that passes over every token alike."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data import IGNORE, Batch, Batches, Tokens, eval_batches
from headwise.data.batches import epoch_keys, shuffled
from headwise.errors import DataError, SettingsError


def counting(n: int, starts: list[int] | None = None, separated: bool = False) -> Tokens:
    """A split whose tokens are 0, 1, 2, …, so that every id tells its place."""
    boundaries = None if starts is None else np.array(starts, dtype=np.int64)
    documents = 1 if starts is None else len(starts)
    return Tokens(np.arange(n, dtype=np.uint32), n, documents, boundaries, separated, "the split")


def targets_of(batches: list[Batch]) -> Counter[int]:
    return Counter(torch.cat([b.targets[b.targets != IGNORE] for b in batches]).tolist())


@given(n=st.integers(1, 3000), seed=st.integers(), epoch=st.integers(0, 5))
def test_shuffled_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(np.arange(n), n, epoch_keys(seed, epoch)).tolist()) == list(range(n))


def test_shuffled_works_far_beyond_memory() -> None:
    n = 10**15 + 7
    values = shuffled(np.arange(n - 1000, n), n, epoch_keys(0, 0))
    assert len(np.unique(values)) == 1000
    assert values.min() >= 0
    assert values.max() < n
    # Uniform draws leave a tenth of the range empty with odds of 10·0.9^1000 < 1e-44.
    assert len(np.unique(values * 10 // n)) == 10


def test_shuffled_looks_random() -> None:
    """No trend and no memory: place and value, and neighbours' values, are uncorrelated (|r| < 4/√n, odds 1e-4 each;
    the seeds are fixed, so it is no matter of luck), and other seeds and epochs give other orders."""
    n = 10_000
    orders = [shuffled(np.arange(n), n, epoch_keys(seed, epoch)) for seed in range(3) for epoch in range(3)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.04
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.04
        assert all(abs(np.corrcoef(order, other)[0, 1]) < 0.04 for other in orders[:i])


@settings(max_examples=60)
@given(seq_len=st.integers(1, 12), extra=st.integers(1, 200), batch_size=st.integers(1, 9), seed=st.integers(-5, 2**70))
def test_an_epoch_predicts_every_token_once(seq_len: int, extra: int, batch_size: int, seed: int) -> None:
    """Windows of an epoch do not share a target and leave out fewer than 2·seq_len, at the ends of the split."""
    tokens = counting(seq_len + extra)
    batches = Batches(tokens, batch_size, seq_len, seed)
    steps = -(-2 * batches.windows_per_epoch // batch_size)
    rows = torch.cat([batches.batch(step).targets for step in range(steps)])
    for epoch in (0, 1):
        first = epoch * batches.windows_per_epoch
        seen = sorted(rows[first : first + batches.windows_per_epoch].flatten().tolist())
        assert seen == list(range(seen[0], seen[-1] + 1))
        assert len(seen) > len(tokens) - 1 - 2 * seq_len


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(), st.integers(0, 10**12))
def test_batches_are_windows_of_the_text(batch_size: int, seq_len: int, seed: int, step: int) -> None:
    batch = Batches(counting(200), batch_size, seq_len, seed).batch(step)
    assert batch.ids.shape == batch.targets.shape == (batch_size, seq_len)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.ids.is_contiguous()
    assert batch.targets.is_contiguous()
    assert batch.segments is None
    assert torch.equal(batch.targets, batch.ids + 1)
    assert torch.equal(batch.ids - batch.ids[:, :1], torch.arange(seq_len).expand(batch_size, seq_len))


def test_a_batch_depends_on_seed_and_step_only() -> None:
    tokens = counting(5000)
    forwards = Batches(tokens, 4, 16, seed=3)
    expected = [forwards.batch(step).ids for step in range(200)]
    again = Batches(tokens, 4, 16, seed=3)
    for step in reversed(range(200)):
        assert torch.equal(again.batch(step).ids, expected[step])
    others = [Batches(tokens, 4, 16, seed=seed).batch(0).ids for seed in range(20)]
    assert len({tuple(ids.flatten().tolist()) for ids in others}) == 20


def test_batches_are_the_same_in_another_process() -> None:
    """Python's own hashing differs from process to process; the order must not."""
    program = (
        "import numpy as np; from headwise.data import Batches, Tokens;"
        "print(Batches(Tokens(np.arange(5000, dtype=np.uint32), 5000), 4, 16, 3).batch(77).ids.tolist())"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == str(Batches(counting(5000), 4, 16, 3).batch(77).ids.tolist())


def test_cuts_move_from_epoch_to_epoch() -> None:
    batches = Batches(counting(10_000), 1, 50, seed=0)
    offsets = {int(batches.batch(e * batches.windows_per_epoch).ids[0, 0]) % 50 for e in range(40)}
    assert len(offsets) > 15  # 40 draws among 50


def test_batch_size_cuts_the_same_stream() -> None:
    small, large = Batches(counting(999), 3, 10, 1), Batches(counting(999), 12, 10, 1)
    rows = torch.cat([small.batch(step).ids for step in range(4 * 30)])
    assert torch.equal(rows, torch.cat([large.batch(step).ids for step in range(30)]))


# --- evaluation ----------------------------------------------------------------------------------------------------


@given(seq_len=st.integers(1, 20), extra=st.integers(1, 150), batch_size=st.integers(1, 12))
def test_evaluation_counts_every_target_once(seq_len: int, extra: int, batch_size: int) -> None:
    tokens = counting(seq_len + extra)
    batches = list(eval_batches(tokens, batch_size, seq_len))
    assert targets_of(batches) == Counter(range(1, len(tokens)))
    assert tokens.n_targets == len(tokens) - 1
    assert len({b.ids.shape for b in batches}) == 1
    for batch in batches:
        counted = batch.targets != IGNORE
        assert torch.equal(batch.targets[counted], batch.ids[counted] + 1)
    in_order = torch.cat([b.targets[b.targets != IGNORE] for b in batches])
    assert torch.equal(in_order, in_order.sort().values)


# --- documents -----------------------------------------------------------------------------------------------------

documents = st.lists(st.integers(1, 12), min_size=2, max_size=30).map(lambda lengths: np.cumsum([0, *lengths]).tolist())


@given(bounds=documents, seq_len=st.integers(1, 20), separated=st.booleans(), seed=st.integers(0, 99))
def test_segments_are_the_documents(bounds: list[int], seq_len: int, separated: bool, seed: int) -> None:
    *starts, n = bounds
    if n <= seq_len:
        return
    tokens = counting(n, starts, separated)
    batches = [Batches(tokens, 3, seq_len, seed).batch(step) for step in range(4)]
    for batch in [*batches, *eval_batches(tokens, 4, seq_len)]:
        document = torch.from_numpy(np.searchsorted(starts, batch.ids.numpy(), side="right"))
        assert batch.segments is not None
        assert batch.segments.dtype == torch.int64
        assert torch.equal(batch.segments, document - document[:, :1])
    for batch in batches:
        first = torch.isin(batch.ids + 1, torch.tensor(starts))
        assert torch.equal(batch.targets == IGNORE, first & (not separated))


@given(bounds=documents, seq_len=st.integers(1, 20), separated=st.booleans(), batch_size=st.integers(1, 5))
def test_evaluation_predicts_no_document_from_another(
    bounds: list[int], seq_len: int, separated: bool, batch_size: int
) -> None:
    *starts, n = bounds
    if n <= seq_len:
        return
    tokens = counting(n, starts, separated)
    expected = set(range(1, n)) - (set() if separated else set(starts))
    assert targets_of(list(eval_batches(tokens, batch_size, seq_len))) == Counter(expected)
    assert tokens.n_targets == len(expected)


def test_moved_batch_is_the_same() -> None:
    batch = Batches(counting(50, [0, 20], True), 2, 8, 0).batch(0)
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.targets.device.type == "meta"
    assert moved.segments is not None
    assert Batch(batch.ids, batch.targets).to("cpu").segments is None


# --- errors --------------------------------------------------------------------------------------------------------


def test_sequence_longer_than_the_split() -> None:
    message = "seq_len 64 needs 65 tokens in a row, but the split has 64; give more text or a seq_len of at most 63"
    with pytest.raises(DataError, match=message):
        Batches(counting(64), 4, 64)
    with pytest.raises(DataError, match=message):
        next(eval_batches(counting(64), 4, 64))
    assert Batches(counting(65), 4, 64).batch(9).ids[:, 0].tolist() == [0] * 4


@pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 8), (4, 0), (-1, 8)])
def test_sizes_below_one(batch_size: int, seq_len: int) -> None:
    with pytest.raises(SettingsError, match="must be 1 or more"):
        Batches(counting(64), batch_size, seq_len)


def test_steps_count_from_zero() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        Batches(counting(64), 4, 8).batch(-1)


def test_importing_data_loads_neither_torch_nor_tokenizers() -> None:
    program = (
        "import sys, headwise.data; print([m for m in ('torch', 'tokenizers', 'pyarrow', 'rich') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
