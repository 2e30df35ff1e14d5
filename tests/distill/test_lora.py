"""Low-rank updates: nothing changes at the start, only they are trained, and merged they are a plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv_models import small, tokens

from headwise.distill.lora import add_lora, merge_lora
from headwise.errors import SettingsError
from headwise.model import build

CALLS = ["gqa(kv_heads=2)", "linear", "tva(rank=4)", "tva(rank=3, vein=model)", "gla"]


@pytest.mark.parametrize("call", CALLS)
def test_updates_start_at_nothing_train_alone_and_merge(call: str) -> None:
    model, ids = small(f"attention={call}"), tokens(2, 11)
    plain = {name: t.clone() for name, t in model.state_dict().items()}
    before = model(ids).detach()
    updates = add_lora(model, rank=2, alpha=4.0)
    torch.testing.assert_close(model(ids), before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in updates}
    assert len(updates) == 2 * 4 * 2  # A and B of four maps in two layers
    model(ids).logsumexp(-1).sum().backward()
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in updates) == len(updates) // 2  # the Bs
    with torch.no_grad():
        for p in updates:
            p.copy_(0.1 * torch.randn_like(p))
    trained = model(ids).detach()
    assert not torch.allclose(trained, before, atol=1e-2)
    merged = merge_lora(model)
    torch.testing.assert_close(merged(ids), trained)
    assert all(p.requires_grad for p in merged.parameters())
    assert set(merged.state_dict()) == set(plain)
    build(merged.spec).load_state_dict(merged.state_dict())
    changed = {name for name, t in merged.state_dict().items() if not torch.equal(t, plain[name])}
    assert {name.split(".")[-2] for name in changed} == {"wq", "wk", "wv", "wo"}


def test_an_update_is_alpha_over_r_times_two_thin_matrices() -> None:
    model = small()
    attention: Any = model.decoding_stack().blocks[0].attention
    before = attention.wk.weight.detach().clone()
    a_rI, b_Or = add_lora(model, rank=3, alpha=6.0, names=["wk"])[:2]
    assert (a_rI.shape, b_Or.shape) == ((3, 32), (32, 3))
    torch.nn.init.normal_(b_Or)
    torch.testing.assert_close(attention.wk.weight, before + 2.0 * b_Or @ a_rI)


def test_impossible_updates_are_errors_and_change_nothing() -> None:
    model = small("tie_embeddings=true")
    with pytest.raises(SettingsError, match="lora on 'wkey' asked for, but this model's linear maps are w_gate, w_out"):
        add_lora(model, names=["wkey"])
    with pytest.raises(SettingsError, match="lora on 'head'"):  # tied to the embedding
        add_lora(model, names=["head"])
    with pytest.raises(SettingsError, match="lora on nothing"):
        add_lora(model, names=[])
    with pytest.raises(SettingsError, match="lora rank 0 given"):
        add_lora(model, rank=0)
    assert all(p.requires_grad for p in model.parameters())
