"""Exact match on grade-school maths, by a model that is right when it is meant to be."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from headwise.data.segments import Example, reader
from headwise.data.tokenizers import ByteTokenizer, CharTokenizer
from headwise.distill.exact_match import Answer, exact_match, number
from headwise.errors import DataError
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3*6 = 18\n#### 18", 18, 18),
        ("#### 1,006.\nSo 7", 1006, 7),
        ("#### $1,250.50", "1250.50", "1250.50"),
        ("#### -3", -3, -3),
        ("it is 4", None, 4),
        ("#### four, no 5", None, 5),
        ("#### 4#### 5", 4, 5),
        ("no idea", None, None),
        ("", None, None),
    ],
)
def test_the_final_number_is_read_in_two_ways(text: str, strict: object, flexible: object) -> None:
    wanted = [None if each is None else Decimal(str(each)) for each in (strict, flexible)]
    assert [number(text, strict=True), number(text, strict=False)] == wanted


def example(n: int) -> Example:
    return reader("gsm8k")({"question": f"{n}?", "answer": f"{n} it is\n#### {n}"}, f"line {n}")


class Parrot(torch.nn.Module):
    """Says one thing whatever it is asked; only what decoding needs of a model is there."""

    def __init__(self, tokenizer: ByteTokenizer, text: str) -> None:
        super().__init__()
        inner = build(parse("llama").resolve(size="10k", vocab_size=257, max_seq_len=512), seed=0)
        self.spec, self.inner = inner.spec, inner
        self.words = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        self.said: dict[int, int] = {}

    def new_cache(self, kind: str) -> Parrot:
        self.at = -1
        return self

    def reorder(self, rows: torch.Tensor) -> None: ...

    def forward(self, ids: torch.Tensor, **options: object) -> torch.Tensor:
        self.at += 1
        return torch.nn.functional.one_hot(torch.tensor(self.words[self.at]), 257).float().expand(len(ids), 1, -1)


def test_a_question_is_right_where_the_numbers_agree() -> None:
    tokenizer = ByteTokenizer(eos=True)
    told: list[Answer] = []
    model = Parrot(tokenizer, " so 4\n#### 7.0\n\nQuestion: 9?")
    found = exact_match(model, tokenizer, [example(n) for n in (7, 8, 9, 7)], batch_size=3, on_answer=told.append)
    assert [answer.strict for answer in found.answers] == [True, False, False, True]
    assert {answer.text for answer in found.answers} == {" so 4\n#### 7.0\n"}, "its own question is not read"
    assert [answer.where for answer in found.answers] == ["line 7", "line 8", "line 9", "line 7"]
    assert len(told) == 4
    share, low, high = found.share("strict")
    assert share == 0.5
    assert 0.14 < low < 0.16, "Wilson's interval of 2 in 4"
    assert high == pytest.approx(1 - low)
    figures = found.figures()
    assert (figures["questions"], figures["unanswered"], figures["flexible"]["share"]) == (4, 0, 0.5)


def model_of(line: str, vocab_size: int = 257, max_seq_len: int = 40) -> LanguageModel:
    return build(parse(line).resolve(size="10k", vocab_size=vocab_size, max_seq_len=max_seq_len), seed=0)


def test_it_asks_the_prompt_behind_the_shots() -> None:
    seen: list[list[int]] = []
    tokenizer, model = ByteTokenizer(eos=True), model_of("llama", max_seq_len=256)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    exact_match(model, tokenizer, [example(3)], shots=[example(1), example(2)], max_new_tokens=1)
    assert tokenizer.decode(seen[0]) == (
        "Question: 1?\nAnswer: 1 it is\n#### 1\n\nQuestion: 2?\nAnswer: 2 it is\n#### 2\n\nQuestion: 3?\nAnswer:"
    )


@pytest.mark.parametrize("line", ["llama", "llama(attention=linear)"])
def test_a_real_model_answers_alone_as_among_others(line: str) -> None:
    tokenizer, model = ByteTokenizer(eos=True), model_of(line)
    asked = [example(n) for n in (1, 22, 333)]
    together = exact_match(model, tokenizer, asked, max_new_tokens=6)
    alone = [exact_match(model, tokenizer, [each], max_new_tokens=6).answers[0] for each in asked]
    assert list(together.answers) == alone


def test_a_question_too_long_for_the_model_is_wrong_and_counted() -> None:
    """Learned positions end; the other questions are answered."""
    model = model_of("gpt2")
    found = exact_match(model, ByteTokenizer(eos=True), [example(1), example(10**30)], max_new_tokens=8)
    assert [answer.text is None for answer in found.answers] == [False, True]
    assert not any(answer.strict for answer in found.answers)
    assert found.figures()["unanswered"] == 1


def test_what_cannot_be_compared_is_refused_before_anything_runs() -> None:
    words = reader("marks")({"text": "<|prompt|>Why?<|answer|>Because."}, "line 4")
    with pytest.raises(DataError, match=r"^line 4: no number in its answer"):
        exact_match(model_of("llama"), ByteTokenizer(), [words])
    with pytest.raises(DataError, match="no questions to answer"):
        exact_match(model_of("llama"), ByteTokenizer(), [])
    with pytest.raises(DataError, match="not among the 2 characters"):
        exact_match(model_of("llama"), CharTokenizer("ab"), [example(1)])
