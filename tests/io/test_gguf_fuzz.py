"""Damaged and lying GGUF files: every one is refused in one line, at once, and before a number is read or room is made
for what it says.

The files that are damaged are real ones, small: a Llama with a byte-level tokenizer, a quantised GPT-2 with old
converters' second head, a Phi-3 with SentencePiece's.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import Type, add_byte_level, add_sentencepiece, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_models import published

import headwise.io.gguf.model as reader
from headwise.errors import FormatError
from headwise.io.gguf import gguf_spec, gguf_tokenizer, load_gguf

WIDTHS = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
# What reading costs whatever the file: the objects of its values and tensors, and a module without numbers.
FIXED = 1 << 20
# Numbers that lies are made of: nothing, a little too much, the ends of every width.
NUMBERS = [0, 1, 2, 7, 9, 13, 31, 33, 255, 256, 4097, 2**16, 2**20, 2**21, 2**24]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]

read_tensor = reader.read_tensor
Damage = Callable[[bytearray], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("gguf")
    kin = {**WIDTHS, "num_key_value_heads": 1}
    llama3 = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    gpt2 = published("gpt2", n_embd=32, n_head=2, n_layer=1, n_positions=16)
    made = {
        "llama": convert(published("llama", **kin, rope_parameters=llama3), folder / "llama.gguf", more=add_byte_level),
        "gpt2": convert(gpt2, folder / "gpt2.gguf", Type.Q8_0, output=True, more=add_byte_level),
        "phi3": convert(published("phi3", **kin), folder / "phi3.gguf", Type.Q4_0, more=add_sentencepiece),
    }
    for path in made.values():  # what is imported or kept for good with the first file is not the file's cost
        for call in (gguf_spec, load_gguf, gguf_tokenizer):
            call(path)
    return {name: path.read_bytes() for name, path in made.items()}


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """One damage, its place given as a share of the file; most lie in the header, where files can lie."""
    share = draw(st.floats(0, 1)) * draw(st.sampled_from([1.0, 0.3, 0.1, 0.02]))
    what = draw(st.sampled_from(["bits", "u32", "u64", "cut", "drop", "twice", "text"]))
    number, width = draw(st.sampled_from(NUMBERS)), draw(st.sampled_from(["<I", "<Q"]))
    size, mask = draw(st.integers(1, 64)), draw(st.integers(1, 255))

    def damage(data: bytearray) -> None:
        at = int(share * max(len(data) - 8, 0))
        if what == "bits" and data:
            data[at] ^= mask
        elif what in ("u32", "u64"):
            form = struct.Struct(width)
            data[at : at + form.size] = form.pack(number % 2 ** (8 * form.size))
        elif what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + size]
        elif what == "twice":
            data[at:at] = data[at : at + size]
        else:
            data[at : at + size] = bytes([mask]) * size

    return damage


def refuses(call: Callable[[Path], Any], path: Path) -> bool:
    """Whether `call` refuses the file; anything but a FormatError of one line, or much work for it, is a failure."""
    refusal, started = None, time.process_time()
    tracemalloc.start()
    try:
        call(path)
    except FormatError as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started <= 1
    if refusal is not None:
        assert "\n" not in refusal
        assert str(path) in refusal
        assert peak <= 2 * path.stat().st_size + FIXED
    return refusal is not None


@given(st.sampled_from(["llama", "gpt2", "phi3"]), st.lists(damages(), min_size=1, max_size=4))
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_in_one_line_or_read(
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damaged: list[Damage],
) -> None:
    data = bytearray(whole[name])
    for damage in damaged:
        damage(data)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_tensor", lambda *args: read.append(args) or read_tensor(*args))
        refused = refuses(load_gguf, path)
    assert not (refused and read), "refused after numbers were read"
    refuses(gguf_spec, path)
    refuses(gguf_tokenizer, path)
