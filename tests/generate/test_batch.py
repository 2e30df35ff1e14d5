"""Several texts at once: each comes out as it does alone, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from small_models import LETTERS, LINES, small, tokenizer_of

from headwise.errors import HeadwiseError
from headwise.generate import Generation, Request, Sampling, complete, complete_batch
from headwise.generate.batch import answers
from headwise.generate.constraints import regex

PROMPTS = ["a", "abc def", "ponm, lkj", "b", "hij.\nab", "ccc"]


def requests(sampling: Sampling, prompts: Sequence[str] = PROMPTS, **options: int) -> list[Request]:
    """Of several lengths, so that some end before others."""
    return [
        Request(prompt, sampling, **{"max_new_tokens": 4 + 5 * (n % 3), "index": n, **options})
        for n, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=7, top_p=0.95, repetition_penalty=1.2)])
def test_a_request_is_answered_in_a_batch_as_it_is_alone(line: str, sampling: Sampling) -> None:
    model, tokenizer = small(line, eos=True), tokenizer_of(eos=True)
    asked = requests(sampling)
    alone = [complete(model, tokenizer, request) for request in asked]
    for batch_size in (2, 6):
        assert complete_batch(model, tokenizer, asked, batch_size=batch_size) == alone
    mixed = [asked[n] for n in (4, 0, 2)]
    assert complete_batch(model, tokenizer, mixed) == [alone[n] for n in (4, 0, 2)]
    assert len({each.text for each in alone}) > 1


def test_equal_prompts_are_answered_differently() -> None:
    model, tokenizer = small(), tokenizer_of()
    texts = [
        each.text for each in complete_batch(model, tokenizer, requests(Sampling(), ["ab"] * 5, max_new_tokens=12))
    ]
    assert len(set(texts)) == 5


def test_results_come_as_they_end() -> None:
    model, tokenizer = small(), tokenizer_of()
    seen: list[tuple[int, Generation]] = []
    found = complete_batch(
        model, tokenizer, requests(Sampling()), batch_size=4, on_result=lambda place, each: seen.append((place, each))
    )
    assert [place for place, _ in seen] == [0, 3, 1, 2, 4, 5]
    assert all(found[place] == each for place, each in seen)


def test_nothing_asked_is_nothing_done() -> None:
    model, tokenizer = small(), tokenizer_of()
    assert complete_batch(model, tokenizer, []) == []
    found = complete_batch(model, tokenizer, requests(Sampling(), max_new_tokens=0))
    assert {(each.text, each.finish_reason) for each in found} == {("", "length")}


def test_texts_that_fit_alone_but_not_behind_padding() -> None:
    """Learned positions: a short prompt with many new tokens beside a long prompt with few."""
    model, tokenizer = small("gpt2", max_seq_len=24), tokenizer_of()
    asked = [Request("a", max_new_tokens=20), Request("a" * 20, max_new_tokens=4, index=1)]
    assert complete_batch(model, tokenizer, asked) == [complete(model, tokenizer, request) for request in asked]


def test_one_that_cannot_be_answered_does_not_lose_the_others() -> None:
    model, tokenizer = small(), tokenizer_of()
    fine = requests(Sampling())[:2]
    stuck = Request("ab", Sampling(), max_new_tokens=5, constraint=regex("abΩ", tokenizer))
    asked = [stuck, fine[0], Request("Ω"), fine[1], Request("")]
    found = dict(answers(model, tokenizer, asked))
    assert [found[1], found[3]] == [complete(model, tokenizer, request) for request in fine]
    assert "lacks characters" in str(found[0])
    assert "'Ω'" in str(found[2])
    assert "prompt: is empty" in str(found[4])
    with pytest.raises(HeadwiseError, match="prompt: is empty"):
        complete_batch(model, tokenizer, asked[3:])


def test_letters_are_enough() -> None:
    """The tests' alphabet is sorted as the tokenizer sorts it, so that ids are places."""
    assert tokenizer_of().characters == LETTERS
