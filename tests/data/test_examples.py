"""Examples in windows: each token but an example's first is predicted once an epoch, and a window stays what it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data import IGNORE, Batch, Examples, ExampleSet, WindowBatches, Windows, eval_windows, load_examples
from headwise.data.tokenizers import ByteTokenizer, RustBackedTokenizer, train_bpe
from headwise.errors import DataError, SettingsError

NAMES = ("prompt", "reasoning", "answer")


def counting(lengths: list[int]) -> ExampleSet:
    """A split whose tokens are 0, 1, 2, …, their parts 0, 1, 2, 0, …"""
    stops = np.cumsum(np.array(lengths, dtype=np.int64))
    n = int(stops[-1])
    parts = (np.arange(n) % 3).astype(np.uint8)
    return ExampleSet("the split", np.arange(n, dtype=np.uint16), parts, stops - lengths, stops, n, NAMES)


def seen(batches: list[Batch]) -> Counter[int]:
    return Counter(i for batch in batches for i in batch.targets[batch.targets != IGNORE].tolist())


SPLITS = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=60)
@given(lengths=SPLITS, seq_len=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(-5, 2**70))
def test_an_epoch_predicts_every_token_but_an_examples_first_once(
    lengths: list[int], seq_len: int, batch_size: int, seed: int
) -> None:
    split = counting(lengths)
    predicted = Counter(i for a, b in zip(split.starts, split.stops) for i in range(a + 1, b))
    assert seen(list(eval_windows(split, batch_size, seq_len))) == predicted
    assert split.n_targets == len(predicted)
    batches = WindowBatches(split, 1, seq_len, seed)
    n = len(batches.windows)
    for epoch in (0, 1, 5):
        steps = [batches.batch(step) for step in range(epoch * n, (epoch + 1) * n)]
        assert seen(steps) == predicted
        assert sorted(int(batch.rows[0]) for batch in steps) == list(range(n))
    several = WindowBatches(split, batch_size, seq_len, seed)
    one_by_one = [batches.rows(step)[0] for step in range(3 * batch_size)]
    assert [row for step in range(3) for row in several.rows(step)] == one_by_one
    assert several.rows_of(3).tolist() == sorted(set(one_by_one))


@settings(max_examples=60)
@given(lengths=SPLITS, seq_len=st.integers(1, 12))
def test_a_window_is_its_tokens_their_parts_and_padding(lengths: list[int], seq_len: int) -> None:
    """By definition, place by place; every target is the token after the input, of the same example."""
    split = counting(lengths)
    windows = Windows(split, seq_len)
    batch = windows.batch(range(len(windows)))
    assert batch.ids.dtype == batch.targets.dtype == batch.parts.dtype == batch.rows.dtype == torch.int64
    assert batch.rows.tolist() == list(range(len(windows)))
    padded = False
    for row, length in enumerate(windows.lengths.tolist()):
        for t in range(seq_len):
            i = int(batch.ids[row, t])
            found = (i, *(int(x[row, t]) for x in (batch.targets, batch.parts, batch.target_parts)))
            segment = 0 if batch.segments is None else int(batch.segments[row, t])
            if t < length:
                assert (*found, segment) == (i, i + 1, i % 3, (i + 1) % 3, 0)
                assert i == windows.starts[row] + t
                assert not (split.stops == i + 1).any()
            else:
                assert (*found, segment) == (0, IGNORE, -1, -1, 1)
                padded = True
    assert padded == (batch.segments is not None)
    assert windows.n_inputs == split.n_targets


def test_a_batch_is_a_function_of_seed_and_step_alone_and_moves_as_one() -> None:
    split = counting([9, 17, 5, 30])
    one, other = WindowBatches(split, 3, 4, seed=1), WindowBatches(split, 3, 4, seed=2)
    again = WindowBatches(split, 3, 4, seed=1)
    again.batch(9)
    assert all(torch.equal(one.batch(7).ids, again.batch(7).to("cpu").ids) for _ in range(2))
    assert [one.rows(s).tolist() for s in range(9)] != [other.rows(s).tolist() for s in range(9)]
    n = len(one.windows)
    whole = WindowBatches(split, n, 4, seed=1)
    assert whole.rows(0).tolist() != whole.rows(1).tolist(), "every epoch has an order of its own"
    moved = one.batch(0).to("meta")
    assert {t.device.type for t in vars(moved).values() if t is not None} == {"meta"}


def test_a_loss_on_the_completion_asks_for_no_prompt() -> None:
    split = counting([10, 4])
    everything, completion = (Windows(split, 6, loss_on).batch(range(3)) for loss_on in ("all", "completion"))
    prompt = everything.target_parts == 0
    assert torch.equal(completion.targets, everything.targets.masked_fill(prompt, IGNORE))
    assert torch.equal(completion.ids, everything.ids)


def test_sizes_and_splits_that_make_no_window_are_refused() -> None:
    split = counting([5])
    for make, words in (
        (lambda: Windows(split, 0), "seq_len is 0"),
        (lambda: WindowBatches(split, 0, 4), "batch_size is 0"),
    ):
        with pytest.raises(SettingsError, match=words):
            make()
    with pytest.raises(DataError, match="the split has no example of two tokens"):
        Windows(counting([1, 1]), 4)
    with pytest.raises(DataError, match=r"loss_on completion: the parts of shakespeare .* are text, and all would be"):
        Windows(load_examples().val, 64, "completion")
    with pytest.raises(ValueError, match="steps count from 0"):
        WindowBatches(split, 1, 4).batch(-1)


# ---- from files ----


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(n: int) -> dict[str, str]:
    return {"question": f"What is {n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"}


def decoded(examples: Examples, split: ExampleSet, number: int) -> list[tuple[str, str]]:
    """(part, text) of one example, from its tokens."""
    here = slice(split.starts[number], split.stops[number])
    ids, parts = split.array[here], split.parts[here]
    return [
        (name, examples.tokenizer.decode(ids[parts == n].tolist()))
        for n, name in enumerate(split.part_names)
        if (parts == n).any()
    ]


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:280"])
def test_each_token_is_of_the_part_in_which_it_begins(tmp_path: Path, tokenizer: str) -> None:
    write(tmp_path / "sums" / "train.jsonl", [gsm8k(n) for n in range(20)])
    write(tmp_path / "sums" / "test.jsonl", [gsm8k(n) for n in range(20, 25)])
    examples = load_examples(tmp_path / "sums", tokenizer)
    assert (examples.format, examples.parts) == ("gsm8k", NAMES)
    assert (examples.train.n_examples, examples.val.n_examples) == (20, 5)
    for number, n in enumerate(range(20, 25)):
        wanted = [("prompt", f"Question: What is {n}+{n}?\nAnswer:"), ("reasoning", f" {n}+{n}={2 * n}\n")]
        assert decoded(examples, examples.val, number) == [*wanted, ("answer", f"#### {2 * n}")]
    ends = examples.train.array[examples.train.stops - 1]
    assert set(ends.tolist()) == {examples.tokenizer.eos_id}, "who learns from it learns to stop"
    assert set(examples.train.parts[examples.train.stops - 1].tolist()) == {NAMES.index("answer")}
    text = sum(len(f"Question: What is {n}+{n}?\nAnswer: {n}+{n}={2 * n}\n#### {2 * n}") for n in range(20, 25))
    assert examples.val.n_bytes == text
    assert examples.val.bits_per_byte(text * np.log(2)) == pytest.approx(1)


def test_a_token_across_a_cut_belongs_to_the_part_it_begins_in(tmp_path: Path) -> None:
    """ "abab" is one token here, and the cut lies in its middle."""
    bpe = train_bpe(["abab " * 50], 300)
    rows = [
        {"text": "abab abab", "spans": [[0, 2, "prompt"], [2, 9, "answer"]]},
        {"text": "ab", "spans": [[0, 2, "x"]]},
    ]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows), bpe, val_fraction=0.5)
    split = examples.train if examples.train.n_bytes == 9 else examples.val
    assert decoded(examples, split, 0) == [("prompt", "abab"), ("answer", " abab")]
    assert examples.parts == ("prompt", "answer", "x")


def test_what_begins_every_text_of_a_tokenizer_begins_these_too(tmp_path: Path) -> None:
    bpe = train_bpe(["what is the answer"], 270)
    assert isinstance(bpe, RustBackedTokenizer)
    config = {**bpe.config, "bos_token": "<|endoftext|>", "add_bos_token": True}
    tokenizer = RustBackedTokenizer(bpe.rust, "hf", None, config)
    rows = [{"text": f"<|prompt|>{n}<|answer|>yes"} for n in range(6)]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows), tokenizer)
    split = examples.train
    assert split.array[split.starts].tolist() == [0] * split.n_examples
    assert split.parts[split.starts].tolist() == [0] * split.n_examples
    assert split.array[split.stops - 1].tolist() == tokenizer.encode("s").tolist() * split.n_examples


def test_rows_that_are_not_split_are_ranked_by_their_text(tmp_path: Path) -> None:
    rows = [gsm8k(n) for n in range(40)]
    one = load_examples(write(tmp_path / "a" / "a.jsonl", rows), "byte", val_fraction=0.25)
    other = load_examples(write(tmp_path / "b" / "b.jsonl", rows[::-1] + rows[:5]), "byte", val_fraction=0.25)
    assert one.val.n_examples == 10
    sides = [{example.text for example in each.val.texts} for each in (one, other)]
    assert sides[0] == sides[1]
    assert not sides[0] & {example.text for example in other.train.texts}
    with pytest.raises(SettingsError, match="val_fraction is 2"):
        load_examples(tmp_path / "a" / "a.jsonl", val_fraction=2)


def test_the_fingerprint_is_of_tokens_parts_and_split(tmp_path: Path) -> None:
    def of(rows: list[Any], name: str = "rows", **options: Any) -> str:
        return load_examples(write(tmp_path / f"{name}.jsonl", rows), ByteTokenizer(), **options).fingerprint

    rows = [gsm8k(n) for n in range(20)]
    spans = [{"text": "abc", "spans": [[0, 1, "prompt"], [1, 3, "answer"]]}, gsm8k(0) | {"text": "<|prompt|>d"}]
    moved = [{"text": "abc", "spans": [[0, 2, "prompt"], [2, 3, "answer"]]}, spans[1]]
    other = [{"text": "abd", "spans": [[0, 1, "prompt"], [1, 3, "answer"]]}, spans[1]]
    assert of(rows) == of(rows, "others")
    prints = [
        of(rows),
        of(rows[:-1]),
        of(rows, val_fraction=0.4),
        of(rows, train_limit=5),
        of(spans, format="marks"),
        of(moved, format="marks"),
        of(other, format="marks"),
    ]
    assert len(set(prints)) == len(prints)


def test_other_letters_have_another_fingerprint(tmp_path: Path) -> None:
    """Of the same lengths, parts and split."""
    prints = []
    for folder, letter in (("one", "a"), ("other", "b"), ("again", "a")):
        for name in ("train", "test"):
            write(tmp_path / folder / f"{name}.jsonl", [{"text": f"<|prompt|>{letter}<|answer|>c"}])
        prints.append(load_examples(tmp_path / folder, ByteTokenizer(), format="marks").fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_limits_keep_the_first_examples(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [gsm8k(n) for n in range(9)])
    write(tmp_path / "test.jsonl", [gsm8k(n) for n in range(9)])
    examples = load_examples(tmp_path, "byte", train_limit=3, val_limit=2)
    assert (examples.train.n_examples, examples.val.n_examples) == (3, 2)
    assert examples.val.texts[1].text.startswith("Question: What is 1+1?")
    with pytest.raises(SettingsError, match="these data are plain text"):
        load_examples(val_limit=3)


def test_documents_of_plain_text_are_examples_of_one_part(tmp_path: Path) -> None:
    """Each token of each document is predicted once, from its own document, as in packed training."""
    file = write(tmp_path / "docs.jsonl", [{"text": f"document {n} " * n} for n in range(1, 30)])
    examples = load_examples(file, "byte")
    assert (examples.format, examples.parts) == ("text", ("text",))
    documents = sum(len(f"document {n} " * n) for n in range(1, 30))
    ends = examples.train.n_examples + examples.val.n_examples
    assert examples.train.n_targets + examples.val.n_targets == documents + ends
    for batch in eval_windows(examples.val, 4, 16):
        assert set(batch.parts[batch.parts >= 0].tolist()) <= {0}
        inside = batch.ids[:, 1:][(batch.parts[:, 1:] >= 0)]
        assert not (inside == examples.tokenizer.eos_id).any(), "an end is only predicted"
    kept = load_examples(file, "byte", keep_texts=True)
    assert kept.val.n_examples == examples.val.n_examples
    assert kept.val.places is not None


@pytest.mark.parametrize(
    ("name", "rows", "format", "words"),
    [
        ("a.jsonl", [gsm8k(1), {"question": "q", "answer": "none"}], "auto", r"a.jsonl' line 2: 'answer' has no final"),
        ("a.jsonl", [{"text": "<|prompt|>a"}, {"text": "b"}], "auto", r"a.jsonl' line 2: its segments do not cover"),
        ("a.jsonl", [{"messages": []}], "chat", "format chat needs a tokenizer with a chat template"),
        ("a.jsonl", [gsm8k(1)], "text", r"line 1 has no column 'text'"),
        ("a.txt", ["words"], "gsm8k", r"format gsm8k is read from files of JSON lines \(.jsonl\), not from '.*a.txt'"),
        ("a.jsonl", [gsm8k(1)] * 3, "auto", "all 3 documents of 'a' are the same"),
    ],
)
def test_data_of_another_form_are_refused(tmp_path: Path, name: str, rows: list[Any], format: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_examples(write(tmp_path / name, rows), format=format)


def test_data_that_are_no_files_have_no_parts() -> None:
    with pytest.raises(DataError, match=r"format gsm8k is read from files of JSON lines .* not from 'shakespeare'"):
        load_examples("shakespeare", format="gsm8k")
    with pytest.raises(DataError, match="no file or folder"):
        load_examples("no/such/file.jsonl", format="gsm8k")
