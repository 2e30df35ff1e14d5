"""The engine answers every request as it is answered alone, whatever happens beside it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small_models import small, tokenizer_of

import headwise as hw
from headwise.errors import HeadwiseError, SettingsError
from headwise.generate import Generation, Request, Sampling, complete
from headwise.generate.engine import Engine

LINES = [
    "llama(attention=gqa(kv_heads=1))",
    "gpt2",
    "bloom",
    "llama(attention=window(4))",
    "llama(attention=pattern(softmax(softcap=3.0, sink=true), window(5)))",
    "llama(attention=mla)",
    "llama(attention=w2)",
    "llama(ffn=moe(n_experts=4))",
]
PROMPTS = ["a", "once in a land, ", "once in a field ", "he", "m" * 30, "once in a land, mice"]


def requests(**more: Any) -> list[Request]:
    """Greedy and random ones, of unequal lengths, some with equal beginnings."""
    return [
        Request(prompt, Sampling(temperature=float(n % 3), seed=7), max_new_tokens=4 + 3 * n, index=n, **more)
        for n, prompt in enumerate(PROMPTS)
    ]


def alone(model: Any, asked: list[Request]) -> list[Generation]:
    return [complete(model, tokenizer_of(), request) for request in asked]


@pytest.mark.parametrize("line", LINES)
def test_each_is_answered_as_it_is_alone(line: str) -> None:
    """With room for all, and with so little that texts lose their blocks and are computed again."""
    model, asked = small(line), requests()
    wanted = alone(model, asked)
    roomy = Engine(model, tokenizer_of(), block_size=4, max_num_batched_tokens=24)
    assert roomy.generate(asked) == wanted
    assert roomy.stats.preemptions == 0
    tight = Engine(model, tokenizer_of(), block_size=4, num_blocks=14, max_num_seqs=4, max_num_batched_tokens=7)
    assert tight.generate(asked) == wanted
    assert tight.stats.preemptions > 0
    for engine in (roomy, tight):
        assert engine.stats.new_tokens == sum(len(result.token_ids) for result in wanted)
        assert engine.pool.manager.num_free_blocks == engine.pool.manager.num_blocks


def test_equal_beginnings_are_computed_once() -> None:
    """Also when the second comes after the first has ended; the texts are those of an engine that shares nothing."""
    model, prompt = small(), "once in a land, in a home"
    found = {}
    for sharing in (True, False):
        engine = Engine(model, tokenizer_of(), block_size=4, prefix_sharing=sharing)
        found[sharing] = [engine.generate([prompt + end], max_new_tokens=5, temperature=0)[0] for end in ("", ".", ",")]
        assert engine.stats.cached_tokens == (2 * (len(prompt) // 4 * 4) if sharing else 0)
    assert found[True] == found[False]


def test_text_streams_and_who_leaves_frees_his_blocks() -> None:
    model = small()
    engine = Engine(model, tokenizer_of(), block_size=4)
    asked = requests(stop=["pp"])
    ids = [engine.add(request) for request in asked]
    engine.step()
    engine.abort(ids[2])
    engine.abort(10**6)
    texts = dict.fromkeys(ids, "")
    results = {}
    late = None
    for n in range(200):
        if engine.is_idle:
            break
        if n == 3:
            late = engine.add(Request("lame", Sampling(temperature=0), max_new_tokens=4))
            texts[late] = ""
        for event in engine.step():
            texts[event.id] += event.text
            if event.result is not None:
                assert event.id not in results
                results[event.id] = event.result
    assert set(results) == {*ids, late} - {ids[2]}
    wanted = alone(model, asked)
    for place, id in enumerate(ids):
        if id != ids[2]:
            assert results[id] == wanted[place]
    # The first step's pieces were not looked at.
    assert all(results[id].text.endswith(texts[id]) and texts[id] for id in results)
    assert engine.pool.manager.num_free_blocks == engine.pool.manager.num_blocks


def test_a_request_for_nothing_ends_at_once() -> None:
    engine = Engine(small(), tokenizer_of())
    (result,) = engine.generate(["a"], max_new_tokens=0)
    assert (result.text, result.finish_reason) == ("", "length")
    assert engine.is_idle


def test_all_prompts_that_cannot_be_answered_are_told_together() -> None:
    engine = Engine(small(), tokenizer_of(), block_size=4, num_blocks=5)
    with pytest.raises(SettingsError) as told:
        engine.generate(["a", "b" * 20, "X", "c"], max_new_tokens=4)
    text = str(told.value)
    assert re.search(r"prompt 1: a prompt of 20 tokens .* needs 6 blocks of 4 tokens, and the pool has 5", text)
    assert "prompt 2: the character 'X'" in text
    assert "prompt 0" not in text
    assert engine.is_idle
    assert len(engine.generate(["a", "c"], max_new_tokens=4)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("llama(architecture=encoder)", "an engine runs decoders, and this is an encoder"),
        ("llama(attention=gla)", "gla keeps one state and no single tokens"),
    ],
)
def test_models_without_a_paged_cache_are_refused(line: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Engine(small(line), tokenizer_of())


def test_one_that_fails_does_not_stop_the_others() -> None:
    """A banned vocabulary leaves nothing to choose."""
    model = small()
    banned = Sampling(logit_bias={n: float("-inf") for n in range(model.spec.dims.vocab_size)})
    done = {}
    with pytest.raises(HeadwiseError, match="prompt 1: no token is left to choose"):
        Engine(model, tokenizer_of()).generate(
            ["a", Request("b", banned), "c"],
            max_new_tokens=4,
            on_result=lambda place, result: done.update({place: result}),
        )
    assert set(done) == {0, 2}


def test_after_an_interruption_the_engine_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is known by its content when its tokens are planned; where they were never written nobody may read it."""
    model, asked = small(), requests()
    engine = Engine(model, tokenizer_of(), block_size=4)
    calls = 0

    def interrupted(*args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return type(model).forward(model, *args, **more)

    monkeypatch.setattr(model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(asked)
    monkeypatch.undo()
    assert engine.is_idle
    assert engine.generate(asked) == alone(model, asked)


def test_the_model_keeps_its_mode_and_the_name_is_public() -> None:
    model = small().train()
    hw.Engine(model, tokenizer_of()).generate(["a"], max_new_tokens=2)
    assert model.training
