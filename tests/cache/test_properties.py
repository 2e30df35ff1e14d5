"""Paged = contiguous = each layer's own = no cache, in any interleaving of append, fork, crop, reorder and free.

Two thousand random interleavings, and those that hypothesis thinks of; in float64, to nine digits.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interleavings import SYMBOLS, Interleaving

from headwise.cache import PagedPool
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

WIDTHS = f"d_model=8, n_layers=1, n_heads=2, vocab_size={SYMBOLS}, max_seq_len=40"
LINES = [
    f"llama({WIDTHS})",
    f"llama({WIDTHS}, attention=softmax(kv_heads=1, softcap=3.0, sink=true), position=alibi)",
    f"gpt2({WIDTHS}, attention=gated)",
    f"llama({WIDTHS}, attention=window(5), position=alibi)",
    f"llama({WIDTHS}, attention=window(4, sink_tokens=2, sink=true))",
    f"llama({WIDTHS}, attention=window(3, dilation=2))",
    f"llama({WIDTHS}, attention=mla)",
    f"llama({WIDTHS}, attention=tva(3))",
    f"llama({WIDTHS}, attention=w2)",
    f"llama({WIDTHS}, attention=strided(3))",
]
CASES = 200  # for each line: two thousand in all
LONGEST = 30


def model_of(line: str) -> LanguageModel:
    return build(parse(line).replace(init_std=0.5), seed=2, dtype=torch.float64).eval()


def started(model: LanguageModel, block_size: int) -> Interleaving:
    return Interleaving(model, PagedPool(model.spec.dims.n_layers, 40 // block_size, block_size))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.replace(f"{WIDTHS}, ", ""))
def test_two_hundred_random_interleavings(line: str) -> None:
    model, shared = model_of(line), 0
    with torch.inference_mode():
        for case in range(CASES):
            draw = random.Random(case)
            texts = started(model, draw.choice((1, 2, 3, 4)))
            for _ in range(draw.randrange(3, 8)):
                what = draw.choice(("begin", "append", "append", "append", "fork", "crop", "reorder", "end"))
                if what == "begin" or not texts.branches:
                    texts.begin(draw.choice((1, 2)), [int(draw.random() < 0.2) for _ in range(draw.randrange(1, 9))])
                    continue
                at = draw.randrange(len(texts.branches))
                rows, length = texts.branches[at].ids.shape
                if what == "append" and length < LONGEST:
                    new = [[draw.randrange(SYMBOLS) for _ in range(draw.choice((1, 1, 2, 5)))]] * rows
                    texts.append(at, torch.tensor(new))
                elif what == "fork" and len(texts.branches) < 4:
                    texts.fork(at)
                elif what == "crop":
                    texts.crop(at, draw.randrange(length + 1))
                elif what == "reorder":
                    texts.reorder(at, torch.tensor([draw.randrange(rows) for _ in range(draw.choice((1, 2)))]))
                elif what == "end":
                    texts.end(at)
            shared += texts.shared
            texts.finish()
    assert shared > CASES // 4


STEP = st.tuples(st.sampled_from(("begin", "append", "fork", "crop", "reorder", "end")), st.integers(0, 9))


@settings(max_examples=150)
@given(line=st.sampled_from(LINES), block_size=st.integers(1, 5), steps=st.lists(STEP, min_size=2, max_size=9))
def test_interleavings_that_hypothesis_thinks_of(line: str, block_size: int, steps: list[tuple[str, int]]) -> None:
    texts = started(MODELS.setdefault(line, model_of(line)), block_size)
    with torch.inference_mode():
        for what, n in steps:
            if what == "begin" or not texts.branches:
                texts.begin(1 + n % 2, [0] * (n + 1))
                continue
            at = n % len(texts.branches)
            rows, length = texts.branches[at].ids.shape
            if what == "append" and length < LONGEST:
                texts.append(at, torch.arange(1 + n // 2).expand(rows, -1) % SYMBOLS)
            elif what == "fork":
                texts.fork(at)
            elif what == "crop":
                texts.crop(at, min(n, length))
            elif what == "reorder":
                texts.reorder(at, torch.tensor([n % rows]))
            elif what == "end":
                texts.end(at)
        texts.finish()


MODELS: dict[str, LanguageModel] = {}
