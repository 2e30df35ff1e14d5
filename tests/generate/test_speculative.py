"""Speculative decoding changes how fast a text comes and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from headwise.data.tokenizers import CharTokenizer
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import History, Request, Sampling, complete
from headwise.generate.constraints import regex
from headwise.generate.request import Running
from headwise.generate.speculative import DraftModel, Guess, NgramLookup, judge
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64, "init": "normal"}


def small(characters: str, line: str = "llama", seed: int = 3, init_std: float = 0.5) -> LanguageModel:
    fields = {**SMALL, "init_std": init_std, "vocab_size": len(characters)}
    return build(parse(line).replace(**fields), seed=seed).eval()


LETTERS = "".join(sorted("abcdefgh .,\n"))
LINES = ["llama", "gpt2", "llama(attention=window(4))", "llama(attention=gla)", "bloom", "transformer"]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("n_tokens", [1, 4])
def test_greedy_text_is_the_greedy_text_token_for_token(line: str, n_tokens: int) -> None:
    tokenizer, model = CharTokenizer(LETTERS), small(LETTERS, line)
    request = Request("abc abc", Sampling(temperature=0), max_new_tokens=30)
    plain = complete(model, tokenizer, request)
    for draft in (
        DraftModel(small(LETTERS, "llama", seed=4), model, n_tokens),
        DraftModel(small(LETTERS, line), model, n_tokens),
        NgramLookup(n_tokens),
    ):
        found = complete(model, tokenizer, request, draft=draft)
        assert found.token_ids == plain.token_ids
        assert (found.text, found.finish_reason) == (plain.text, plain.finish_reason)
        assert found.drafted >= found.accepted >= 0
    assert found.drafted > 0


def test_a_draft_that_is_the_model_itself_is_always_right() -> None:
    tokenizer, model = CharTokenizer(LETTERS), small(LETTERS)
    request = Request("abc", Sampling(seed=5), max_new_tokens=30)
    found = complete(model, tokenizer, request, draft=DraftModel(model, model, 4))
    assert found.accepted == found.drafted == 24  # six passes of four guesses and one token more
    assert len(found.token_ids) == 30


P = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.1)


@given(P, P)
@hypothesis_settings(max_examples=8)
def test_a_judged_token_has_the_models_distribution(p: list[float], q: list[float]) -> None:
    """Chi-square over 4,000 draws, p > 1e-6: a right sampler fails one of the 8 cases in 125,000 suites of other seeds;
    the seeds are fixed."""
    p_V, q_V = (torch.tensor(each, dtype=torch.float64) for each in (p, q))
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    generator = torch.Generator().manual_seed(1)
    counts = Counter(
        judge(Guess(int(token), q_V), p_V, generator)[0]
        for token in torch.multinomial(q_V, 4000, replacement=True, generator=generator)
    )
    check(counts, {i: float(p_V[i]) for i in range(4)})


def check(counts: Counter[Any], probs: dict[Any, float]) -> None:
    """Counts against probabilities; cells that expect fewer than five are put together."""
    n = sum(counts.values())
    assert all(probs[each] > 0 for each in counts), "what cannot be was drawn"
    rare = [each for each in probs if n * probs[each] < 5]
    cells = [(counts[each], n * probs[each]) for each in probs if each not in rare]
    if sum(probs[each] for each in rare) * n >= 1:
        cells.append((sum(counts[each] for each in rare), n * sum(probs[each] for each in rare)))
    if len(cells) > 1:
        observed, expected = zip(*cells)
        scale = sum(observed) / sum(expected)
        assert chisquare(observed, [each * scale for each in expected]).pvalue > 1e-6


class Remembered:
    """A cache of the ids themselves."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.memory = None

    def crop(self, length: int) -> None:
        del self.ids[length:]


class Table(torch.nn.Module):
    """A language model in a table: the next of three tokens by the last two. Quick enough to be asked ten thousand
    times, and wrong answers come out where its cache holds the wrong ids."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.spec = parse("llama").replace(**SMALL, vocab_size=3).resolve()
        made = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(seed))
        self.logits = torch.nn.Parameter(made, requires_grad=False)

    def new_cache(self, *_: Any, **options: int) -> Remembered:
        return Remembered()

    def forward(self, ids_1T: torch.Tensor, *, cache: Remembered, **_: Any) -> torch.Tensor:
        start = len(cache.ids)
        cache.ids += ids_1T[0].tolist()
        pairs = zip([0, *cache.ids][start:], cache.ids[start:])
        return torch.stack([self.logits[pair] for pair in pairs])[None]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, min_p=0.3, presence_penalty=0.5)])
@pytest.mark.parametrize("kind", ["draft", "ngram"])
def test_whole_texts_have_the_models_distribution(sampling: Sampling, kind: str) -> None:
    """1,000 texts of three tokens over three letters, counted against the 27 products of the model's own
    probabilities; chi-square p > 1e-6, so that a right decoder fails one of the 4 cases in 250,000 suites of other
    seeds; the seeds are fixed."""
    model, other = cast(Any, Table(seed=3)), cast(Any, Table(seed=4))
    tokenizer, prompt = CharTokenizer("abc"), [0, 1, 2, 0, 1]
    draft = NgramLookup(2) if kind == "ngram" else DraftModel(other, model, 2)
    probs: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for new, p in probs.items():
            last = [*prompt, *new][-2:]
            p_V = sampling.probabilities(model.logits[last[0], last[1]], History(prompt, new))
            longer |= {(*new, i): p * float(p_V[i]) for i in range(3)}
        probs = longer
    counts: Counter[tuple[int, ...]] = Counter()
    accepted = drafted = 0
    for index in range(1000):
        found = complete(model, tokenizer, Request(prompt, sampling, max_new_tokens=3, index=index), draft=draft)
        counts[found.token_ids] += 1
        accepted, drafted = accepted + found.accepted, drafted + found.drafted
    check(counts, probs)
    assert 0 < accepted < drafted


def test_constraints_and_stop_strings_hold_within_a_pass() -> None:
    tokenizer, model = CharTokenizer(LETTERS), small(LETTERS)
    constraint = regex("(ab|cd)+e", tokenizer)
    for index in range(10):
        for draft in (DraftModel(small(LETTERS, seed=4), model, 5), NgramLookup(5, shortest=1)):
            request = Request("ababab", Sampling(), max_new_tokens=40, constraint=constraint, index=index)
            found = complete(model, tokenizer, request, draft=draft)
            assert constraint.may_begin(found.text)
            assert found.finish_reason == "length" or constraint.fits(found.text)
            request = Request("ababab", Sampling(), max_new_tokens=40, stop=["a", "b"], index=index)
            assert not {"a", "b"} & set(complete(model, tokenizer, request, draft=draft).text)


def test_log_probabilities_are_the_models_own() -> None:
    tokenizer, model = CharTokenizer(LETTERS), small(LETTERS)
    request = Request("abc", Sampling(temperature=0), max_new_tokens=20, logprobs=2)
    plain = complete(model, tokenizer, request).logprobs
    found = complete(model, tokenizer, request, draft=DraftModel(small(LETTERS, seed=4), model)).logprobs
    assert plain is not None
    assert found is not None
    assert [each.token_id for each in found] == [each.token_id for each in plain]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in plain], abs=1e-5)


def test_lookup_goes_on_as_the_text_did_last_time() -> None:
    tokenizer = CharTokenizer("abcdxyz")

    def guessed(text: str, most: int = 9, **fields: int) -> str:
        running = Running(Request(text), [int(i) for i in tokenizer.encode(text)], tokenizer)
        return tokenizer.decode([guess.token for guess in NgramLookup(**fields).guesses(running, most)])

    assert guessed("abcxabcyabc") == "yabc"  # the later of two places
    assert guessed("abcdxbcyabc") == "dxbc"  # the longer ending
    assert guessed("abcdxbcyabc", longest=2) == "yabc"
    assert guessed("aab", n_tokens=2) == ""
    assert guessed("aab", shortest=1, most=0) == ""
    assert guessed("xyzxyz", most=2) == "xy"
    assert guessed("a") == ""


def test_what_cannot_draft_is_said() -> None:
    model = small("abc")
    with pytest.raises(SettingsError, match="vocabulary of 4 ids, the model one of 3"):
        DraftModel(small("abcd"), model)
    with pytest.raises(SettingsError, match="draft_tokens"):
        NgramLookup(0)
    with pytest.raises(SettingsError, match="ngram"):
        NgramLookup(1, longest=1, shortest=2)
    short = build(parse("gpt2").replace(**{**SMALL, "vocab_size": 3, "max_seq_len": 8}))
    with pytest.raises(HeadwiseError, match="max_seq_len=8"):
        complete(model, CharTokenizer("abc"), Request("abc", max_new_tokens=9), draft=DraftModel(short, model))
