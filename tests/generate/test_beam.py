"""Beam search finds what transformers' finds with the same weights, and with wide beams the best text there is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_models import LETTERS, LINES, small, tokenizer_of
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headwise.errors import SettingsError
from headwise.generate import Request, Sampling, complete
from headwise.generate.beam import Beams, beam_search
from headwise.generate.constraints import regex
from headwise.io.pretrained import load
from headwise.model.base import LanguageModel

V = len(LETTERS) + 1
EOS = V - 1
SIZES = {"vocab_size": V, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS, "initializer_range": 0.3}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LanguageModel]:
    """A model of transformers with random weights, and ours with the same."""
    torch.manual_seed(1)
    theirs: PreTrainedModel
    if request.param == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        theirs = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64, **SIZES))
    else:
        theirs = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.eval().save_pretrained(folder)
    return theirs, load(folder)


@given(
    prompt=st.text(LETTERS, min_size=1, max_size=6),
    beams=st.integers(2, 5).flatmap(
        lambda n: st.builds(
            Beams,
            st.just(n),
            length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
            early_stopping=st.sampled_from([False, True, "never"]),
            num_return_sequences=st.integers(1, n),
        )
    ),
    max_new_tokens=st.integers(1, 20),
    penalty=st.sampled_from([1.0, 1.3]),
    bias=st.sampled_from([0.0, 2.0, 4.0]),
)
@hypothesis_settings(max_examples=40)
def test_texts_and_scores_are_those_of_transformers(
    pair: tuple[Any, LanguageModel], prompt: str, beams: Beams, max_new_tokens: int, penalty: float, bias: float
) -> None:
    """`bias` makes ends likely, so that texts of different lengths compete."""
    theirs, ours = pair
    tokenizer = tokenizer_of(eos=True)
    ids = [int(i) for i in tokenizer.encode(prompt)]
    wanted = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=max_new_tokens,
        num_beams=beams.n_beams, length_penalty=beams.length_penalty, early_stopping=beams.early_stopping,
        num_return_sequences=beams.num_return_sequences, repetition_penalty=penalty,
        sequence_bias={(EOS,): bias}, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    sampling = Sampling(repetition_penalty=penalty, logit_bias={EOS: bias})
    found = beam_search(ours, tokenizer, Request(prompt, sampling, max_new_tokens=max_new_tokens), beams)
    assert [each.score for each in found] == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)
    for each, sequence in zip(found, wanted.sequences[:, len(ids) :].tolist(), strict=True):
        assert list(each.token_ids) == (sequence[: sequence.index(EOS)] if EOS in sequence else sequence)
        assert each.finish_reason == ("stop" if EOS in sequence else "length")


def test_one_beam_is_the_greedy_text() -> None:
    model, tokenizer = small(eos=True), tokenizer_of(eos=True)
    for prompt in ("a", "bcd", "k."):
        greedy = complete(model, tokenizer, Request(prompt, Sampling(temperature=0), max_new_tokens=30))
        found = beam_search(model, tokenizer, Request(prompt, max_new_tokens=30), Beams(1))
        assert [(each.text, each.finish_reason) for each in found] == [(greedy.text, greedy.finish_reason)]


@pytest.mark.parametrize("line", LINES)
def test_beams_wider_than_all_texts_find_the_best(line: str) -> None:
    """27 texts of three letters; the score of each from the full forward pass."""
    model, tokenizer = small(line, "abc"), tokenizer_of("abc")
    prompt = [0, 2, 1]
    reads = model.spec.architecture == "encoder_decoder"
    scores = {}
    for new in product(range(3), repeat=3):
        given_ids, more = (prompt[-1:], {"encoder_ids": torch.tensor([prompt])}) if reads else (prompt, {})
        with torch.no_grad():
            logs = model(torch.tensor([[*given_ids, *new]]), **more)[0].log_softmax(-1)
        scores[new] = sum(float(logs[len(given_ids) - 1 + n, token]) for n, token in enumerate(new)) / 3
    best = sorted(scores, key=lambda each: -scores[each])
    found = beam_search(model, tokenizer, Request(prompt, max_new_tokens=3), Beams(27, num_return_sequences=27))
    assert [each.token_ids for each in found] == best
    assert [each.score for each in found] == pytest.approx([scores[each] for each in best], abs=1e-5)


def test_what_goes_wrong_is_told_together() -> None:
    with pytest.raises(SettingsError) as error:
        Beams(0, float("nan"), "later", 0)  # type: ignore[arg-type]
    names = [problem.partition(":")[0] for problem in error.value.problems]
    assert names == ["beams", "length_penalty", "early_stopping", "num_return_sequences"]
    model, tokenizer = small(), tokenizer_of()
    wanted = Request("ab", stop=["a"], logprobs=1, constraint=regex("a", tokenizer))
    with pytest.raises(SettingsError) as error:
        beam_search(model, tokenizer, wanted)
    assert [problem.split()[0] for problem in error.value.problems] == ["stop", "constraint", "logprobs"]
    with pytest.raises(SettingsError, match="prompt: is empty"):
        beam_search(model, tokenizer, Request(""))
    assert beam_search(model, tokenizer, Request("ab", max_new_tokens=0))[0].text == ""
