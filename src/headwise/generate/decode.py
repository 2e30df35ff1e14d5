"""Decoding with the plain key/value cache: the prompt in one pass, then one token a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from headwise.errors import SettingsError
from headwise.generate.sampling import Sampling
from headwise.position import Position

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel


def stream_ids(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    """The ids that follow `prompt`, each as soon as it is chosen, up to `max_new_tokens` or `eos_id` (not given out).

    A decoder continues the prompt; an encoder–decoder reads it with its encoder, and its decoder begins with the
    prompt's last token, as in training. Greedy (`temperature=0`) equals the full forward pass at every step. The
    same seed gives the same ids.

    Raises `SettingsError` before anything runs: an encoder, an empty prompt, ids outside the vocabulary, or values out
    of range; `HeadwiseError` where prompt and new tokens are more than the model has positions for.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, prompt, max_new_tokens)
    return _stream(model, list(prompt), max_new_tokens, sampling, seed, eos_id)


def _check(model: LanguageModel, prompt: Sequence[int], max_new_tokens: int) -> None:
    spec = model.spec
    if spec.architecture == "encoder":
        raise SettingsError("an encoder fills in masked tokens and generates no text; use a decoder or encoder–decoder")
    if max_new_tokens < 0:
        raise SettingsError(f"max_new_tokens: given {max_new_tokens}, should be at least 0")
    if not len(prompt):
        raise SettingsError("prompt: is empty; give at least one token to go on from")
    if not 0 <= min(prompt) <= max(prompt) < spec.dims.vocab_size:
        raise SettingsError(f"prompt: ids should lie in 0…{spec.dims.vocab_size - 1}; is this the model's tokenizer?")
    # The last new token is never fed back, so it needs no position.
    decoded = 1 if spec.architecture == "encoder_decoder" else len(prompt)
    longest = max(len(prompt), decoded + max_new_tokens - 1)
    for module in model.modules():
        if isinstance(module, Position):
            module.check_length(longest)


@torch.inference_mode()
def _stream(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eos_id: int | None,
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    cache = model.new_cache()
    ids_1T = torch.tensor([prompt], device=device)
    encoder_ids = {}
    if model.spec.architecture == "encoder_decoder":
        encoder_ids = {"encoder_ids": ids_1T}
        ids_1T = ids_1T[:, -1:]
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits_V = model(ids_1T, cache=cache, **encoder_ids)[0, -1]
            chosen = sampling.pick(logits_V, generator)
            if chosen == eos_id:
                return
            yield chosen
            ids_1T, encoder_ids = torch.tensor([[chosen]], device=device), {}  # the cache keeps what the encoder read
    finally:
        model.train(was_training)


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that follows `prompt` (without it); stops at the tokenizer's end-of-text token.

    `on_text` is called with each new piece of text as it comes; the pieces add up to what is returned. A token that
    ends inside a character (bytes, BPE) is held back until the character is whole. Raises as `stream_ids`, and
    `DataError` for a prompt the tokenizer cannot encode.
    """
    prompt_ids = [int(i) for i in tokenizer.encode(prompt)]
    if not prompt_ids and tokenizer.eos_id is not None:
        prompt_ids = [tokenizer.eos_id]  # between documents: the model begins a new one
    new_ids = stream_ids(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    pieces = []
    for piece in _text_pieces(tokenizer, new_ids):
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    return "".join(pieces)


def _text_pieces(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Text as ids arrive. Each piece is the difference that new ids make after the ids of the piece before, since some
    tokenizers decode a token differently at the start of a text."""
    before: list[int] = []
    pending: list[int] = []
    for i in ids:
        pending.append(i)
        piece = _added(tokenizer, before, pending)
        if piece and not piece.endswith("\ufffd"):
            yield piece
            before, pending = pending, []
    if pending and (piece := _added(tokenizer, before, pending)):
        yield piece


def _added(tokenizer: Tokenizer, before: list[int], new: list[int]) -> str:
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
