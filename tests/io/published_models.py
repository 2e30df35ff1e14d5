"""Small random models of transformers' classes, and what importing and exporting one must come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import headwise as hw
from headwise.io.hf.export import save_hf
from headwise.io.hf.folder import hf_spec, load_hf
from headwise.model.base import LanguageModel

logging.disable_progress_bar()
# Token ids that a class names by default lie outside a small vocabulary.
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
VOCAB, LENGTH = 61, 50
# transformers' eager Falcon adds ALiBi's bias twice, to the mask and to the scores; its default form does not.
FORMS = {"falcon": "sdpa"}


def published(model_type: str, **config: Any) -> Any:
    """A model of transformers' class for `model_type`; every weight is random, norms and biases too."""
    made = AutoConfig.for_model(model_type, **{"vocab_size": VOCAB, **NO_IDS, **config})
    model = AutoModelForCausalLM.from_config(made, attn_implementation=FORMS.get(model_type, "eager")).eval()
    generator = torch.Generator().manual_seed(len(str(made)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name in model.state_dict().keys() & dict(model.named_buffers()).keys():
            buffer = model.get_buffer(name)
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def reread(folder: Path) -> Any:
    """The folder's model as transformers reads it, in the dtype it is stored in."""
    form = FORMS.get(AutoConfig.from_pretrained(folder).model_type, "eager")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=form, dtype="auto").eval()


def some_ids() -> Tensor:
    """Two rows of tokens, int64 [2,T]."""
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hidden(module: nn.Module, norm: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The final norm's output [B,T,C], and the logits [B,T,V]."""
    kept: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _args, output: kept.append(output))
    out = module(ids)
    handle.remove()
    return kept[0], out if isinstance(out, Tensor) else out.logits


def final_norm(peer: Any) -> nn.Module:
    """The last norm of a model of transformers', by the names that its classes use."""
    names = ("norm", "ln_f", "final_layer_norm")
    return next(getattr(peer.base_model, name) for name in names if hasattr(peer.base_model, name))


def check_same(peer: Any, ours: LanguageModel) -> None:
    """The same logits to 1e-4, and hidden states to 1e-5 of their size."""
    ids = some_ids()
    theirs_BTC, their_logits = hidden(peer, final_norm(peer), ids)
    ours_BTC, our_logits = hidden(ours, ours.stack.final_norm, ids)  # type: ignore[attr-defined]
    assert (ours_BTC - theirs_BTC).norm() <= 1e-5 * theirs_BTC.norm()
    assert (our_logits - their_logits).abs().max() <= 1e-4


def check_comes_back(peer: Any, ours: LanguageModel, folder: Path) -> None:
    """Exported, transformers reads the same class with the same bits, and computes the same to the bit."""
    save_hf(ours, folder, model_type=peer.config.model_type)
    again = reread(folder)
    assert type(again) is type(peer)
    before, after = peer.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    with torch.no_grad():
        assert torch.equal(again(some_ids()).logits, peer(some_ids()).logits)


def check_family(folder: Path, model_type: str, **config: Any) -> LanguageModel:
    """All that is asked of a configuration; the imported model."""
    peer = published(model_type, **config)
    peer.save_pretrained(folder / "theirs")
    spec = hf_spec(folder / "theirs")
    assert hw.parse(str(spec)) == spec
    ours = load_hf(folder / "theirs")
    assert ours.spec == spec
    check_same(peer, ours)
    check_comes_back(peer, ours, folder / "ours")
    return ours
