"""What is wrong with a GGUF file is said in one line, before its tensors are read; each limit at its edge."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from converted import convert
from gguf import GGUFWriter
from published_models import published

import headwise as hw
from headwise.errors import FormatError
from headwise.io.gguf import gguf_spec, load_gguf
from headwise.io.gguf import header as limits
from headwise.io.gguf.header import Strings, read_header

WIDTHS = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
U8, BOOL, STRING, ARRAY, U32 = 0, 7, 8, 9, 4


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(name: str, kind: int, data: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + data


def array(kind: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + data


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    values: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    room: int = 4096,
) -> bytes:
    """A file of these parts, with `room` bytes for the tensors."""
    n_tensors, n_values = counts or (len(tensors), len(values))
    parts = b"".join([magic, struct.pack("<IQQ", version, n_tensors, n_values), *values, *tensors])
    return parts + bytes(-len(parts) % 32 + room)


def refused(path: Path, data: bytes, call: Callable[[Path], Any] = read_header) -> str:
    path.write_bytes(data)
    with pytest.raises(FormatError) as failure:
        call(path)
    assert "\n" not in str(failure.value)
    assert str(path) in str(failure.value)
    return str(failure.value)


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as a GGUF file"),
    "cut in the magic": (b"GG", "it begins with b'GG'"),
    "another format": (b"\x93NUMPY" + bytes(64), "it begins with b'\\x93NUM'"),
    "cut after the version": (b"GGUF" + struct.pack("<I", 3), "takes 8 bytes at byte 8, and 0 are left"),
    "version 1": (file(version=1), "it has version 1; only little-endian files of versions 2 and 3"),
    "version 4": (file(version=4), "it has version 4"),
    "big-endian": (file(version=3 << 24), "it is big-endian"),
    "many tensors": (file(counts=(2**63, 0)), "9,223,372,036,854,775,808 tensors; at most 4,096"),
    "more tensors than bytes": (file(counts=(4096, 0)), "a table of 4,096 tensors takes"),
    "many values": (file(counts=(0, 2**32)), "4,294,967,296 values; at most 1,024"),
    "more values than bytes": (file(counts=(0, 1024), room=64), "a table of 1,024 values takes"),
    "a long name": (file([value("n" * 257, U32, bytes(4))]), "a text of 257 bytes at byte 32; at most 256"),
    "a long text": (file([value("s", STRING, string("n" * (2**18 + 1)))]), "a text of 262,145 bytes"),
    "a string past the end": (
        file([value("s", STRING, struct.pack("<Q", 2**18))]),
        "a string takes 262,144 bytes at byte 45, and",
    ),
    "a string past all ends": (
        file([value("s", STRING, struct.pack("<Q", 2**64 - 1))]),
        "a text of 18,446,744,073,709,551,615 bytes",
    ),
    "no UTF-8": (file([value("s", STRING, string(b"\xff"))]), "is not UTF-8"),
    "no such type": (file([value("s", 13, bytes(8))]), "the value 's' is of type 13"),
    "no truth value": (file([value("b", BOOL, b"\x02")]), "'b' is neither true nor false"),
    "twice": (file([value("x", U8, b"1")] * 2), "the value 'x' is given twice"),
    "an array of arrays": (file([value("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"1")))]), "an array of arrays"),
    "an array past the end": (file([value("a", ARRAY, array(U8, 2**40, b""))]), "'a' takes 1,099,511,627,776"),
    "many strings": (file([value("a", ARRAY, array(STRING, 2**40, b""))]), "1,099,511,627,776 strings; at most"),
    "more strings than bytes": (file([value("a", ARRAY, array(STRING, 2**20, b""))]), "an array of 1,048,576 strings"),
    "strings past the end": (
        file([value("a", ARRAY, array(STRING, 3, string("x") + struct.pack("<Q", 2**63)))]),
        "string 2 of 3 lies past its end",
    ),
    "the last string past the end": (
        file([value("a", ARRAY, array(STRING, 2, string("x") + struct.pack("<Q", 2**63)))]),
        "an array of strings takes 0 bytes",
    ),
    "alignment 0": (file([value("general.alignment", U32, struct.pack("<I", 0))]), "general.alignment is 0"),
    "alignment 24": (file([value("general.alignment", U32, struct.pack("<I", 24))]), "a power of two is wanted"),
    "alignment in words": (file([value("general.alignment", STRING, string("32"))]), "general.alignment is '32'"),
    "no dimensions": (file(tensors=[tensor("t", [])]), "the tensor 't' has 0 dimensions; 1 to 4"),
    "five dimensions": (file(tensors=[tensor("t", [1] * 5)]), "has 5 dimensions"),
    "many dimensions": (
        file(tensors=[string("t") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "has 4294967295 dimensions"),
    "a width of 0": (file(tensors=[tensor("t", [4, 0])]), "'t' has shape (0, 4), which F32 cannot hold"),
    "half a block": (file(tensors=[tensor("t", [48, 2], kind=2)]), "shape (2, 48), which Q4_0 cannot hold"),
    "no such tensor type": (file(tensors=[tensor("t", [4], kind=4)]), "'t' is of type 4, which is not known here"),
    "an odd place": (file(tensors=[tensor("t", [4], offset=4)]), "begins at 4, which is no multiple of 32"),
    "a tensor twice": (file(tensors=[tensor("t", [4]), tensor("t", [4], offset=32)]), "'t' is given twice"),
    "one over another": (file(tensors=[tensor("t", [9]), tensor("u", [4], offset=32)]), "'u' lies over another"),
    "past the end": (file(tensors=[tensor("t", [1024, 2])]), "ends at byte 8,288 of 4,192; it is cut short"),
    "far past the end": (file(tensors=[tensor("t", [4], offset=2**64 - 32)]), "it is cut short"),
    "a product that overflows": (file(tensors=[tensor("t", [2**63, 2**63, 4])]), "it is cut short"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_header_that_cannot_be_so_is_one_line(case: str, tmp_path: Path) -> None:
    data, words = WRONG[case]
    assert words in refused(tmp_path / "model.gguf", data)


def test_what_is_just_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    words = array(STRING, 2, string("α") + string(""))
    numbers = array(U32, 3, struct.pack("<3I", 1, 2, 3))
    path.write_bytes(
        file(
            [
                value("n" * limits.MOST_NAME, BOOL, b"\x01"),
                value("words", ARRAY, words),
                value("numbers", ARRAY, numbers),
                value("none", ARRAY, array(STRING, 0, b"")),
                value("general.alignment", U32, struct.pack("<I", 64)),
            ],
            [tensor("last", [3, 2, 1, 5], offset=128), tensor("t", [32], kind=2)],
            version=2,
        )
    )
    header = read_header(path)
    assert header.values["n" * limits.MOST_NAME] is True
    found = header.values["words"]
    assert isinstance(found, Strings)
    assert (list(found), len(found)) == (["α", ""], 2)
    assert list(header.values["none"]) == []  # type: ignore[call-overload]
    assert np.array_equal(header.values["numbers"], [1, 2, 3])  # type: ignore[arg-type]
    assert header.tensors["last"].shape == (5, 1, 2, 3)
    assert header.tensors["last"].start - header.tensors["t"].start == 128
    assert header.tensors["t"].start % 64 == 0
    assert header.tensors["t"].n_bytes == 18


def test_limits_on_counts_hold_at_their_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in {"MOST_VALUES": 3, "MOST_TENSORS": 2, "MOST_STRINGS": 4}.items():
        monkeypatch.setattr(limits, name, most)
    words = value("words", ARRAY, array(STRING, 3, string("x") * 3))
    more = value("more", ARRAY, array(STRING, 1, string("x")))
    tensors = [tensor("t", [8]), tensor("u", [8], offset=32)]
    (tmp_path / "fits.gguf").write_bytes(file([words, more, value("x", U8, b"1")], tensors))
    read_header(tmp_path / "fits.gguf")
    third = tensor("v", [8], offset=64)
    assert "at most 2" in refused(tmp_path / "a.gguf", file(tensors=[*tensors, third]))
    assert "at most 3" in refused(tmp_path / "b.gguf", file([value(f"{n}", U8, b"1") for n in range(4)]))
    two = value("more", ARRAY, array(STRING, 2, string("x") * 2))
    assert "'more' says it holds 2 strings; at most 4" in refused(tmp_path / "c.gguf", file([words, two]))


def test_a_path_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(FormatError) as failure:
            load_gguf(path)
        assert str(path) in str(failure.value)
        assert "\n" not in str(failure.value)


# ---- whole files of models that we lack, or that do not fit ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peer = published("llama", **WIDTHS, num_key_value_heads=1)
    return convert(peer, tmp_path_factory.mktemp("whole") / "model.gguf")


def changed(whole: Path, path: Path, change: Callable[[GGUFWriter], Any], drop: Sequence[str] = ()) -> Path:
    """The file again with what `change` writes added or in place, and without the values and tensors in `drop`."""
    header = read_header(whole)
    writer = GGUFWriter(path, str(header.values["general.architecture"]))
    for name, kept in header.values.items():
        if name not in drop and name != "general.architecture":
            (writer.add_float32 if isinstance(kept, float) else writer.add_uint32)(name, kept)  # type: ignore[arg-type]
    own = dict(writer.kv_data[0])
    writer.kv_data[0].clear()
    change(writer)
    writer.kv_data[0] = own | writer.kv_data[0]
    for name, info in header.tensors.items():
        if name not in drop and name not in writer.tensors[0]:
            data = header.bytes.array(info.start, info.n_bytes // 4, np.float32).reshape(info.shape)
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CHANGES: dict[str, tuple[Callable[[GGUFWriter], Any], str]] = {
    "an architecture that we lack": (
        lambda w: w.add_string("general.architecture", "mamba"), "allowed: gpt2, llama, phi3, qwen2, qwen3"),
    "an architecture that is no text": (
        lambda w: w.add_uint32("general.architecture", 1), "'general.architecture' should be a text, not 1"),
    "experts": (lambda w: w.add_expert_count(8), "it asks for llama.expert_count=8; it is not supported"),
    "experts a layer": (lambda w: w.add_array("llama.expert_count", [0, 8]), "it asks for llama.expert_count="),
    "no layers": (lambda w: w.add_block_count(0), "'llama.block_count' should be from 1 to"),
    "layers without end": (
        lambda w: w.add_block_count(2**32 - 1), "'llama.block_count' should be from 1 to"),
    "more layers than tensors": (lambda w: w.add_block_count(900), "describes 900 layers"),
    "one layer more": (lambda w: w.add_block_count(2), "'blk.1.attn_q.weight' is missing"),
    "a width in words": (
        lambda w: w.add_string("llama.embedding_length", "32"), "'llama.embedding_length' should be a whole number"),
    "a width without end": (lambda w: w.add_embedding_length(2**31), "describes no model: d_model"),
    "heads that do not divide": (lambda w: (w.add_head_count(3), w.add_head_count_kv(2)), "describes no model"),
    "kv heads a layer": (
        lambda w: w.add_array("llama.attention.head_count_kv", [1, 1]),
        "'llama.attention.head_count_kv' should be a whole number"),
    "values of another width": (
        lambda w: w.add_value_length(8), "it asks for values 8 wide beside keys 16 wide"),
    "an epsilon that is none": (
        lambda w: w.add_layer_norm_rms_eps(float("nan")), "_epsilon' should be a number, not nan"),
    "a scaling that we lack": (
        lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type='longrope'"),
    "part of each head turned": (
        lambda w: w.add_rope_dimension_count(8), "it asks for RoPE on 8 of 16 dimensions"),
    "factors of another number": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, np.float32)), "as F32 [5]; wanted is F32 [8]"),
    "factors of 0": (
        lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, np.float32)), "with numbers that are not above 0"),
    "long factors without short ones": (
        lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "and rope_factors_short"),
    "a tensor of another shape": (
        lambda w: w.add_tensor("blk.0.attn_k.weight", np.ones((32, 32), np.float32)),
        "'blk.0.attn_k.weight' has shape (32, 32), the model needs (16, 32)"),
    "a tensor too many": (
        lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.ones(2, np.float32)),
        "'blk.0.attn_sinks.weight' is not part of the model"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_we_lack_is_one_line(case: str, whole: Path, tmp_path: Path) -> None:
    change, words = CHANGES[case]
    path = changed(whole, tmp_path / "model.gguf", change)
    assert words in refused(path, path.read_bytes(), load_gguf)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("general.architecture", ""),
        ("llama.block_count", "'llama.block_count' is missing"),
        ("llama.attention.layer_norm_rms_epsilon", "is missing"),
        ("token_embd.weight", "a model without token_embd.weight"),
        ("blk.0.ffn_up.weight", "the files hold|'blk.0.ffn_up.weight' is missing"),
        ("blk.0.ffn_norm.weight", "the files hold|'blk.0.ffn_norm.weight' is missing"),
    ],
)
def test_what_is_missing_is_named(missing: str, words: str, whole: Path, tmp_path: Path) -> None:
    path = changed(whole, tmp_path / "model.gguf", lambda writer: None, drop=[missing])
    if missing == "general.architecture":
        path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura"))
        words = "'general.architecture' is missing"
    message = refused(path, path.read_bytes(), load_gguf)
    assert any(word in message for word in words.split("|"))


def test_a_file_that_is_cut_anywhere_is_refused(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for end in [*range(0, 2000, 97), *range(2000, len(data), 4099), len(data) - 1]:
        refused(tmp_path / "cut.gguf", data[:end], load_gguf)


def test_weights_that_are_nan_are_found_on_request(whole: Path, tmp_path: Path) -> None:
    bad = np.full((32,), np.nan, np.float32)
    path = changed(whole, tmp_path / "model.gguf", lambda writer: writer.add_tensor("output_norm.weight", bad))
    hw.load(path)
    with pytest.raises(FormatError, match=r"NaN or infinite weights, in 'stack.final_norm.weight'"):
        hw.load(path, check=True)


def test_a_spec_needs_no_weights(whole: Path, tmp_path: Path) -> None:
    """The line alone is had from a file whose tensors do not fit its model."""
    path = changed(whole, tmp_path / "model.gguf", lambda writer: None, drop=["blk.0.ffn_up.weight"])
    assert gguf_spec(path) == gguf_spec(whole)
