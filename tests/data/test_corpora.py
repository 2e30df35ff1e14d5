"""Documents come out of every kind of source as they went in, and what cannot be read says so in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.data.corpora import Source, open_source, split
from headwise.errors import DataError, SettingsError


def read(data: str | Path, text_column: str = "text") -> dict[str, list[str]]:
    return {part: list(reader()) for part, reader in open_source(data, text_column).parts.items()}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def source(*texts: str) -> Source:
    return Source("made up", "", {"all": lambda: iter(texts)})


def message(data: str | Path, text_column: str = "text") -> str:
    """The one line that reading `data` ends with."""
    with pytest.raises(DataError) as caught:
        read(data, text_column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shakespeare_is_the_published_text() -> None:
    (text,) = read("shakespeare")["all"]
    assert hashlib.sha256(text.encode()).hexdigest().startswith("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86")
    assert (len(text), len(set(text))) == (1_115_394, 65)


def test_text_file_is_kept_to_the_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\n\t\U0001f600\n".encode())
    assert read(tmp_path / "a.txt") == {"all": ["é\r\n\t\U0001f600\n"]}
    (tmp_path / "notepad.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "notepad.txt") == {"all": ["hello"]}


def test_folder_holds_a_document_a_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {
        "c.txt": "3",
        "a.md": "1",
        "b/x": "2",
        ".hidden": "no",
        ".git/config": "no",
        "empty": "",
    }.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == {"all": ["1", "2", "3"]}


def test_jsonl_and_parquet_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"body": "one\n"}, {"body": None}, {"body": ""}, {"body": "zwei é", "x": 1})
    with open(file, "a") as lines:
        lines.write("\n  \n")
    assert read(file, "body") == {"all": ["one\n", "zwei é"]}
    assert read(parquet(tmp_path / "a.parquet", body=["one\n", None, "", "zwei é"]), "body") == read(file, "body")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path, "body") == {"all": ["one\n", "zwei é"] * 2}


@pytest.mark.parametrize("held_out", ["validation", "valid", "val", "test"])
def test_folder_with_a_split_keeps_it(tmp_path: Path, held_out: str) -> None:
    jsonl(tmp_path / "train-00000-of-00002.jsonl", {"text": "t0"})
    jsonl(tmp_path / "train-00001-of-00002.jsonl", {"text": "t1"})
    jsonl(tmp_path / f"{held_out}.jsonl", {"text": "v"})
    jsonl(tmp_path / "extra.jsonl", {"text": "neither"})
    assert read(tmp_path) == {"train": ["t0", "t1"], "val": ["v"]}


def test_validation_comes_before_test(tmp_path: Path) -> None:
    for part in ("train", "test", "validation"):
        (tmp_path / f"{part}.txt").write_text(part)
    assert read(tmp_path) == {"train": ["train"], "val": ["validation"]}


def test_source_tree_is_not_taken_for_a_split(tmp_path: Path) -> None:
    for name in ("train.py", "test.py", "model.py"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == {"all": ["model.py", "test.py", "train.py"]}


def test_fingerprint_follows_the_bytes_and_the_column(tmp_path: Path) -> None:
    for name, text in {"a.txt": "x", "b.txt": "x", "c.txt": "y"}.items():
        (tmp_path / name).write_text(text)
    a, b, c = (open_source(tmp_path / name).fingerprint for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c
    rows = jsonl(tmp_path / "a.jsonl", {"text": "1", "other": "2"})
    assert open_source(rows, "text").fingerprint != open_source(rows, "other").fingerprint


# --- the split -----------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=60), st.floats(0.01, 0.99), st.randoms())
def test_no_document_is_in_both_splits(texts: list[str], val_fraction: float, random: Any) -> None:
    if len(set(texts)) == 1:
        with pytest.raises(DataError, match="the same"):
            split(source(*texts), val_fraction)
        return
    corpus = split(source(*texts), val_fraction)
    parts = list(corpus.documents())
    assert [text for _, text in parts] == texts
    train, val = ({text for part, text in parts if part == wanted} for wanted in ("train", "val"))
    assert not train & val
    assert min(len(train), len(val)) >= 1
    assert corpus.n_documents == {p: sum(part == p for part, _ in parts) for p in ("train", "val")}
    assert abs(len(val) - val_fraction * len(set(texts))) <= 1
    again = random.sample(texts, len(texts))
    assert {text for part, text in split(source(*again), val_fraction).documents() if part == "val"} == val


def test_single_text_is_cut_where_nanogpt_cuts_it() -> None:
    text = "".join(map(chr, range(100, 1137)))
    corpus = split(source(text))
    assert list(corpus.documents()) == [("train", text[: int(1037 * 0.9)]), ("val", text[int(1037 * 0.9) :])]
    assert not corpus.has_boundaries


@pytest.mark.parametrize("fraction", [0, 1, -1, 2, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(SettingsError, match="between 0 and 1"):
        split(source("a", "b"), fraction)


def test_no_documents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no documents"):
        split(source())
    jsonl(tmp_path / "train.jsonl", {"text": "x"})
    jsonl(tmp_path / "val.jsonl", {"text": ""})
    with pytest.raises(DataError, match=r"the val files of .* hold no documents"):
        split(open_source(tmp_path))


# --- errors --------------------------------------------------------------------------------------------------------


def test_missing_paths_name_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    assert "did you mean 'shakespeare'?" in message("shakespear")
    assert "did you mean 'corpus.txt'?" in message(tmp_path / "corpsu.txt")
    assert "hf:owner/name" in message(tmp_path / "nothing" / "here")
    assert "cannot read" in message("a text pasted where its file's name belongs " * 20)
    assert "neither a file nor a folder" in message("/dev/null")


def test_empty_things(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert message(tmp_path / "empty.txt") == f"'{tmp_path}/empty.txt' is empty"
    assert "no files with text" in message(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "is empty" in message(tmp_path / "blank.jsonl")


def test_bad_encodings_name_the_file_and_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * 1200 + "café".encode("latin1"))
    assert re.search(r"latin.txt' is not UTF-8: byte 0xe9 at byte offset 1,203", message(file))
    file.write_bytes("hello".encode("utf-16"))
    assert "UTF-16" in message(file)
    file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert "binary" in message(file)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    assert "byte 0xff at byte offset 27" in message(rows)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("builtins.open", denied)
    assert message(tmp_path / "a.txt") == f"cannot read '{tmp_path}/a.txt': Permission denied"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "x"', "line 2 is not JSON: .* at character"),
        ("[1, 2]", "line 2 is not a JSON object but list"),
        ('{"txt": "x", "id": 1}', r"line 2 has no column 'text' \(did you mean 'txt'\?\); its columns: txt, id"),
        ('{"text": 7}', "line 2: column 'text' holds int, not text"),
        ('{"text": "a\\ud83d"}', r"line 2: the text holds half a character \(U\+D83D, at position 1\)"),
        ("[" * 100_000, "line 2 is not read: its brackets"),
    ],
)
def test_bad_json_lines_are_named_by_number(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert re.search(complaint, message(tmp_path / "a.jsonl"))


def test_bad_parquet(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", content=["x"], label=[3])
    assert re.search(
        r"no column 'contents' \(did you mean 'content'\?\); its columns: content, label", message(file, "contents")
    )
    assert "row 1: column 'label' holds int" in message(file, "label")
    file.write_bytes(file.read_bytes()[:-9])
    assert "not a readable Parquet file" in message(file)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install headwise[parquet]" in message(file)


# --- Hugging Face data sets, through a stand-in for the few calls of the library that are used here ----------------


class Table:
    def __init__(self, **columns: list[Any]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> Table:
        return Table(**{name: self.columns[name] for name in names})

    def iter(self, batch_size: int) -> Any:
        for i in range(0, len(next(iter(self.columns.values()))), batch_size):
            yield {name: values[i : i + batch_size] for name, values in self.columns.items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None], dict[str, Table]]:
    sets: dict[tuple[str, str | None], dict[str, Table]] = {}

    def load_dataset(name: str, config: str | None) -> dict[str, Table]:
        if (name, config) not in sets:
            raise ConnectionError("Couldn't reach the Hub\nmore lines")
        return sets[name, config]

    module = ModuleType("datasets")
    module.__dict__.update(SimpleNamespace(load_dataset=load_dataset).__dict__)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return sets


def test_hugging_face_splits_and_configs(hub: dict[tuple[str, str | None], dict[str, Table]]) -> None:
    many = [f"row {i}" for i in range(3000)]
    hub["me/tales", None] = {"train": Table(text=[*many, None, ""], id=[0] * 3002)}
    hub["me/tales", "small"] = {"test": Table(text=["t"]), "train": Table(text=["a"]), "validation": Table(text=["v"])}
    assert read("hf:me/tales") == {"all": many}
    assert read("hf:me/tales:small") == {"train": ["a"], "val": ["v"]}
    assert open_source("hf:me/tales").name == "tales"
    before = open_source("hf:me/tales:small").fingerprint
    hub["me/tales", "small"]["train"] = Table(text=["b"])
    assert open_source("hf:me/tales:small").fingerprint != before


def test_hugging_face_errors(
    hub: dict[tuple[str, str | None], dict[str, Table]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub["me/tales", None] = {"train": Table(content=["x"])}
    assert "did you mean 'content'?" in message("hf:me/tales", "contents")
    assert "'hf:' names no data set" in message("hf:")
    assert "Couldn't reach the Hub; check the name and the network" in message("hf:me/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install headwise[hf]" in message("hf:me/tales")
