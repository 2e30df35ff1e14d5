"""Decoding one text: the prompt in one pass, then one token a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headwise.allocator import kept_memory
from headwise.errors import SettingsError
from headwise.generate.request import Generation, InterruptedGeneration, Request, Running
from headwise.generate.sampling import Sampling
from headwise.generate.session import Session, check_prompt
from headwise.generate.speculative import Draft, speculate

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.model.base import LanguageModel


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    request: Request,
    *,
    on_text: Callable[[str], None] | None = None,
    draft: Draft | None = None,
    cache: str = "auto",
    compile: bool = False,
    session: Session | None = None,
) -> Generation:
    """What follows a prompt, with all that is known of it.

    Args:
        model: in whatever mode; it is left in that mode.
        tokenizer: what the model was trained with.
        request: the prompt and what is wanted.
        on_text: called with each new piece of text as it comes; the pieces add up to the text. A token that ends inside
            a character is held back until the character is whole, and so is what may become a stop string.
        draft: what proposes tokens (speculative decoding); the result has the same distribution.
        cache: the kind of cache, as `model.new_cache` takes it.
        compile: decode by one compiled program, which takes about a minute to make and then serves the model for good.
        session: in place of a new cache, one that remembers an earlier text: what begins alike is not read again. How
            it decodes was settled when it was made.

    Raises:
        SettingsError: before anything runs, what cannot work: an encoder, an empty prompt, ids outside the vocabulary,
            `cache` or `compile` beside a session.
        HeadwiseError: more tokens than the model has positions for.
        DataError: a prompt that the tokenizer cannot encode.
        InterruptedGeneration: Ctrl-C, a KeyboardInterrupt with what was written so far.
    """
    running = start(model, tokenizer, request)
    if session is None:
        session = new_session(model, cache, draft, compile)
    elif compile or cache != "auto":
        raise SettingsError("session: was made with a cache and a way to decode; leave cache and compile out beside it")

    def tell(piece: str) -> None:
        if piece and on_text is not None:
            on_text(piece)

    with evaluating(model):
        try:
            for piece in steps(session, running, draft):
                tell(piece)
        except KeyboardInterrupt:
            tell(running.end("interrupted"))
            raise InterruptedGeneration(running.result()) from None
    return running.result()


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
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that follows `prompt` (without it); stops at the tokenizer's end-of-text token.

    The short form of `complete`, which has all options and says how the text ended. Raises as that does.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    request = Request(prompt, sampling, max_new_tokens=max_new_tokens, stop=stop)
    return complete(model, tokenizer, request, on_text=on_text).text


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
    compile: bool = False,
) -> Iterator[int]:
    """The ids that follow `prompt`, each as soon as it is chosen, up to `max_new_tokens` or `eos_id` (not given out).

    Greedy (`temperature=0`) equals the full forward pass at every step. The same seed gives the same ids. Raises as
    `complete`.
    """
    request = Request(
        prompt,
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        max_new_tokens=max_new_tokens,
        stop_ids=() if eos_id is None else (eos_id,),
    )
    check_prompt(model, prompt, max_new_tokens)
    return _ids(model, Running(request, prompt), compile)


def _ids(model: LanguageModel, running: Running, compile: bool) -> Iterator[int]:
    with evaluating(model):
        for _ in steps(Session(model, compile=compile), running):
            yield from running.new[-1:] if running.finish_reason != "stop" else ()


def new_session(
    model: LanguageModel, cache: str = "auto", draft: Draft | None = None, compile: bool = False
) -> Session:
    """A session whose cache can take back what a draft proposes."""
    return Session(model, cache, slack=0 if draft is None else draft.n_tokens + 1, compile=compile)


def start(model: LanguageModel, tokenizer: Tokenizer, request: Request) -> Running:
    """A request made ready for a model, its prompt encoded and checked."""
    prompt = request.prompt
    if isinstance(prompt, str):
        prompt = [*tokenizer.begin_ids, *map(int, tokenizer.encode(prompt))]
        if not prompt and tokenizer.eos_id is not None:
            prompt = [tokenizer.eos_id]  # between documents: the model begins a new one
    check_prompt(model, prompt, request.max_new_tokens)
    return Running(request, prompt, tokenizer)


def steps(session: Session, running: Running, draft: Draft | None = None) -> Iterator[str]:
    """Decode one text; after each pass the text it let out."""
    while running.finish_reason is None:
        if draft is not None:
            yield speculate(session, running, draft)
        else:
            yield running.step(session.read(running.prompt, running.new)[0])


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """The model in eval mode, and then as it was; what memory it frees is kept meanwhile."""
    was_training = model.training
    model.eval()
    try:
        with kept_memory():
            yield
    finally:
        model.train(was_training)
