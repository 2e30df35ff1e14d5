"""What `capture` sees of a pass, for every kind of attention: the numbers that the layer itself goes on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_models import attention_lines, kv_lines, small, tokens
from torch import Tensor, nn

from headwise.attention.base import split_heads
from headwise.distill.capture import Signals, capture, match_of
from headwise.distill.shape import KVShape
from headwise.errors import HeadwiseError, SettingsError
from headwise.model.base import LanguageModel
from headwise.position import Encoding

EVERYTHING = ("keys", "values", "queries", "outputs", "inputs", "hidden", "final")


def seen_by(model: LanguageModel, ids_BT: Tensor, **given: Any) -> tuple[Signals, Tensor]:
    with capture(model, EVERYTHING) as signals:
        logits = model(ids_BT, **given)
    return signals, logits


def attention_of(model: LanguageModel, layer: int) -> Any:
    return model.decoding_stack().blocks[layer].attention


def present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


@pytest.mark.parametrize("call", attention_lines())
def test_the_shapes_are_those_of_kv_shape_and_gradients_flow(call: str) -> None:
    model = small(f"attention={call}")
    plain = model(tokens(2, 11))
    signals, logits = seen_by(model, tokens(2, 11))
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    dims, output = model.spec.dims, KVShape.of(model, match="output")
    assert present(signals.outputs[1]).shape == (2, dims.n_heads, 11, output.value_dim)
    if match_of(model.spec, 0) == "output":
        assert signals.keys == signals.values == signals.queries == [None, None]
        wanted, names = [present(signals.outputs[1])], ("wq", "wk", "wv")
    else:
        shape = KVShape.of(model)
        assert present(signals.keys[1]).shape == (2, shape.kv_heads, 11, shape.key_dim)
        assert present(signals.queries[1]).shape == (2, shape.n_heads, 11, shape.key_dim)
        assert present(signals.values[1]).shape == (2, shape.kv_heads, 11, shape.value_dim)
        wanted, names = [present(signals.keys[1]), present(signals.values[1])], ("wk", "wv")
    torch.stack([x.square().sum() for x in wanted]).sum().backward()
    for name in names:
        if hasattr(attention_of(model, 1), name):
            assert getattr(attention_of(model, 1), name).weight.grad.abs().sum() > 0, name
    assert present(model.embedding.weight.grad).abs().sum() > 0
    assert model.head.weight.grad is None


@pytest.mark.parametrize("call", attention_lines())
def test_outputs_are_what_goes_into_the_output_map(call: str) -> None:
    model = small(f"attention={call}")
    results: list[Tensor] = []
    hook = attention_of(model, 1).register_forward_hook(lambda m, args, out: results.append(out[0]))
    signals, _ = seen_by(model, tokens(2, 11))
    hook.remove()
    flat = present(signals.outputs[1]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention_of(model, 1)._out(flat), results[0])


@pytest.mark.parametrize("call", [c for c in kv_lines() if not c.startswith(("mla", "w2"))])
def test_a_cache_holds_the_same_keys_with_their_positions(call: str) -> None:
    """Un-rotated, the keys that a cache has kept are those that capture has seen."""
    model = small(f"attention={call}, position=rope(scaling=yarn(4, original_max_position_embeddings=16))")
    cache = model.new_cache("contiguous")
    with torch.no_grad():
        signals, _ = seen_by(model, tokens(2, 11), cache=cache)
    for layer in range(2):
        keys, values = cache.layers[layer].held()  # type: ignore[attr-defined]
        torch.testing.assert_close(signals.encodings[layer].unrotate(keys), present(signals.keys[layer]))
        torch.testing.assert_close(values, present(signals.values[layer]))
        assert not torch.allclose(keys, present(signals.keys[layer]), atol=1e-2)


def test_wasserstein_keys_are_means_and_raw_deviations() -> None:
    model = small("attention=w2")
    cache = model.new_cache()
    with torch.no_grad():
        signals, _ = seen_by(model, tokens(2, 11), cache=cache)
    kept = cache.layers[0].held()[0]  # type: ignore[attr-defined]
    mu, sigma_raw = present(signals.keys[0]).split(4, -1)
    torch.testing.assert_close(signals.encodings[0].unrotate(kept)[..., :4], mu)
    torch.testing.assert_close(kept[..., 4:], nn.functional.softplus(sigma_raw) + 1e-4)


def test_latent_keys_are_those_of_the_expanded_form_without_positions() -> None:
    model = small("attention=mla(kv_lora_rank=6, qk_nope_head_dim=10, qk_rope_head_dim=4, v_head_dim=12)")
    cache, attention = model.new_cache(), attention_of(model, 1)
    with torch.no_grad():
        signals, _ = seen_by(model, tokens(2, 11), cache=cache)
        (kept,) = cache.layers[1].held()  # type: ignore[attr-defined]
        up = split_heads(attention.wkv_b(kept[:, 0, :, :6]), 4)
    torch.testing.assert_close(present(signals.keys[1]), up[..., :10])
    torch.testing.assert_close(present(signals.values[1]), up[..., 10:])
    assert type(signals.encodings[1]) is Encoding  # no positions are missing from them


def test_grouped_keys_are_the_projected_and_normed_input() -> None:
    model = small("attention=gqa(kv_heads=2, qk_norm=true)")
    signals, _ = seen_by(model, tokens(2, 11))
    block: Any = model.decoding_stack().blocks[1]
    h = block.attention_norm(present(signals.inputs[1]))
    keys = (h @ block.attention.wk.weight.T).view(2, 11, 2, 8).transpose(1, 2)
    torch.testing.assert_close(present(signals.keys[1]), block.attention.k_norm(keys))
    queries = (h @ block.attention.wq.weight.T).view(2, 11, 4, 8).transpose(1, 2)
    torch.testing.assert_close(present(signals.queries[1]), block.attention.q_norm(queries))


def test_streams_fit_together() -> None:
    model = small("attention=pattern(softmax, linear)", preset="gpt2")
    signals, logits = seen_by(model, tokens(2, 11))
    assert torch.equal(present(signals.hidden[0]), present(signals.inputs[1]))
    stack = model.decoding_stack()
    assert torch.equal(stack.final_norm(present(signals.hidden[1])), present(signals.final))
    assert torch.equal(model.logits(present(signals.final)), logits)
    assert [x is None for x in signals.keys] == [False, True]
    assert [match_of(model.spec, layer) for layer in range(2)] == ["kv", "output"]


def test_only_what_is_wanted_is_kept_and_nothing_after_the_block() -> None:
    model = small()
    with capture(model, {"values"}) as signals:
        model(tokens(2, 11))
        first = signals.values[0]
        model(tokens(2, 7, seed=1))
    assert signals.keys == signals.hidden == []
    assert signals.final is None
    assert present(first).shape[2] == 11
    assert present(signals.values[0]).shape[2] == 7
    model(tokens(2, 9))
    assert present(signals.values[0]).shape[2] == 7
    assert all(attention_of(model, layer).observer is None for layer in range(2))
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_recomputed_blocks_are_not_seen_twice() -> None:
    """In the backward pass a checkpointed block runs again, and what it makes then belongs to no graph."""
    model = small().train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.activation_checkpointing = checkpointing
        with capture(model, EVERYTHING) as signals:
            model(tokens(2, 11))
            loss = torch.stack([present(k).square().mean() for k in signals.keys]).sum()
            kept = signals.keys[1]
            loss.backward()
            assert signals.keys[1] is kept
        gradients.append(attention_of(model, 0).wk.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_encoder_decoder_shows_its_decoder() -> None:
    model = small(preset="transformer")
    signals, _ = seen_by(model, tokens(2, 11), encoder_ids=tokens(2, 5))
    assert present(signals.keys[0]).shape == (2, 4, 11, 8)


def test_what_cannot_be_seen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with pytest.raises(SettingsError, match=r"unknown signal 'kyes'.*did you mean 'keys'"), capture(model, {"kyes"}):
        pass
    monkeypatch.setattr(type(attention_of(model, 0)), "told", lambda self, y: y)
    with pytest.raises(HeadwiseError, match="layer 0: softmax does not tell its observer of outputs"):
        seen_by(model, tokens(2, 11))
    assert attention_of(model, 0).observer is None
