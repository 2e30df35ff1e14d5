"""Decoding: the cache changes nothing, a seed repeats, text streams whole, limits are said beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headwise.data import load_dataset
from headwise.errors import DataError, HeadwiseError, SettingsError
from headwise.generate import generate, stream_ids
from headwise.model import build
from headwise.model.base import LanguageModel
from headwise.spec import parse

SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 23, "max_seq_len": 24}
LINES = ["gpt2", "llama(attention=gqa(kv_heads=1))", "bloom", "gemma", "transformer", "gpt2(position=sinusoidal)"]


def small(line: str = "gpt2", **more: Any) -> LanguageModel:
    # A wide initialisation, so that the likeliest token is not the same everywhere.
    return build(parse(line).replace(**{**SMALL, "init": "normal", "init_std": 0.5, **more}), seed=3)


@pytest.mark.parametrize("line", LINES)
def test_greedy_decoding_equals_the_full_forward_pass_at_every_step(line: str) -> None:
    model = small(line)
    prompt = [3, 1, 4, 1, 5]
    chosen = list(stream_ids(model, prompt, max_new_tokens=16, temperature=0))
    model.eval()
    reads = model.spec.architecture == "encoder_decoder"
    ids, more = (prompt[-1:], {"encoder_ids": torch.tensor([prompt])}) if reads else (prompt, {})
    for token in chosen:
        with torch.no_grad():
            assert int(model(torch.tensor([ids]), **more)[0, -1].argmax()) == token
        ids = [*ids, token]
    assert len(chosen) == 16
    assert len(set(chosen)) > 1


def test_a_seed_repeats_and_another_differs_whatever_the_global_state() -> None:
    model = small(dropout=0.3).train()
    before = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        texts.append(list(stream_ids(model, [1], max_new_tokens=20, seed=seed)))
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] != texts[2]
    assert model.training


def test_the_end_token_ends_and_is_not_given_out() -> None:
    model = small()
    free = list(stream_ids(model, [1, 2], max_new_tokens=15, temperature=0))
    end = free[-1]
    stopped = list(stream_ids(model, [1, 2], max_new_tokens=15, temperature=0, eos_id=end))
    assert stopped == free[: free.index(end)]


def test_tokens_come_one_by_one() -> None:
    stream = stream_ids(small(), [1], max_new_tokens=20)
    first = [next(stream), next(stream)]
    assert first == list(stream_ids(small(), [1], max_new_tokens=2))


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("gpt2(architecture=encoder)", {}, "an encoder fills in masked tokens"),
        ("gpt2", {"prompt": []}, "prompt: is empty"),
        ("gpt2", {"prompt": [1, 23]}, "ids should lie in 0…22"),
        ("gpt2", {"prompt": [-1]}, "ids should lie in 0…22"),
        ("gpt2", {"max_new_tokens": -1}, "max_new_tokens"),
        ("gpt2", {"temperature": -0.1}, "temperature"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_token(line: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        stream_ids(small(line), **{"prompt": [1], **settings})


def test_learned_positions_end_where_they_end() -> None:
    """24 positions: five of the prompt, and one for each new token but the last, which is never fed back."""
    assert len(list(stream_ids(small(), [1] * 5, max_new_tokens=20))) == 20
    with pytest.raises(HeadwiseError, match="max_seq_len=24"):
        stream_ids(small(), [1] * 5, max_new_tokens=21)
    assert len(list(stream_ids(small("llama"), [1] * 5, max_new_tokens=40))) == 40


def test_text_in_text_out() -> None:
    tokenizer = load_dataset("shakespeare", "char").tokenizer
    model = small(vocab_size=tokenizer.vocab_size)
    pieces: list[str] = []
    text = generate(model, tokenizer, "ROMEO:", max_new_tokens=18, seed=4, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(text) == 18
    assert text == generate(model, tokenizer, "ROMEO:", max_new_tokens=18, seed=4)
    with pytest.raises(SettingsError, match="prompt: is empty"):
        generate(model, tokenizer, "")
    with pytest.raises(DataError):
        generate(model, tokenizer, "ROMÉO")
