"""Runs each conformance test over the lines of `conformance_lines.py`."""

from __future__ import annotations

import re

import pytest
from conformance_lines import BIDIRECTIONAL, CAUSAL, ENCODER_DECODER, STACKED


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
