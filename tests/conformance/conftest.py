"""Runs each conformance test over the lines of `conformance_lines.py`."""

from __future__ import annotations

import pytest
from conformance_lines import BIDIRECTIONAL, CAUSAL, ENCODER_DECODER, WIDTHS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = {
        "causal_line": CAUSAL,
        "encoder_line": BIDIRECTIONAL,
        "encoder_decoder_line": ENCODER_DECODER,
        "line": CAUSAL + BIDIRECTIONAL + ENCODER_DECODER,
    }
    for name, lines in wanted.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name, lines, ids=[line.replace(WIDTHS + ", ", "").replace(WIDTHS, "") for line in lines]
            )
