"""A teacher's cache on disk: what comes out is what went in, and only for the teacher and data it was made of."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_distillations import run
from torch import Tensor

from headwise.distill import store as store_module
from headwise.distill.store import StoreKey, TeacherStore
from headwise.distill.teacher import Teacher
from headwise.errors import DataError, FormatError
from headwise.io.tensors import read_tensors

LENGTHS = np.array([5, 8, 1, 8, 3, 7])
KEY = StoreKey(teacher="teacher", data="data", seq_len=8)
SHAPES = {"keys": (2, 3, 4), "hidden": (2, 6)}
ALL = range(len(LENGTHS))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for no disk, and several shards for so little."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(store_module, "_SHARD", 2000)


def signals(row: int) -> dict[str, Tensor]:
    """What the teacher makes of a window: a pure function of its number."""
    draw = torch.Generator().manual_seed(row)
    n = int(LENGTHS[row])
    return {name: torch.randn(*outer, n, width, generator=draw) for name, (*outer, width) in SHAPES.items()}


def padded(rows: list[int], name: str) -> Tensor:
    """By definition: the windows one behind the other, zeros behind their tokens."""
    *outer, width = SHAPES[name]
    out = torch.zeros(len(rows), *outer, KEY.seq_len, width)
    for place, row in enumerate(rows):
        for token in range(int(LENGTHS[row])):
            out[place, ..., token, :] = signals(row)[name][..., token, :]
    return out


def made(folder: Path, key: StoreKey = KEY, rows: Any = ALL, read: Callable[[int], Any] = signals) -> TeacherStore:
    store = TeacherStore(folder, key, LENGTHS)
    store.fill(rows, read)
    return store


def test_float32_gives_back_every_bit(tmp_path: Path) -> None:
    made(tmp_path / "cache")
    store = TeacherStore(tmp_path / "cache", KEY, LENGTHS)
    rows = [3, 0, 5, 0, 2]
    got = store.get(rows, ["keys", "hidden"])
    assert all(torch.equal(got[name], padded(rows, name)) for name in SHAPES)
    assert got["keys"].dtype == torch.float32
    assert len(store) == len(LENGTHS)


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    store = made(tmp_path / "cache", replace(KEY, dtype="bfloat16"))
    assert torch.equal(store.get(ALL, ["keys"])["keys"], padded(list(ALL), "keys").bfloat16().float())


def test_int8_errs_by_half_a_step_of_each_token_and_head(tmp_path: Path) -> None:
    store = made(tmp_path / "cache", replace(KEY, dtype="int8"))
    for name in SHAPES:
        true, got = padded(list(ALL), name), store.get(ALL, [name])[name]
        step = true.abs().amax(-1, keepdim=True) / 127
        assert bool(((got - true).abs() <= step * 0.5001).all())
        assert not torch.equal(got, true)


def test_int8_keeps_zeros(tmp_path: Path) -> None:
    def nothing(row: int) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in signals(row).items()}

    store = made(tmp_path / "cache", replace(KEY, dtype="int8"), read=nothing)
    assert not store.get(ALL, ["keys"])["keys"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_size_told_beforehand_is_that_of_the_files(tmp_path: Path, dtype: Any) -> None:
    """All but the names in the files' headers."""
    said: list[str] = []
    store = TeacherStore(tmp_path / "cache", replace(KEY, dtype=dtype), LENGTHS)
    store.fill(ALL, signals, say=said.append)
    files = list((tmp_path / "cache").glob("shard-*"))
    assert len(files) > 1 or dtype != "float32"
    size = store.size_of(ALL, SHAPES)
    assert size == sum(tensor.nbytes for file in files for tensor in read_tensors(file).values())
    assert f"{size / 1e6:.3f} MB in {dtype}" in said[0]


def test_a_disk_without_the_space_is_refused_before_the_second_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    asked: list[int] = []
    with pytest.raises(DataError, match=r"has 0\.000 MB free; use bfloat16 or int8"):
        made(tmp_path / "cache", read=lambda row: asked.append(row) or signals(row))
    assert len(asked) == 1
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_an_interrupted_filling_goes_on_behind_its_last_whole_shard(tmp_path: Path) -> None:
    def fails_at(row: int) -> dict[str, Tensor]:
        if row == 4:
            raise KeyboardInterrupt
        return signals(row)

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cache", read=fails_at)
    kept = len(TeacherStore(tmp_path / "cache", KEY, LENGTHS))
    assert 0 < kept <= 4
    asked: Counter[int] = Counter()

    def counted(row: int) -> dict[str, Tensor]:
        asked[row] += 1
        return signals(row)

    store = made(tmp_path / "cache", read=counted)
    assert asked == Counter(range(kept, len(LENGTHS)))
    assert torch.equal(store.get(ALL, ["keys"])["keys"], padded(list(ALL), "keys"))


def test_it_grows_by_the_windows_that_are_missing_and_others_see_them(tmp_path: Path) -> None:
    first = made(tmp_path / "cache", rows=[4, 1])
    assert first.missing(ALL) == [0, 2, 3, 5]
    other = TeacherStore(tmp_path / "cache", KEY, LENGTHS)
    made(tmp_path / "cache", rows=[0, 1])
    other.fill([0, 4], lambda row: pytest.fail(f"window {row} is there already"))
    assert torch.equal(other.get([0, 4], ["hidden"])["hidden"], padded([0, 4], "hidden"))
    with pytest.raises(DataError, match="does not hold window 5; fill it first"):
        other.get([5], ["keys"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "another"}, "another teacher;"),
        ({"data": "another"}, "another data set;"),
        ({"seq_len": 16}, r"another seq_len \(8, wanted is 16\)"),
        ({"dtype": "int8"}, r"another dtype \(float32, wanted is int8\)"),
    ],
)
def test_a_store_made_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    made(tmp_path / "cache")
    with pytest.raises(DataError, match=f"was made with {words}.* choose another folder"):
        TeacherStore(tmp_path / "cache", replace(KEY, **change), LENGTHS)


def test_a_store_of_other_windows_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "cache")
    with pytest.raises(DataError, match="another data set"):
        TeacherStore(tmp_path / "cache", KEY, LENGTHS[:-1])


def test_fields_it_lacks_are_named(tmp_path: Path) -> None:
    store = made(tmp_path / "cache", rows=[0])
    for ask in (
        lambda: store.get([0], ["values"]),
        lambda: TeacherStore(tmp_path / "cache", KEY, LENGTHS, ["keys", "values"]),
    ):
        with pytest.raises(DataError, match="holds keys, hidden, not values; choose another folder"):
            ask()
    assert len(TeacherStore(tmp_path / "cache", KEY, LENGTHS, ["keys"])) == 1
    assert not TeacherStore(tmp_path / "none", KEY, LENGTHS, ["values"]).shapes
    with pytest.raises(DataError, match=r"holds keys \(2, 3, 4\), hidden \(2, 6\), and wanted are keys \(2, 3, 4\);"):
        store.fill([1], lambda row: {"keys": signals(row)["keys"]})


def test_a_folder_of_something_else_and_a_damaged_shard_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds something else than a teacher cache"):
        TeacherStore(tmp_path, KEY, LENGTHS)
    made(tmp_path / "cache")
    shard = next((tmp_path / "cache").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"shard-0000\d.safetensors is damaged"):
        TeacherStore(tmp_path / "cache", KEY, LENGTHS)


def test_stores_lie_apart_by_what_they_are_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    changes: list[dict[str, Any]] = [{}, {"teacher": "b"}, {"data": "b"}, {"seq_len": 9}, {"dtype": "int8"}]
    folders = {replace(KEY, **change).folder() for change in changes}
    assert len(folders) == 5
    assert all(folder.is_relative_to(tmp_path) for folder in folders)


def test_a_run_fills_it_with_its_own_number_of_threads(
    teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number decides the order of sums: a cache filled by the process's two threads was not, to the bit, what a
    run of one thread has of its teacher."""
    seen: set[int] = set()
    read = Teacher.read

    def counted(*args: Any) -> dict[str, Tensor]:
        seen.add(torch.get_num_threads())
        return read(*args)

    monkeypatch.setattr(Teacher, "read", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(teacher, text_file, steps=1, measure_rows=0, cache_teacher=True, cache_dir=tmp_path)
    finally:
        torch.set_num_threads(before)
    assert seen == {1}
