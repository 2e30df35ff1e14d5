"""Numbers out of every quantised type: the library's own reading of the whole tensor, transformers' of the same blocks,
and what was quantised, as near as the type comes.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from converted import Type, convert
from gguf import GGML_QUANT_SIZES, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray
from published_models import published
from transformers.integrations.gguf import dequant as peer

from headwise.errors import FormatError
from headwise.io.gguf import load_gguf
from headwise.io.gguf.header import read_header
from headwise.io.gguf.tensors import check_types, file_dtype, read_tensor, readable

READABLE = [kind for kind in Type if readable(kind)]
# How far from what was quantised, as a share of its size: 4.x bits 0.1, 5.x 0.05, 8.5 0.01; the ternary ones are crude.
NEAR = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 0.01, "Q5_0": 0.06, "Q5_1": 0.06, "Q4_0": 0.12, "Q4_1": 0.12}
NEAR |= {"MXFP4": 0.15, "TQ1_0": 0.85, "TQ2_0": 0.85}


def write(path: Path, blocks: NDArray[np.uint8], kind: Type) -> Path:
    """A file with one tensor `x` of rows of blocks."""
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def any_blocks(kind: Type, rows: int, width: int) -> NDArray[np.uint8]:
    """Blocks of random bits, with scales that are finite: their high byte is that of a small half."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(int(kind)).integers(0, 256, (rows, width // per_block, block_bytes), np.uint8)
    return (blocks & 0x3F).reshape(rows, -1) if kind != Type.IQ1_M else (blocks & 0x37).reshape(rows, -1)


def test_the_types_of_llama_cpp_are_read() -> None:
    assert len(READABLE) >= 26


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_a_tensor_is_what_the_library_and_transformers_read(kind: Type, tmp_path: Path) -> None:
    rows, width = 67, 512 * 17  # more than is taken apart at once, and no multiple of it
    if kind.name in ("F32", "F16", "BF16"):
        blocks = quantize(np.random.default_rng(0).standard_normal((rows, width), np.float32), kind)
        blocks = blocks.view(np.uint8)
    else:
        blocks = any_blocks(kind, rows, width)
    header = read_header(write(tmp_path / "x.gguf", blocks, kind))
    info = header.tensors["x"]
    assert info.shape == (rows, width)
    ours = read_tensor(header, info, torch.float32)
    assert torch.equal(ours, torch.from_numpy(np.array(dequantize(blocks, kind))))
    assert ours.isfinite().all()
    assert ours.std() > 0
    assert torch.equal(read_tensor(header, info, torch.bfloat16), ours.bfloat16())
    if int(kind) in peer.GGML_BLOCK:
        theirs = peer.dequantize(torch.from_numpy(blocks), int(kind)).view(rows, width)
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("name", NEAR)
def test_what_was_quantised_comes_back_nearly(name: str, tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((5, 512), np.float32)
    blocks = quantize(values, Type[name])
    header = read_header(write(tmp_path / "x.gguf", blocks.view(np.uint8), Type[name]))
    ours = read_tensor(header, header.tensors["x"], torch.float32).numpy()
    error = np.linalg.norm(ours - values) / np.linalg.norm(values)
    assert error <= NEAR[name]
    assert (error > 0) == (name != "F32")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, torch.float32), (Type.F16, torch.float16), (Type.BF16, torch.bfloat16), (Type.Q8_0, torch.float32)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_model_has_the_dtype_of_its_file_unless_another_is_asked_for(
    kind: Type, dtype: torch.dtype, tmp_path: Path
) -> None:
    widths = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    path = convert(published("qwen2", **widths, num_key_value_heads=1), tmp_path / "model.gguf", kind)
    assert file_dtype(read_header(path)) == dtype
    assert {parameter.dtype for parameter in load_gguf(path).parameters()} == {dtype}
    assert {parameter.dtype for parameter in load_gguf(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_type_that_cannot_be_read_is_named_with_those_that_can(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x.gguf", any_blocks(Type.Q8_K, 1, 256), Type.Q8_K))
    with pytest.raises(FormatError, match=r"'x' is of type Q8_K; supported: F32, F16, .*Q4_K") as failure:
        check_types(header)
    assert "\n" not in str(failure.value)
    assert not re.search(r"supported:.*Q8_K", str(failure.value))
