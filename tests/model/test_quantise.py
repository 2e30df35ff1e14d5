"""Models with weights in few bits: near the model they are made of, small, and the same after saving."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import headwise as hw
from headwise.errors import FormatError, HeadwiseError, SettingsError
from headwise.kernels import naive as readable
from headwise.kernels.packed_linear import naive
from headwise.linear import Linear
from headwise.model.base import LanguageModel
from headwise.model.quantise import Joint, QuantisedLinear, arrange, quantisation

SIZE = "d_model=64, n_layers=2, n_heads=4, vocab_size=96, max_seq_len=64"
LINES = {
    "llama": f"llama({SIZE}, ffn=swiglu(d_ff=128))",
    "grouped, tied, biased": f"llama({SIZE}, attention=gqa(kv_heads=2), bias=true, tie_embeddings=true)",
    "gpt2": f"gpt2({SIZE})",
    "mla": f"llama({SIZE}, attention=mla)",
    "mixture": f"llama({SIZE}, ffn=moe(n_experts=4, top_k=2))",
    "folded": f"llama({SIZE}, attention=tva(rank=8, folded=true))",
    "odd widths": "llama(d_model=60, n_layers=1, n_heads=2, vocab_size=97)",
    "encoder–decoder": f"transformer({SIZE})",
}


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> LanguageModel:
    return hw.load(smollm2_path)


def model_of(line: str) -> LanguageModel:
    """A model whose weights are large enough for its logits to matter."""
    model = hw.build(line).eval()
    with torch.no_grad():
        for parameter in model.parameters() if model.spec.init != "xavier" else ():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


def logits(model: nn.Module, **more: Tensor) -> Tensor:
    ids_BT = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))
    if "encoder_decoder" in str(model.spec.architecture):  # type: ignore[union-attr]
        more = {"encoder_ids": ids_BT}
    with torch.inference_mode():
        return model(ids_BT, **more)  # type: ignore[no-any-return]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", LINES)
def test_a_quantised_model_computes_with_the_matrices_its_codes_stand_for(name: str) -> None:
    """Against the float model with those very matrices: what is left is bfloat16 in the inputs."""
    model = model_of(LINES[name])
    plain = copy.deepcopy(model)
    assert hw.quantise(model, "int4") is model
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            linear = plain.get_submodule(path)
            linear.weight = nn.Parameter(module.weight)
    assert any(isinstance(module, QuantisedLinear) for module in model.modules())
    assert relative(logits(model), logits(plain)) < 0.03
    with readable():
        assert relative(logits(model), logits(plain)) < 1e-5


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.03), ("int4", 0.3)])
def test_the_loss_of_precision_is_that_of_the_bits(scheme: str, most: float) -> None:
    model = model_of(LINES["llama"])
    wanted = logits(model)
    given = logits(hw.quantise(model, scheme))
    assert most / 100 < relative(given, wanted) < most


def test_smaller_groups_lose_less() -> None:
    model = model_of(LINES["llama"])
    wanted = logits(model)
    errors = [relative(logits(hw.quantise(copy.deepcopy(model), "int4", group_size=g)), wanted) for g in (32, 64)]
    assert errors[0] < errors[1]


def test_heads_keep_eight_bits_and_what_is_read_as_a_matrix_stays() -> None:
    mixture = hw.quantise(model_of(LINES["mixture"]))
    assert mixture.head.scheme == "int8"
    assert type(mixture.stack.blocks[0].ffn.router) is Linear
    assert mixture.stack.blocks[0].ffn.experts[0].w_up.scheme == "int4"
    latent = hw.quantise(model_of(LINES["mla"]))
    assert type(latent.stack.blocks[0].attention.wkv_b) is Linear
    tied = hw.quantise(model_of(LINES["grouped, tied, biased"]))
    assert tied.embedding.weight.dtype == torch.float32


def test_maps_of_one_input_are_one_product() -> None:
    model = hw.quantise(model_of(LINES["llama"]))
    block = model.stack.blocks[0]
    attention, ffn = block.attention, block.ffn
    assert isinstance(attention.wq.joint, Joint)
    assert attention.wq.joint.maps == (attention.wq, attention.wk, attention.wv)
    assert attention.wk.codes.untyped_storage().data_ptr() == attention.wq.codes.untyped_storage().data_ptr()
    x_BTC = torch.randn(1, 3, 64)
    together = ffn.w_gate.joint(x_BTC)
    assert all(torch.equal(a, b) for a, b in zip(together, (ffn.w_gate(x_BTC), ffn.w_up(x_BTC))))
    # Another map in the place of one of them is not overlooked.
    before = logits(model)
    attention.wv = nn.Linear(64, 64)
    assert relative(logits(model), before) > 0.01


def test_memory_is_the_bits_and_the_scales() -> None:
    model = model_of(LINES["llama"])
    linear = model.stack.blocks[0].ffn.w_out
    made = {scheme: QuantisedLinear.of(linear, scheme, 32) for scheme in ("int8", "int4")}
    assert made["int8"].n_bytes == 64 * 128 + 64 * 2
    assert made["int4"].n_bytes == 64 * 128 // 2 + 64 * (128 // 32) * 4


def test_the_state_dict_does_not_depend_on_the_order_for_the_kernels() -> None:
    linear = nn.Linear(64, 64)
    module = nn.Sequential(QuantisedLinear.of(linear, "int4", 32))
    plain = {name: t.clone() for name, t in module.state_dict().items()}
    assert torch.equal(plain["0.codes"], naive.quantise_int4(linear.weight.detach(), 32)[0])
    arrange(module)
    assert module[0].in_order
    assert not torch.equal(module[0].codes, plain["0.codes"])
    assert all(torch.equal(t, plain[name]) for name, t in module.state_dict().items())
    other = nn.Sequential(QuantisedLinear.of(nn.Linear(64, 64), "int4", 32))
    arrange(other)
    other.load_state_dict(plain)
    x = torch.randn(2, 64)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("name", ["grouped, tied, biased", "odd widths", "mixture"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_saved_and_loaded_logits_are_the_same_bits(name: str, scheme: str, tmp_path: Path) -> None:
    model = hw.quantise(model_of(LINES[name]), scheme)
    hw.save_pretrained(model, tmp_path / "small")
    again = hw.load(tmp_path / "small")
    assert quantisation(again) == quantisation(model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(again)), logits(model))


def test_loading_can_quantise_a_model_saved_as_it_was(tmp_path: Path) -> None:
    model = model_of(LINES["llama"])
    hw.save_pretrained(model, tmp_path / "whole")
    loaded = hw.load(tmp_path / "whole", quantise="int8")
    assert torch.equal(logits(loaded), logits(hw.quantise(model, "int8")))


def test_a_change_of_precision_leaves_the_codes_alone() -> None:
    model = hw.quantise(model_of(LINES["llama"]))
    wq = model.stack.blocks[0].attention.wq
    codes, wanted = wq.codes, logits(model)
    model.bfloat16()
    assert wq.codes is codes
    assert relative(logits(model).float(), wanted) < 0.05
    model.float().to("meta").to_empty(device="cpu")
    assert not wq.in_order
    assert wq.joint is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheme": "int5"}, "unknown scheme of quantisation 'int5'.*allowed: int4, int8"),
        ({"scheme": "int4", "group_size": 48}, "group_size should be one of 32, 64, 128, not 48"),
        ({"scheme": "int8", "group_size": 32}, "int8 has a scale a row"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(given: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        hw.quantise(nn.Linear(4, 4), **given)  # type: ignore[arg-type]


def test_a_model_is_not_quantised_twice_and_a_damaged_config_is_refused(tmp_path: Path) -> None:
    model = hw.quantise(model_of(LINES["llama"]))
    with pytest.raises(HeadwiseError, match=r"quantised already \(int4\); load it anew"):
        hw.quantise(model, "int8")
    hw.save_pretrained(model, tmp_path / "small")
    config = tmp_path / "small" / "config.json"
    config.write_text(config.read_text().replace('"int4"', '"int3"'))
    with pytest.raises(FormatError, match="damaged"):
        hw.load(tmp_path / "small")


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_real_model_loses_little(smollm2: LanguageModel, scheme: str) -> None:
    """On "The capital of France is Paris, and the capital of Germany is Berlin."; the file's layers had 4 bits in
    groups of 32 already, which int4 meets again."""
    ids_BT = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 4521, 314, 11452, 30]])
    with torch.inference_mode():
        whole, small = (model(ids_BT)[0, :-1] for model in (smollm2, hw.quantise(copy.deepcopy(smollm2), scheme)))
    losses = [nn.functional.cross_entropy(each, ids_BT[0, 1:]).item() for each in (whole, small)]
    assert losses[0] < 3
    assert abs(losses[1] - losses[0]) < 0.05
