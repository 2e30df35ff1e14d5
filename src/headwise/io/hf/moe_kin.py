"""What Mixtral, Qwen 3 MoE and DeepSeek V3 have in common: mixtures of gated experts, dense layers among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headwise.errors import FormatError
from headwise.ffn.glu import GLUSpec
from headwise.ffn.moe import MoESpec
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module
from headwise.spec import ModelSpec

PARTS = {"w_gate": "gate_proj", "w_up": "up_proj", "w_out": "down_proj"}
MOST_EXPERTS = 1 << 16


def experts(config: Config, count: Sequence[str], chosen: int, width: str, d_ff: int, loss: float) -> dict[str, Any]:
    """A mixture's fields.

    Args:
        config: the whole config.
        count: the names that the number of experts stands under, the first that is there; the last has a default of
            its own kind and must be there.
        chosen, d_ff, loss: what an absent num_experts_per_tok, `width` and router_aux_loss_coef stand for.
        width: the name of an expert's hidden width.
    """
    name = next((each for each in count if each in config), count[-1])
    return {
        "kind": "moe",
        "n_experts": config.size(name, most=MOST_EXPERTS),
        "top_k": config.size("num_experts_per_tok", chosen, most=MOST_EXPERTS),
        "d_ff": config.size(width, d_ff),
        "activation": config.choice("hidden_act", {name: common.ACTIVATIONS[name] for name in common.GATED}, "silu"),
        "aux_loss_coef": config.get("router_aux_loss_coef", float, loss),
        "z_loss_coef": 0.0,
    }


def mixture(spec: ModelSpec) -> MoESpec:
    """The mixture that a line of these families has in all layers that are not dense; of gated experts, in no vein."""
    found = {spec.ffn.at(n) for n in range(spec.dims.n_layers)}
    mixtures = [each for each in found if isinstance(each, MoESpec)]
    if len(mixtures) != 1 or not mixtures[0].gated or mixtures[0].rank is not None:
        raise FormatError(f"ffn is {spec.ffn.kind}, and should be one mixture of gated experts, in no vein")
    return mixtures[0]


def dense_layers(spec: ModelSpec) -> list[int]:
    """The layers with a gated feed-forward in place of the mixture."""
    return [n for n in range(spec.dims.n_layers) if not isinstance(spec.ffn.at(n), MoESpec)]


def dense_width(spec: ModelSpec) -> int:
    """The hidden width of the dense layers; where there are none, any will do."""
    widths = {common.part(spec.ffn.at(n), GLUSpec, "ffn").width(spec.dims) for n in dense_layers(spec)}
    if len(widths) > 1:
        raise FormatError(f"its dense layers are of several widths: {sorted(widths)}")
    return next(iter(widths), 4 * spec.dims.d_model)


def written_experts(spec: ModelSpec, width: str) -> dict[str, Any]:
    """`experts` taken back, but for their number."""
    moe = mixture(spec)
    return {
        "hidden_act": common.WRITTEN[moe.activation],
        "num_experts_per_tok": moe.top_k,
        width: moe.width(spec.dims),
        "router_aux_loss_coef": moe.aux_loss_coef,
    }


def attention_and_norms(ours: str, theirs: str) -> Iterator[Entry]:
    """What of a layer is Llama's."""
    yield from common.llama_norms(ours, theirs)
    yield from (entry for entry in common.llama_layer(ours, theirs) if ".mlp." not in entry.theirs[0])


def mixture_entries(spec: ModelSpec, ours: str, theirs: str, names: Mapping[str, str] = PARTS) -> Iterator[Entry]:
    """Router and experts of the layer `ours`; `theirs` is what they stand under, `names` an expert's maps."""
    yield from module(f"{ours}.ffn.router", f"{theirs}.gate")
    for expert in range(mixture(spec).n_experts):
        for mine, name in names.items():
            yield from module(f"{ours}.ffn.experts.{expert}.{mine}", f"{theirs}.experts.{expert}.{name}")


def dense_entries(ours: str, theirs: str) -> Iterator[Entry]:
    """The gated feed-forward of a dense layer."""
    for mine, name in PARTS.items():
        yield from module(f"{ours}.ffn.{mine}", f"{theirs}.{name}")
