"""Tokenizers of published models: which tokens begin and end a text, whatever file says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import processors

from headwise.data import load_tokenizer
from headwise.data.tokenizers import Tokenizer, train_bpe
from headwise.errors import DataError

TEXT = "If music be the food of love, play on. " * 20
NAMES = ("<s>", "</s>", "<|eot|>", "<pad>")


def published(folder: Path, *, begins: bool = False, **files: Any) -> Rust:
    """A Hugging Face folder with a byte-level BPE of a few tokens and NAMES; `files` are its JSON files."""
    rust = train_bpe([TEXT], 300).rust
    rust.add_special_tokens(list(NAMES))
    if begins:
        rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", id_of(rust)[0])])
    rust.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return rust


def id_of(rust: Rust) -> list[int]:
    return [rust.token_to_id(name) for name in NAMES]


def same(one: Tokenizer, other: Tokenizer) -> None:
    for name in ("eos_id", "eos_ids", "begin_ids", "chat_template", "special_tokens", "special_ids", "vocab_size"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.encode("music <s>", special=True).tolist() == other.encode("music <s>", special=True).tolist()


def test_the_tokenizers_own_files_name_its_special_tokens(tmp_path: Path) -> None:
    bos, eos, _, pad = id_of(
        published(
            tmp_path,
            tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
        )
    )
    found = load_tokenizer(tmp_path)
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert found.special_ids == {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    assert (found.eos_id, found.eos_ids, found.begin_ids, found.chat_template) == (eos, (eos,), (), None)


def test_the_models_files_name_more_tokens_that_end_a_text(tmp_path: Path) -> None:
    ids = published(
        tmp_path, tokenizer_config={"eos_token": "<|eot|>"}, generation_config={}, config={"bos_token_id": 10**6}
    )
    _, eos, turn, pad = id_of(ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, turn], "pad_token_id": pad}))
    found = load_tokenizer(tmp_path)
    assert found.eos_ids == (turn, eos)
    assert found.special_ids == {"eos_token_id": [turn, eos], "pad_token_id": pad}  # no bos: its id is no token
    found.save(tmp_path)
    same(load_tokenizer(tmp_path), found)


@pytest.mark.parametrize(
    ("begins", "add", "wanted"),
    [(True, None, True), (True, False, False), (False, True, True), (False, None, False)],
)
def test_what_stands_before_a_text(begins: bool, add: bool | None, wanted: bool, tmp_path: Path) -> None:
    config = {"bos_token": "<s>"} | ({} if add is None else {"add_bos_token": add})
    bos = id_of(published(tmp_path, begins=begins, tokenizer_config=config))[0]
    found = load_tokenizer(tmp_path)
    assert found.begin_ids == ((bos,) if wanted else ())
    assert bos not in found.encode("music").tolist()
    found.save(tmp_path / "again")
    same(load_tokenizer(tmp_path / "again"), found)


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_a_chat_template_is_kept_wherever_it_stands(form: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": template}]
    config = {"text": {"chat_template": template}, "list": {"chat_template": several}, "file": {}}[form]
    published(tmp_path, tokenizer_config=config)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    found = load_tokenizer(tmp_path)
    assert found.chat_template == template
    found.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == template


def test_a_models_folder_of_ours_holds_it_in_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    published(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).state() == load_tokenizer(tmp_path / "tokenizer").state()


def test_damaged_files_are_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    published(tmp_path, generation_config=[])
    with pytest.raises(DataError, match=r"generation_config.json' holds no JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"is not a readable tokenizer.json"):
        load_tokenizer(tmp_path)
