"""Headwise's attention inside transformers' models: their results kept, padding and caches without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import headwise as hw
from headwise.errors import SpecError

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
PADS = 6


@pytest.fixture(scope="module")
def names() -> Iterator[list[str]]:
    from transformers import AttentionInterface, AttentionMaskInterface

    given = hw.register_with_transformers(local="window(7)", dilated="window(5, dilation=2)")
    own = hw.register_with_transformers()
    yield [*own, *given]
    for name in [*own, *given]:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_kinds_without_parameters_of_their_own_are_offered(names: list[str]) -> None:
    kinds = ("bigbird", "linear", "longformer", "softmax", "strided", "window")
    assert names == [*(f"headwise_{kind}" for kind in kinds), "local", "dilated"]


@pytest.mark.parametrize(
    "text", ["w2", "mla", "softmax(qk_norm=true)", "softmax(sink=true)", "pattern(softmax, linear)"]
)
def test_others_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"does not fit.*holds query, key, value and output maps and nothing else"):
        hw.register_with_transformers(x=text)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_softmax_is_their_own_attention(family: str, batch: dict[str, torch.Tensor]) -> None:
    """GQA, the layer's own scale, sliding windows and soft-caps; with padding and without."""
    import transformers

    extra: dict[str, Any] = {} if family == "Llama" else {"sliding_window": 5, "head_dim": 8}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, **extra))
    found = {}
    for name in ("eager", "headwise_softmax"):
        model.eval().set_attn_implementation(name)
        with torch.no_grad():
            padded, plain = model(**batch).logits, model(batch["input_ids"]).logits
        found[name] = padded[batch["attention_mask"].bool()], plain
    for ours, theirs in zip(found["headwise_softmax"], found["eager"]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["bigbird", "linear", "longformer", "softmax", "strided", "window", "local", "dilated"]
)
def test_padding_and_caches_change_nothing(kind: str, names: list[str], llama: Any, batch: Any) -> None:
    """Without the mask interface, a padded row would look at its padding."""
    name = kind if kind in names else f"headwise_{kind}"
    llama.set_attn_implementation(name)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = llama(**batch, position_ids=positions).logits[0, PADS:]
        alone = llama(batch["input_ids"][:1, PADS:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = llama.generate(**batch, **options)
    assert torch.equal(cached, llama.generate(**batch, use_cache=False, **options))
    if kind != "linear":
        static = llama.generate(**batch, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(cached, static)


@pytest.mark.usefixtures("names")
def test_a_window_is_a_window(llama: Any, batch: dict[str, torch.Tensor]) -> None:
    """One layer sees 7 tokens, two see 13: what lies before changes nothing, what lies within does."""
    ids = batch["input_ids"][1:]
    llama.set_attn_implementation("local")
    with torch.no_grad():
        last = [
            llama(torch.cat([ids[:, :n], 49 - ids[:, n : n + 1], ids[:, n + 1 :]], 1)).logits[0, -1] for n in (6, 7)
        ]
        same = llama(ids).logits[0, -1]
    torch.testing.assert_close(last[0], same, atol=1e-5, rtol=1e-5)
    assert (last[1] - same).abs().max() > 1e-3


@pytest.mark.usefixtures("names")
def test_packed_rows_stay_apart(llama: Any, batch: dict[str, torch.Tensor]) -> None:
    """transformers packs documents by positions that start again, and hands a whole mask on."""
    ids = batch["input_ids"][1:]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    for name in ("headwise_softmax", "local"):
        llama.set_attn_implementation(name)
        with torch.no_grad():
            packed = llama(ids, position_ids=positions, use_cache=False).logits[:, 8:]
            alone = llama(ids[:, 8:]).logits
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("names")
def test_what_cannot_be_meant_is_said(llama: Any, batch: dict[str, torch.Tensor]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)).eval()
    mistral.set_attn_implementation("headwise_strided")
    with pytest.raises(ValueError, match="sliding window of 5 and strided a pattern of its own"):
        mistral(**batch)
    llama.set_attn_implementation("headwise_linear")
    with pytest.raises(ValueError, match=r"forms no scores.*padded rows in place of packed ones"):
        llama(batch["input_ids"][1:], position_ids=torch.tensor([[*range(8), *range(12)]]), use_cache=False)
