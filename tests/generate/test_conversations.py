"""Conversations: the template's text, a history that is kept, and turns that cost their own tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from headwise.data.chat import render_chat
from headwise.data.tokenizers import RustBackedTokenizer
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import Request, Sampling, complete
from headwise.generate.beam import Beams
from headwise.generate.chat import Chat, chat_ids
from headwise.generate.speculative import DraftModel
from headwise.generate.writer import Writer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> RustBackedTokenizer:
    """A token a byte, and special ones for the roles and the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = Rust(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"])
    config = {"eos_token": "<|end|>", **({} if template is None else {"chat_template": template})}
    return RustBackedTokenizer(rust, "hf", rust.token_to_id("<|end|>"), config)


TOKENIZER = chat_tokenizer()
MODEL = small(vocab_size=TOKENIZER.vocab_size, max_seq_len=512)
REQUEST = Request("", Sampling(seed=3), max_new_tokens=10)


def test_each_turn_is_answered_as_the_whole_conversation_is() -> None:
    chat = Chat(Writer(MODEL, TOKENIZER), REQUEST, system="be brief")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}]
    for turn, text in enumerate(["hello", "and you?", "ok"]):
        pieces: list[str] = []
        found = chat.say(text, pieces.append)
        messages.append({"role": "user", "content": text})
        ids = chat_ids(TOKENIZER, messages)
        assert "<|user|>" in render_chat(TEMPLATE, messages)
        assert TOKENIZER.encode("<|user|>", special=True)[0] in ids
        alone = complete(MODEL, TOKENIZER, Request(ids, Sampling(seed=3), max_new_tokens=10, index=turn))
        assert found == alone
        assert "".join(pieces) == found.text
        messages.append({"role": "assistant", "content": found.text})
        assert chat.messages == messages


def test_a_turn_computes_its_own_tokens_only() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.spec, self.new_cache, self.tokens = MODEL, MODEL.spec, MODEL.new_cache, 0

        def forward(self, ids_BT: torch.Tensor, **more: Any) -> torch.Tensor:
            self.tokens += ids_BT.numel()
            return self.model(ids_BT, **more)

    model = Counted()
    # Letters alone, which come back from the text as the tokens they were.
    other = {i: float("-inf") for i in range(TOKENIZER.vocab_size) if not TOKENIZER.decode([i]).isalpha()}
    request = Request("", Sampling(logit_bias=other), max_new_tokens=10)
    chat = Chat(Writer(model, TOKENIZER), request)  # type: ignore[arg-type]
    chat.say("hello" * 10)
    before = model.tokens
    chat.say("you")
    # The last answer's last token and its end, <|user|>, three letters, the end, <|assistant|>; then nine new tokens.
    assert model.tokens - before == 1 + 1 + 1 + 3 + 1 + 1 + 9


def test_a_draft_takes_part() -> None:
    writer = Writer(MODEL, TOKENIZER, draft=DraftModel(MODEL, MODEL))
    greedy = Request("", Sampling(temperature=0), max_new_tokens=10)
    drafted, plain = Chat(writer, greedy), Chat(Writer(MODEL, TOKENIZER), greedy)
    for text in ("hello", "you"):
        found = drafted.say(text)
        assert found.text == plain.say(text).text
        assert found.accepted > 0


def test_a_turn_that_fails_is_forgotten() -> None:
    model = small("gpt2", vocab_size=TOKENIZER.vocab_size, max_seq_len=40)
    chat = Chat(Writer(model, TOKENIZER), REQUEST)
    chat.say("hello")
    before = list(chat.messages)
    with pytest.raises(HeadwiseError, match="max_seq_len=40"):
        chat.say("x" * 40)
    assert chat.messages == before
    chat.say("ok")


def test_what_cannot_converse_says_so() -> None:
    with pytest.raises(SettingsError, match="no chat template"):
        Chat(Writer(MODEL, chat_tokenizer(None)), REQUEST).say("hello")
    with pytest.raises(SettingsError, match="beams"):
        Chat(Writer(MODEL, TOKENIZER, beams=Beams(2)), REQUEST)
