"""The compiled step of one token: the same text, and a program that is made anew when it has to be."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import headwise as hw
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import Request, Session, compiled, complete, stream_ids
from headwise.generate.compiled import step_of
from headwise.generate.speculative import NgramLookup
from headwise.generate.writer import Writer
from headwise.model.base import LanguageModel
from headwise.model.quantise import quantise

# torch's own, as its compiler loads
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
PROMPT = [1, 2, 3, 4, 5]


def model_of(line: str) -> LanguageModel:
    return hw.build(hw.parse(line).replace(init_std=0.3), seed=1).eval()


def logits_of(model: LanguageModel, *, compile: bool) -> torch.Tensor:
    """[24,V]: after the prompt and each of 23 given tokens."""
    session, given = Session(model, compile=compile), [7 * n % 61 for n in range(23)]
    return torch.cat([session.read(PROMPT, given[:n]) for n in range(24)])


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What torch counts of its programs, which are traced as always and then run without machine code of their own:
    that takes a minute, and is no matter of ours."""
    compile = torch.compile

    def traced(function: Callable[..., torch.Tensor], *, options: dict[str, Any], **more: bool) -> Any:
        kept = {"guard_filter_fn": options["guard_filter_fn"]}
        return compile(function, backend="aot_eager", options=kept, **more)

    monkeypatch.setattr(torch, "compile", traced)
    counters["stats"].clear()
    return counters["stats"]


def test_a_compiled_step_is_the_step(programs: Counter[str]) -> None:
    """Through a buffer that grows, a recurrence's state and a window that fills on the way, which takes programs of its
    own; then for other weights and, with other parts, by a program of its own."""
    attention = "pattern(window(9, kv_heads=1), linear)"
    model = model_of(f"llama(d_model=32, n_layers=2, n_heads=2, vocab_size=64, attention={attention})")
    wanted = logits_of(model, compile=False)
    torch.testing.assert_close(logits_of(model, compile=True), wanted, atol=1e-5, rtol=1e-5)
    step, n_programs = step_of(model), programs["unique_graphs"]
    assert 2 <= n_programs <= 3
    with torch.no_grad():
        model.head.weight *= 2
    torch.testing.assert_close(logits_of(model, compile=True), 2 * wanted, atol=2e-5, rtol=1e-5)
    assert step_of(model) is step
    assert programs["unique_graphs"] == n_programs
    quantise(model, "int8")
    assert step_of(model) is not step


def test_a_base_that_follows_the_length_needs_no_program_for_each(programs: Counter[str]) -> None:
    """Past the trained length the rule's base was a number, and each token's another program, until torch refused."""
    scaling = "rope(scaling=dynamic(4, original_max_position_embeddings=12))"
    model = model_of(f"llama(d_model=16, n_layers=1, n_heads=2, vocab_size=64, position={scaling})")
    wanted = logits_of(model, compile=False)
    torch.testing.assert_close(logits_of(model, compile=True), wanted, atol=1e-5, rtol=1e-5)
    assert programs["unique_graphs"] <= 2


def test_too_many_programs_are_one_line(programs: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PROGRAMS", 1)
    model = model_of("llama(d_model=16, n_layers=1, n_heads=2, vocab_size=64, attention=window(9))")
    with pytest.raises(HeadwiseError, match=r"^compile: torch.compile failed: .* leave compile out"):
        logits_of(model, compile=True)


def test_two_models_have_two_programs(programs: Counter[str]) -> None:
    for line in ("llama(ffn=mlp(relu)", "llama(ffn=mlp(gelu)"):
        model = model_of(f"{line}, d_model=16, n_layers=1, n_heads=2, vocab_size=64)")
        wanted = logits_of(model, compile=False)
        torch.testing.assert_close(logits_of(model, compile=True), wanted, atol=1e-5, rtol=1e-5)
    assert programs["unique_graphs"] == 2


def test_a_model_with_a_step_is_forgotten() -> None:
    model = model_of("gpt2(d_model=8, n_layers=1, n_heads=1, vocab_size=16)")
    step_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_does_not_go_with_a_compiled_step() -> None:
    model = model_of("gpt2(d_model=8, n_layers=1, n_heads=1, vocab_size=64)")
    with pytest.raises(SettingsError, match="cache: paged does not go with compile; allowed: auto, contiguous"):
        Session(model, "paged", compile=True)
    with pytest.raises(SettingsError, match="compile does not go with a draft or beams"):
        Writer(model, None, draft=NgramLookup(), compile=True)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="cache: paged does not go with compile"):
        Writer(model, None, cache="paged", compile=True)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="session: was made with a cache"):
        complete(model, None, Request(PROMPT), compile=True, session=Session(model))  # type: ignore[arg-type]


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> object:
        raise RuntimeError("no C++ compiler\nwith more lines")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fails)
    model = model_of("gpt2(d_model=8, n_layers=1, n_heads=1, vocab_size=64)")
    with pytest.raises(HeadwiseError, match=r"^compile: torch.compile failed: no C\+\+ compiler; leave compile out"):
        list(stream_ids(model, PROMPT, max_new_tokens=3, compile=True))
