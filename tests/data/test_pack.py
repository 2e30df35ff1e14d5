"""Packed tokens are the text and nothing else, on disk once, whatever is killed, damaged or run at the same time."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Rust

from headwise.data import pack
from headwise.data.corpora import Source
from headwise.data.pack import Dataset, Tokens, default_cache_dir, load_dataset, token_dtype
from headwise.data.tokenizers import ByteTokenizer, CharTokenizer, RustBackedTokenizer, Tokenizer
from headwise.errors import DataError


def write_documents(folder: Path, *texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def without_eos() -> Tokenizer:
    rust = Rust(models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    rust.normalizer = normalizers.Replace("z", "")
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    rust.decoder = decoders.Fuse()
    return RustBackedTokenizer(rust, "hf", None, {})


def documents_of(tokens: Tokens, tokenizer: Tokenizer) -> list[str]:
    """The texts of a split, cut where its segments begin."""
    starts = [0] if tokens.starts is None else tokens.starts.tolist()
    ends = [*starts[1:], len(tokens)]
    return [tokenizer.decode(tokens.array[a:b]) for a, b in zip(starts, ends)]


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "packed").iterdir())


def test_shakespeare_is_nanogpts() -> None:
    dataset = load_dataset()
    assert (dataset.tokenizer.vocab_size, len(dataset.train), len(dataset.val)) == (65, 1_003_854, 111_540)
    assert dataset.tokenizer.eos_id is None
    assert dataset.train.array.dtype == np.uint16
    assert isinstance(dataset.train.array, np.memmap)
    assert not dataset.train.array.flags.writeable
    assert dataset.val.n_bytes == 111_540
    assert (dataset.val.n_documents, dataset.val.starts, dataset.val.n_targets) == (1, None, 111_539)
    text = dataset.tokenizer.decode(dataset.train.array) + dataset.tokenizer.decode(dataset.val.array)
    assert text.startswith("First Citizen:\nBefore we proceed")
    assert len(text) == 1_115_394


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_one_text_is_packed_bare(tmp_path: Path, tokenizer: str) -> None:
    text = "".join(f"Line {i} of a text, with é and \U0001f600.\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    dataset = load_dataset(tmp_path / "a.txt", tokenizer)
    train, val = (dataset.tokenizer.decode(tokens.array) for tokens in (dataset.train, dataset.val))
    assert (train, val) == (text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :])
    assert dataset.val.n_bytes == len(val.encode())
    for tokens, part in ((dataset.train, train), (dataset.val, val)):
        assert tokens.array.tolist() == dataset.tokenizer.encode(part).tolist()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text("abc", min_size=2, max_size=9), min_size=3, max_size=20, unique=True),
    kind=st.sampled_from(["char", "byte", "bpe:258", "no eos"]),
)
def test_documents_come_back_each_once(tmp_path_factory: pytest.TempPathFactory, texts: list[str], kind: str) -> None:
    folder = write_documents(tmp_path_factory.mktemp("documents"), *texts)
    dataset = load_dataset(folder, without_eos() if kind == "no eos" else kind, val_fraction=0.4)
    tokenizer = dataset.tokenizer
    train, val = (documents_of(tokens, tokenizer) for tokens in (dataset.train, dataset.val))
    assert sorted(train + val) == sorted(texts)
    for tokens, documents in ((dataset.train, train), (dataset.val, val)):
        assert tokens.n_documents == len(documents)
        assert tokens.n_bytes == sum(map(len, documents))
        assert tokens.separated == (kind != "no eos")
        eos = [tokenizer.eos_id] if tokens.separated else []
        expected = eos + [i for text in documents for i in [*tokenizer.encode(text).tolist(), *eos]]
        assert tokens.array.tolist() == expected
        if tokens.starts is not None and tokens.separated:
            assert set(tokens.array[tokens.starts].tolist()) == set(eos)


def test_documents_that_the_tokenizer_drops_are_none(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "d", "ab", "abc", "zz", "bca", "caa")
    (folder / "train.jsonl").write_text((folder / "all.jsonl").read_text())
    (folder / "all.jsonl").rename(folder / "val.jsonl")
    dataset = load_dataset(folder, without_eos())
    assert (dataset.val.n_documents, documents_of(dataset.val, dataset.tokenizer)) == (4, ["ab", "abc", "bca", "caa"])
    assert dataset.val.n_bytes == 11


def test_bits_per_byte_undoes_a_uniform_guess() -> None:
    """Guessing all V ids alike costs ln V nats a target; a byte model's targets are the bytes but the first."""
    dataset = load_dataset("shakespeare", "byte")
    nats = dataset.val.n_targets * math.log(256)
    assert dataset.val.bits_per_byte(nats) == pytest.approx(8 * 111_539 / 111_540, rel=1e-12)
    assert dataset.bits_per_byte_factor * math.log(256) == pytest.approx(dataset.val.bits_per_byte(nats), rel=1e-12)


def test_one_document_a_split_needs_no_separators(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / f"{part}.txt").write_text(f"the {part} text")
    dataset = load_dataset(tmp_path)
    assert dataset.tokenizer.eos_id is None
    assert [documents_of(t, dataset.tokenizer) for t in (dataset.train, dataset.val)] == [
        ["the train text"],
        ["the val text"],
    ]


# --- token types ---------------------------------------------------------------------------------------------------


def test_token_type_is_the_smallest_that_holds_the_vocabulary() -> None:
    assert [token_dtype(n).name for n in (1, 65_536, 65_537, 2**32)] == ["uint16", "uint16", "uint32", "uint32"]
    with pytest.raises(DataError, match="vocabulary of 4,294,967,297 ids does not fit the largest token type"):
        token_dtype(2**32 + 1)


class Wide(ByteTokenizer):
    """Bytes, moved up to the end of a large vocabulary."""

    def __init__(self, vocab_size: int, claimed: int) -> None:
        super().__init__()
        self.vocab_size, self.shift = claimed, vocab_size - 256

    def encode(self, text: str, *, special: bool = False) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return super().encode(text) + self.shift


def test_large_vocabulary_is_packed_in_32_bits() -> None:
    source = Source("made up", "", {"all": lambda: iter(["0123456789" * 3])})
    tokenizer = Wide(100_000, claimed=100_000)
    folder = default_cache_dir() / "wide"
    pack._build(folder, source, pack.TokenizerPlan("wide", lambda corpus: tokenizer), "f", 0.1, False)
    dataset = pack._open(folder, "made up", "f")
    assert dataset is not None
    assert dataset.val.array.dtype == np.uint32
    assert dataset.val.array.tolist() == [ord(c) + 100_000 - 256 for c in "789"]


def test_ids_beyond_the_vocabulary_are_not_wrapped_round() -> None:
    with pytest.raises(DataError, match="gave id 99801, beyond its 60,000 ids"):
        load_dataset("shakespeare", Wide(99_935, claimed=60_000))


# --- the cache -----------------------------------------------------------------------------------------------------


def test_second_call_reads_the_cache_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset()

    def built(*args: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(pack, "_build", built)
    second = load_dataset()
    assert (second.fingerprint, second.name) == (first.fingerprint, "shakespeare")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert np.array_equal(second.train.array, first.train.array)


def test_other_data_split_or_tokenizer_is_another_cache(tmp_path: Path, cache: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text" * 20 + ("" if name == "a.txt" else "!"))
    found = [
        load_dataset(tmp_path / "a.txt", "char"),
        load_dataset(tmp_path / "b.txt", "char"),
        load_dataset(tmp_path / "a.txt", "byte"),
        load_dataset(tmp_path / "a.txt", "bpe:260"),
        load_dataset(tmp_path / "a.txt", "bpe:261"),
        load_dataset(tmp_path / "a.txt", "char", val_fraction=0.2),
        load_dataset(tmp_path / "a.txt", without_eos(), val_fraction=0.3),
    ]
    assert len({dataset.fingerprint for dataset in found}) == len(folders(cache)) == len(found)
    (tmp_path / "a.txt").rename(tmp_path / "moved.txt")
    assert load_dataset(tmp_path / "moved.txt", "char").fingerprint == found[0].fingerprint


def contents(dataset: Dataset) -> tuple[bytes, bytes, list[int], str]:
    assert dataset.train.starts is not None
    return (
        dataset.train.array.tobytes(),
        dataset.val.array.tobytes(),
        dataset.train.starts.tolist(),
        dataset.tokenizer.fingerprint,
    )


@pytest.mark.parametrize("damage", ["truncate", "flip", "grow", "remove", "empty"])
def test_damaged_caches_are_built_again(tmp_path: Path, cache: Path, damage: str) -> None:
    folder = write_documents(tmp_path / "d", *(f"document {i}" for i in range(30)))
    sound = contents(load_dataset(folder, "bpe:300"))
    (packed,) = folders(cache)
    files = [path for path in sorted(packed.rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {
        "header.json",
        "train.bin",
        "train.starts.bin",
        "val.bin",
        "tokenizer.json",
    }
    for path in files:
        data = path.read_bytes()
        match damage:
            case "truncate":
                path.write_bytes(data[:-1])
            case "flip":
                path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
            case "grow":
                path.write_bytes(data + b"\0\0")
            case "remove":
                path.unlink()
            case "empty":
                path.write_bytes(b"")
        assert contents(load_dataset(folder, "bpe:300")) == sound, path
        if path.name != "header.json":
            assert path.read_bytes() == data


@pytest.mark.parametrize(
    "header", ["[]", "7", '{"format": 1}', '{"format": 0, "fingerprint": "", "files": {}}', "\xff"]
)
def test_nonsense_for_a_header_is_built_again(cache: Path, header: str) -> None:
    length = len(load_dataset().train)
    (folders(cache)[0] / "header.json").write_bytes(header.encode("latin1"))
    assert len(load_dataset().train) == length
    assert len(folders(cache)) == 1


RACER = """
import hashlib, sys
from headwise.data import load_dataset
data, tokenizer = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
dataset = load_dataset(data, tokenizer)
tokens = dataset.train.array.tobytes() + dataset.val.array.tobytes()
print(hashlib.sha256(tokens).hexdigest(), dataset.tokenizer.fingerprint)
"""


@pytest.mark.usefixtures("warm_python")
@pytest.mark.parametrize("damaged", [False, True])
def test_racing_processes_all_get_the_data(tmp_path: Path, cache: Path, damaged: bool) -> None:
    folder = write_documents(tmp_path / "d", *(f"document number {i}" * 20 for i in range(300)))
    if damaged:
        load_dataset(folder, "bpe:300")
        (folders(cache)[0] / "val.bin").write_bytes(b"")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(folder), "bpe:300"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, results
    assert len({output for output, _ in results}) == 1
    assert len(list((cache / "packed").iterdir())) == 1


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert default_cache_dir() == cache
    monkeypatch.delenv("HEADWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "headwise"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "headwise"
    load_dataset(cache_dir=tmp_path / "mine")
    assert len(folders(tmp_path / "mine")) == 1
    assert not (tmp_path / "home").exists()


# --- errors --------------------------------------------------------------------------------------------------------


def test_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device; free some space.*set HEADWISE_CACHE") as caught:
        load_dataset()
    assert "\n" not in str(caught.value)
    assert folders(cache) == []


def test_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*HEADWISE_CACHE"):
        load_dataset(cache_dir=tmp_path / "cache")


def test_failure_while_packing_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    folder = write_documents(tmp_path / "d", "ab", "ba", "abc")
    with pytest.raises(DataError, match="the character 'c'"):
        load_dataset(folder, CharTokenizer("ab"))
    assert folders(cache) == []


@pytest.mark.parametrize("text", ["x", "12345678"])
def test_too_short_to_split(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(
        DataError, match=r"is too short: its .* split has [01] tokens and nothing to predict; give more"
    ):
        load_dataset(tmp_path / "a.txt")


def test_other_text_with_a_finished_tokenizer_names_its_unknown_character(tmp_path: Path) -> None:
    load_dataset().tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("Plain at first, then a €." * 10)
    with pytest.raises(DataError, match="the character '€'"):
        load_dataset(tmp_path / "a.txt", tmp_path / "tokenizer")
    (tmp_path / "b.txt").write_text("Plain all through." * 10)
    assert load_dataset(tmp_path / "b.txt", tmp_path / "tokenizer").tokenizer.vocab_size == 65


def test_progress_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    load_dataset(progress=True)
    assert capfd.readouterr().out == ""
