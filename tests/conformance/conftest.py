"""Runs each conformance test over the lines of `conformance_lines.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from conformance_lines import BIDIRECTIONAL, CAUSAL, ENCODER_DECODER, STACKED

from headwise.allocator import kept_memory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = {
        "causal_line": CAUSAL,
        "encoder_line": BIDIRECTIONAL,
        "encoder_decoder_line": ENCODER_DECODER,
        "line": CAUSAL + BIDIRECTIONAL + ENCODER_DECODER,
        "stacked_line": STACKED,
    }
    for name, lines in wanted.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, lines, ids=[re.sub(r"d_model=.*max_seq_len=\d+(, )?", "", s) for s in lines])


@pytest.fixture(autouse=True, scope="module")
def _kept_memory() -> Iterator[None]:
    """The definitions hold whole matrices of scores, and half their time was the system handing out pages anew."""
    with kept_memory():
        yield
