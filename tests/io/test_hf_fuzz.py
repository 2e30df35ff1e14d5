"""Files that are damaged, or written to do harm: each is read or is a FormatError, soon and in little space.

Time is the process's own, so that other programs do not count; space is what Python allocates, traced, and over the
whole test what the process ever held. Beside twice the file an interpreter needs some memory of its own: FLOOR.
"""

from __future__ import annotations

import json
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import AutoConfig

import headwise as hw
from headwise.errors import FormatError
from headwise.io.hf import families
from headwise.io.hf.export import save_hf
from headwise.io.hf.folder import read_folder
from headwise.io.pretrained import saved_spec
from headwise.io.tensors import read_tensors

SECONDS, FLOOR = 1.0, 4 << 20
SEEDS = st.integers(0, 2**32)
LINE = "llama(d_model=16, n_layers=2, n_heads=2, vocab_size=17, max_seq_len=32)"


def accepted(read: Callable[[], Any], size: int) -> str | None:
    """None where it reads; the message of the FormatError otherwise. Anything else, or too much, is a failure."""
    tracemalloc.start()
    started = time.process_time()
    try:
        read()
        message = None
    except FormatError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 2000
    finally:
        seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert seconds < SECONDS
    assert peak <= 2 * size + FLOOR
    return message


@contextmanager
def bounded() -> Iterator[None]:
    """The process no larger in the end than by a little, whatever was not Python's to allocate."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB, over thousands of files


def put(file: Path, data: bytes) -> None:
    """Write over what the file holds; emptying it first would have the disk wait for each."""
    file.touch()
    with file.open("r+b") as opened:
        opened.write(data)
        opened.truncate()


# ---- safetensors ----


@cache
def whole() -> bytes:
    """A sound file of a few tensors."""
    tensors = {f"layer.{n}.weight": torch.arange(12.0).reshape(3, 4) + n for n in range(3)}
    return save({**tensors, "scale": torch.tensor(2.0), "ids": torch.arange(5), "half": torch.ones(2, 2).bfloat16()})


def with_header(header: bytes, length: int | None = None) -> bytes:
    n = int.from_bytes(whole()[:8], "little")
    return (len(header) if length is None else length).to_bytes(8, "little") + header + whole()[8 + n :]


ODD: list[Any] = [
    *(0, 1, -1, 3, 4, 12, 2**31, 2**53, 2**62, 2**63, 2**64, 10**400, 1.5, -0.5, 1e308, 1e-308, float("nan")),
    *(None, True, False, "", "F32", "F4", "I64", "BOOL", "\ud800", "yarn", "gelu", "x" * 5000, [], {}, [[]], [0] * 20),
]


def odd(dice: Random, depth: int = 2) -> Any:
    """Some JSON value."""
    if not depth or dice.random() < 0.6:
        return dice.choice(ODD)
    inner = [odd(dice, depth - 1) for _ in range(dice.randrange(5))]
    return inner if dice.random() < 0.5 else {str(dice.choice(ODD)): value for value in inner}


def damaged_safetensors(dice: Random) -> bytes:
    """A sound file, somehow damaged."""
    data = whole()
    n = int.from_bytes(data[:8], "little")
    match dice.randrange(6):
        case 0:
            return data[: dice.randrange(len(data))]
        case 1:
            changed = bytearray(data)
            for _ in range(dice.randint(1, 8)):
                changed[dice.randrange(dice.choice([8, 8 + n, len(data)]))] = dice.randrange(256)
            return bytes(changed)
        case 2:
            return with_header(data[8 : 8 + n], dice.choice([dice.randrange(2 * len(data)), dice.getrandbits(64)]))
        case 3:
            return with_header(json.dumps(odd(dice)).encode())
        case 4:
            header = json.loads(data[8 : 8 + n])
            for _ in range(dice.randint(1, 3)):
                entry = header[dice.choice(sorted(header))]
                entry[dice.choice(["dtype", "shape", "data_offsets"])] = odd(dice)
            return with_header(json.dumps(header).encode())
    return dice.randbytes(dice.randrange(64))


def test_no_safetensors_file_does_harm(tmp_path: Path) -> None:
    file, messages = tmp_path / "model.safetensors", set()

    @settings(max_examples=2000)
    @given(SEEDS)
    def one(seed: int) -> None:
        data = damaged_safetensors(Random(seed))
        put(file, data)

        def read() -> None:
            for tensor in read_tensors(file).values():
                tensor.clone()  # every byte of it is there

        messages.add((accepted(read, len(data)) or "sound").partition(":")[2][:30])

    with bounded():
        one()
    assert len(messages) > 20  # faults of many kinds were met


def big(entry: str, size: int) -> bytes:
    """A header of about `size` bytes that is one entry over and over, and no tensors."""
    header = ("{" + ",".join(entry.replace("#", str(n)) for n in range(size // len(entry))) + "}").encode()
    return len(header).to_bytes(8, "little") + header


HARMFUL = {
    "a header that fills memory": (2**63).to_bytes(8, "little") + b"{}",
    "many empty tensors": big('"#":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', 8 << 20),
    "many empty lists": big('"#":[[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[],[]]', 8 << 20),
    "deep": (4 << 20).to_bytes(8, "little") + b"[" * (4 << 20),
    "deep, few": (9000).to_bytes(8, "little") + b"[" * 9000,
    "a long number": big('"#":' + "9" * 100_000, 300_000),
    "names twice": big('"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', 200),
    "a shape of many": big('"#":{"dtype":"F32","shape":[' + "9," * 999 + '9],"data_offsets":[0,0]}', 9000),
    "overlapping": with_header(
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}'
    ),
    "beyond the end": with_header(b'{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}'),
    "metadata of numbers": with_header(b'{"__metadata__":{"a":1}}'),
    "no UTF-8": with_header(b'{"\xff":1}'),
}


@pytest.mark.parametrize("how", HARMFUL)
def test_harmful_headers_are_refused_unread(how: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HARMFUL[how])
    with bounded():
        assert accepted(lambda: read_tensors(file), len(HARMFUL[how])) is not None


# ---- config.json and the index ----


@cache
def known_configs() -> dict[str, dict[str, Any]]:
    """A published model's config of each family, as transformers writes it."""
    return {name: AutoConfig.for_model(name).to_dict() for name in families()}


def damaged_config(dice: Random) -> str:
    """A sound config with some values gone or odd, or any JSON, or text cut anywhere."""
    config = dict(known_configs()[dice.choice(sorted(known_configs()))])
    for name in dice.sample(sorted(config), dice.randint(1, 4)):
        if dice.random() < 0.3:
            del config[name]
        else:
            config[name] = odd(dice)
    if isinstance(config.get("rope_parameters"), dict) and dice.random() < 0.3:
        kind = dice.choice(["linear", "dynamic", "yarn", "llama3", "longrope", "ntk"])
        names = ["factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "long_factor"]
        config["rope_parameters"] = {"rope_type": kind, **{name: odd(dice) for name in names if dice.random() < 0.8}}
    if dice.random() < 0.05:
        return json.dumps(odd(dice))
    text = json.dumps(config)
    return text if dice.random() < 0.95 else text[: dice.randrange(len(text))]


def test_no_config_does_harm(tmp_path: Path) -> None:
    messages = set()

    @settings(max_examples=2000)
    @given(SEEDS)
    def one(seed: int) -> None:
        text = damaged_config(Random(seed))
        put(tmp_path / "config.json", text.encode())
        messages.add((accepted(lambda: saved_spec(tmp_path), len(text)) or "sound").partition(":")[2][:30])

    known_configs()
    with bounded():
        one()
    assert len(messages) > 100


def test_no_config_does_harm_beside_weights(tmp_path: Path) -> None:
    """What a config asks for is held against the files before anything of its size is made."""
    save_hf(hw.build(LINE), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = [name for name, value in config.items() if type(value) is int]

    @settings(max_examples=300)
    @given(SEEDS)
    def one(seed: int) -> None:
        dice = Random(seed)
        values = [dice.randrange(40), 10**3, 10**4, 10**6, 10**9]
        changes = {name: dice.choice(values) for name in dice.sample(sizes, dice.randint(1, 3))}
        put(tmp_path / "config.json", json.dumps({**config, **changes}).encode())
        accepted(lambda: hw.load(tmp_path), 20_000)

    with bounded():
        one()


def test_no_index_does_harm(tmp_path: Path) -> None:
    names = ["a.safetensors", "b.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(save({f"{name[0]}.weight": torch.ones(3)}))
    shards = [*names, "c.safetensors", "../a.safetensors", "/a.safetensors", "a\0.safetensors", "a.bin"]

    @settings(max_examples=500)
    @given(SEEDS)
    def one(seed: int) -> None:
        dice = Random(seed)
        keys = ["a.weight", "b.weight", str(dice.choice(ODD))]
        places = {key: dice.choice([*shards, odd(dice)]) for key in dice.sample(keys, dice.randint(0, 3))}
        text = json.dumps({"weight_map": places} if dice.random() < 0.8 else odd(dice))
        if dice.random() < 0.1:
            text = text[: dice.randrange(len(text) + 1)]
        put(tmp_path / "model.safetensors.index.json", text.encode())
        accepted(lambda: read_folder(tmp_path), len(text))

    with bounded():
        one()


@pytest.mark.parametrize(
    "text",
    ["[" * (1 << 19), "[" * 9000, '{"a":' * 5000, "[[]," * 100_000, "9" * 5000, " " * (1 << 20), "[1e999, NaN]", "\0"],
    ids=["deep", "deep, few", "deep objects", "many", "long number", "large", "no JSON numbers", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_harmful_json_is_refused_unread(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with bounded():
        read = saved_spec if name == "config.json" else read_folder
        assert accepted(lambda: read(tmp_path), len(text)) is not None
