"""One request: how it ends, what is told of it, and what a session spares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_models import LETTERS, LINES, small, tokenizer_of
from torch import nn

from headwise.errors import SettingsError
from headwise.generate import Request, Sampling, Session, complete
from headwise.generate.request import InterruptedGeneration
from headwise.model.base import LanguageModel

GREEDY = Sampling(temperature=0)


def test_a_text_ends_by_length_end_token_stop_id_or_stop_string() -> None:
    model, tokenizer = small(eos=True), tokenizer_of(eos=True)
    eos = tokenizer.eos_id
    assert eos is not None
    endless = Sampling(0, logit_bias={eos: float("-inf")})
    free = complete(model, tokenizer, Request("abc", endless, max_new_tokens=20))
    assert (free.finish_reason, len(free.token_ids), free.prompt_tokens) == ("length", 20, 3)
    assert free.text == tokenizer.decode(free.token_ids)
    forced = complete(model, tokenizer, Request("abc", Sampling(0, logit_bias={eos: 1e4}), max_new_tokens=20))
    assert (forced.finish_reason, forced.token_ids, forced.text) == ("stop", (), "")
    last = free.token_ids[-1]
    first = free.token_ids.index(last)
    by_id = complete(model, tokenizer, Request("abc", endless, max_new_tokens=20, stop_ids=[last]))
    assert (by_id.finish_reason, by_id.token_ids) == ("stop", free.token_ids[:first])
    end = free.text[5:8]
    by_text = complete(model, tokenizer, Request("abc", endless, max_new_tokens=20, stop=[end, "nowhere"]))
    at = free.text.index(end)
    assert (by_text.finish_reason, by_text.stopped_by, by_text.text) == ("stop", end, free.text[:at])
    assert by_text.token_ids == free.token_ids[: at + 3]
    none = complete(model, tokenizer, Request("abc", max_new_tokens=0))
    assert (none.finish_reason, none.text) == ("length", "")


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    model, tokenizer = small(), tokenizer_of()
    free = complete(model, tokenizer, Request("abc", GREEDY, max_new_tokens=9))
    never = free.text[-2:] + "#"
    pieces: list[str] = []
    found = complete(model, tokenizer, Request("abc", GREEDY, max_new_tokens=9, stop=[never]), on_text=pieces.append)
    assert "".join(pieces) == found.text == free.text
    assert len(pieces) < 9


@pytest.mark.parametrize("line", LINES)
def test_log_probabilities_are_those_of_the_full_forward_pass(line: str) -> None:
    model, tokenizer = small(line), tokenizer_of()
    prompt = [int(i) for i in tokenizer.encode("abc")]
    # What is drawn from is far from what the model said: the log-probabilities are the model's.
    sampling = Sampling(0.5, top_k=3, repetition_penalty=1.5, seed=1)
    found = complete(model, tokenizer, Request("abc", sampling, max_new_tokens=8, logprobs=3)).logprobs
    assert found is not None
    given_ids, more = prompt, {}
    if model.spec.architecture == "encoder_decoder":
        given_ids, more = prompt[-1:], {"encoder_ids": torch.tensor([prompt])}
    with torch.no_grad():
        logs = model(torch.tensor([[*given_ids, *(each.token_id for each in found)]]), **more)[0].log_softmax(-1)
    for n, each in enumerate(found, len(given_ids) - 1):
        best = logs[n].topk(3)
        assert each.logprob == pytest.approx(float(logs[n, each.token_id]), abs=1e-4)
        assert [i for i, _ in each.top] == best.indices.tolist()
        assert [p for _, p in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert complete(model, tokenizer, Request("abc", max_new_tokens=2)).logprobs is None


class Counted(nn.Module):
    """A model that counts the tokens it computes."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.spec, self.tokens = model, model.spec, 0
        self.new_cache = model.new_cache

    def forward(self, ids_BT: torch.Tensor, **more: Any) -> torch.Tensor:
        self.tokens += ids_BT.numel()
        return self.model(ids_BT, **more)


TEXTS = st.lists(st.text("abc", min_size=1, max_size=12), min_size=2, max_size=5)


@pytest.mark.parametrize("line", [line for line in LINES if line != "transformer"])
@given(texts=TEXTS, n_last=st.integers(1, 3), slack=st.integers(0, 2))
@hypothesis_settings(max_examples=15)
def test_a_session_answers_as_if_it_knew_nothing(line: str, texts: list[str], n_last: int, slack: int) -> None:
    tokenizer, model = tokenizer_of(), small(line)
    session = Session(model, slack=slack)
    for text in texts:
        ids = [int(i) for i in tokenizer.encode(text)]
        n_last = min(n_last, len(ids))
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0, -n_last:]
        assert torch.allclose(session.read(ids[:1], ids[1:], n_last), wanted, atol=1e-5)
        assert session.ids == ids


def test_a_session_computes_only_what_is_new() -> None:
    model = Counted(small())
    session = Session(model)  # type: ignore[arg-type]
    for ids, computed in [([1, 2, 3], 3), ([1, 2, 3, 4], 1), ([1, 2, 5], 1), ([1, 2, 5], 1), ([6], 1)]:
        before = model.tokens
        session.read(ids)
        assert model.tokens - before == computed


def test_an_interruption_keeps_what_was_written() -> None:
    model, tokenizer = small(), tokenizer_of()
    free = complete(model, tokenizer, Request("abc", GREEDY, max_new_tokens=20))
    pieces: list[str] = []

    def tire(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 5:
            raise KeyboardInterrupt

    model.train()
    with pytest.raises(InterruptedGeneration) as stopped:
        complete(model, tokenizer, Request("abc", GREEDY, max_new_tokens=20), on_text=tire)
    result = stopped.value.result
    assert (result.finish_reason, result.text) == ("interrupted", free.text[:5])
    assert model.training


def test_wrong_requests_are_told_all_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        Request("a", max_new_tokens=-1, stop="ab", logprobs=-1, index=-1)
    assert [each.partition(":")[0] for each in error.value.problems] == ["max_new_tokens", "stop", "logprobs", "index"]
    with pytest.raises(SettingsError, match="stop: given"):
        Request("a", stop=["a", ""])


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    """Published models have rows of no token at the end of their vocabulary."""
    model, tokenizer = small(vocab_size=len(LETTERS) + 40), tokenizer_of()
    for sampling in (GREEDY, Sampling(3.0)):
        found = complete(model, tokenizer, Request("abc", sampling, max_new_tokens=40))
        assert max(found.token_ids) < len(LETTERS)
