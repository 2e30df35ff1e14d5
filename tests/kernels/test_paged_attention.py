"""Paged attention: the form for a CPU and the kernel in Triton's interpreter against the readable form in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise import kernels
from headwise.errors import HeadwiseError
from headwise.kernels import paged_attention
from headwise.kernels.paged_attention import naive, stretches
from headwise.kernels.paged_attention.stretches import cut, stretches_of

B, H, K, E = 3, 6, 2, 12
LENGTHS = [5, 40, 131]
SCORES: list[dict[str, Any]] = [
    {},
    {"window": 7},
    {"softcap": 2.0},
    {"window": 33, "softcap": 3.0, "sink_H": torch.linspace(-1, 1, H)},
    {"scale": 0.7},
]


def pool(block_size: int, lengths: list[int], dtype: torch.dtype, *, D: int = E, side_by_side: bool = False) -> Any:
    """Caches [N,block,K,·] with the rows' tokens strewn over them, or in order, and tables that say where."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // block_size) for length in lengths]
    n_blocks = sum(counts) + 3
    order = torch.arange(n_blocks) if side_by_side else torch.randperm(n_blocks, generator=generator)
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    at = 0
    for row, n in enumerate(counts):
        tables[row, :n] = order[at : at + n]
        at += n
    key_cache = torch.randn(n_blocks, block_size, K, E, generator=generator, dtype=torch.float64).to(dtype)
    value_cache = torch.randn(n_blocks, block_size, K, D, generator=generator, dtype=torch.float64).to(dtype)
    return key_cache, value_cache, tables, torch.tensor(lengths, dtype=torch.int32)


def query(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def exact(q: Tensor, caches: Any, scores: dict[str, Any]) -> Tensor:
    """The readable form in float64."""
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in scores.items()}
    with kernels.naive():
        return paged_attention.attention(q.double(), caches[0].double(), caches[1].double(), *caches[2:], **wide)


def test_the_readable_form_is_attention_row_by_row() -> None:
    key_cache, value_cache, tables, lengths = caches = pool(4, [9, 3], torch.float64)
    q = query(2, H, 2, E)
    y = exact(q, caches, {})
    for row, length in enumerate(lengths.tolist()):
        at = [(tables[row, j // 4].item(), j % 4) for j in range(length)]
        k, v = (torch.stack([cache[place] for place in at]) for cache in (key_cache, value_cache))
        for h in range(H):
            for t in range(2):
                seen = length - 1 + t
                weights = (E**-0.5 * k[:seen, h // 3] @ q[row, h, t]).softmax(0)
                torch.testing.assert_close(y[row, h, t], weights @ v[:seen, h // 3])


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("T", [None, 1, 3, 5])
def test_the_form_for_a_cpu(T: int | None, scores: dict[str, Any], side_by_side: bool) -> None:
    caches = pool(8, LENGTHS, torch.float32, D=20, side_by_side=side_by_side)
    q = query(B, H, E, dtype=torch.float32) if T is None else query(B, H, T, E, dtype=torch.float32)
    y = paged_attention.attention(q, *caches, **scores)
    assert y.shape == (*q.shape[:-1], 20)
    torch.testing.assert_close(y.double(), exact(q, caches, scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("heads", [1, K, H])
def test_a_bias_of_the_keys(heads: int, rows: int) -> None:
    """Also behind each row's end, where it must not be read."""
    caches, q = pool(8, LENGTHS, torch.float64), query(B, H, 4, E)
    bias = torch.randn(rows, heads, max(LENGTHS), dtype=torch.float64)
    wanted = exact(q, caches, {"key_bias": bias})
    torch.testing.assert_close(paged_attention.attention(q, *caches, key_bias=bias), wanted)
    assert not torch.allclose(wanted, exact(q, caches, {}))


def test_many_queries_over_strewn_blocks_go_some_rows_at_a_time() -> None:
    caches, q = pool(8, [200, 150], torch.float64), query(2, H, 150, E)
    for scores in SCORES:
        scores = {k: v.double() if isinstance(v, Tensor) else v for k, v in scores.items()}
        torch.testing.assert_close(paged_attention.attention(q, *caches, **scores), exact(q, caches, scores))


def test_neighbouring_blocks_are_one_stretch() -> None:
    assert stretches_of([3, 4, 5, 1, 2, 9], 22, 4) == [(12, 24), (4, 12), (36, 38)]
    assert cut([(12, 24), (4, 12), (36, 38)], 10, 21) == [(22, 24), (4, 12), (36, 37)]
    assert cut([(12, 24), (4, 12)], 13, 14) == [(5, 6)]


def test_a_cpu_gathers_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long stretches are met as views of the pool; what is put together is never more than a piece."""
    monkeypatch.setattr(stretches, "PIECE", 24)
    caches, q = pool(8, [200, 9], torch.float32), query(2, H, E, dtype=torch.float32)
    caches[2][1] = torch.arange(caches[2].shape[1])  # one row of strewn blocks, one whose blocks are neighbours
    held, copied, viewed = caches[0].untyped_storage().data_ptr(), [], []

    def watch(attention: Any, several: bool) -> Any:
        def call(q: Tensor, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Tensor:
            keys = list(keys) if several else [keys]
            for k in keys:
                (viewed if k.untyped_storage().data_ptr() == held else copied).append(k.shape[-2])
            return attention(q, keys if several else keys[0], values, *args, **kwargs)

        return call

    monkeypatch.setattr(stretches.pieces, "attention", watch(stretches.pieces.attention, True))
    monkeypatch.setattr(stretches.block, "attend", watch(stretches.block.attend, False))
    paged_attention.attention(q, *caches)
    assert copied
    assert max(copied) <= 24
    assert viewed


@pytest.mark.parametrize("piece", [1, 24, 70])
@pytest.mark.parametrize("T", [1, 3, 70])
def test_pieces_of_any_size_give_one_result(monkeypatch: pytest.MonkeyPatch, piece: int, T: int) -> None:
    monkeypatch.setattr(stretches, "PIECE", piece)
    caches, q = pool(8, [200, 150], torch.float64), query(2, H, T, E)
    for scores in SCORES:
        scores = {k: v.double() if isinstance(v, Tensor) else v for k, v in scores.items()}
        torch.testing.assert_close(paged_attention.attention(q, *caches, **scores), exact(q, caches, scores))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scores", SCORES, ids=str)
@pytest.mark.parametrize("T", [1, 5])
def test_the_triton_kernel(T: int, scores: dict[str, Any], splits: int) -> None:
    """Widths that are no powers of two, a block size that is none, rows of unequal length, keys in three parts."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    from headwise.kernels.paged_attention import triton

    caches, q = pool(12, LENGTHS, torch.float32, D=20), query(B, H, T, E, dtype=torch.float32)
    given = {"scale": E**-0.5, **scores}
    y = triton.attention(q, *caches, splits=splits, **given)
    wanted, rounded = exact(q, caches, given), naive.attention(q, *caches, **given)
    torch.testing.assert_close(y.double(), wanted, atol=1e-5, rtol=1e-5)
    error, others = ((x.double() - wanted).square().mean().sqrt() for x in (y, rounded))
    assert error <= 2 * others + 1e-7


def test_the_triton_kernel_adds_a_bias_and_serves_half_precision() -> None:
    from headwise.kernels.paged_attention import triton

    caches, q = pool(16, LENGTHS, torch.float16), query(B, H, 20, E, dtype=torch.float16)[:, :, -4:]
    for heads in (1, K, H):
        bias = torch.randn(B, heads, max(LENGTHS))
        y = triton.attention(q, *caches, scale=0.3, key_bias=bias)
        assert y.dtype == torch.float16
        wanted = exact(q, caches, {"scale": 0.3, "key_bias": bias})
        torch.testing.assert_close(y.double(), wanted, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": query(B, H, 2, E + 1)}, "keys want the query's width 13"),
        ({"query": query(B, 5, E)}, "K must divide H=5"),
        ({"query": query(B, E)}, r"wanted query \[B,H,E\] or \[B,H,T,E\]"),
        ({"context_lens": torch.tensor([5, 40, 10_000], dtype=torch.int32)}, "context_lens are .*to max_blocks"),
        ({"context_lens": torch.tensor([0, 40, 131], dtype=torch.int32)}, "wanted T=1"),
        ({"block_tables": torch.zeros(2, 4, dtype=torch.int32)}, r"wanted \[3,max_blocks\]"),
        ({"key_bias": torch.zeros(B, 4, 131)}, "key_bias is"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(change: dict[str, Tensor], message: str) -> None:
    names = ("key_cache", "value_cache", "block_tables", "context_lens")
    arguments = {"query": query(B, H, E), **dict(zip(names, pool(8, LENGTHS, torch.float64))), **change}
    with pytest.raises(HeadwiseError, match=message):
        paged_attention.attention(**arguments)
