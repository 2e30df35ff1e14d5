"""What the Gemmas share: embeddings scaled by √d_model, norms stored as their distance from one, a GELU gate; from the
second on norms around each part, windows in some layers, capped scores and logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from headwise.attention.base import ScoreSpec
from headwise.errors import FormatError
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, module
from headwise.io.hf.llama_kin import LlamaKin
from headwise.spec import ModelSpec

WINDOW = 4096  # where the config names none


class GemmaKin(LlamaKin):
    """A Gemma; `kv_heads` is what an absent num_key_value_heads stands for."""

    preset = "gemma"
    ties = True
    kv_heads: ClassVar[int] = 4
    activation = ("hidden_activation", "gelu_pytorch_tanh")

    def heads(self, config: Config) -> dict[str, Any]:
        """The attention's fields that all layers share."""
        bias = config.get("attention_bias", bool, False) or None
        return {**common.heads(config, kv_heads=self.kv_heads, head_dim=256), "bias": bias}

    def attention(self, config: Config) -> dict[str, Any]:
        return {"kind": "softmax", **self.heads(config)}

    def fields(self, config: Config) -> dict[str, Any]:
        config.only("use_bidirectional_attention", False)
        fields = super().fields(config)
        # transformers takes "gelu" for a slip of the first files, and computes the tanh formula.
        gate = {"geglu": "geglu_tanh"}.get(fields["ffn"]["kind"], fields["ffn"]["kind"])
        return {
            **fields,
            "norm": {**fields["norm"], "unit_offset": True},
            "ffn": {**fields["ffn"], "kind": gate},
            "scale_embeddings": True,
        }

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), "attention_bias": common.first_attention(spec).has_bias(spec.dims)}


class LaterGemma(GemmaKin):
    """Gemma 2 and 3: sandwiched parts, windows in turn, queries scaled by a number of the config's.

    Attributes:
        full_every: the layers that see all tokens, by their distance, where the config does not list them.
        logit_cap: what an absent final_logit_softcapping stands for.
    """

    full_every: ClassVar[int] = 2
    logit_cap: ClassVar[float | None] = 30.0

    def heads(self, config: Config) -> dict[str, Any]:
        heads = super().heads(config)
        head_dim = heads["head_dim"] or config.size("hidden_size") // config.size("num_attention_heads")
        scalar = config.size("query_pre_attn_scalar", 256)
        return {**heads, "scale": None if scalar == head_dim else scalar**-0.5}

    def sliding(self, config: Config) -> list[bool]:
        """Which layers see a window only."""
        every = config.size("sliding_window_pattern", self.full_every)
        return common.sliding_layers(config, lambda layer: (layer + 1) % every > 0)

    def attention(self, config: Config) -> dict[str, Any]:
        config = Config({"sliding_window": WINDOW, **config.values}, config.where)
        return common.windows(config, self.sliding(config), self.heads(config))

    def fields(self, config: Config) -> dict[str, Any]:
        cap = capped(config, "final_logit_softcapping", self.logit_cap)
        return {**super().fields(config), "order": "sandwich", "logit_softcap": cap}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        scale = common.first_attention(spec).scale_in_force(spec.dims)
        written = common.written_windows(spec)
        return {
            **super().config(spec),
            **written,
            "sliding_window": written["sliding_window"] or WINDOW,  # transformers wants one, used or not
            "query_pre_attn_scalar": round(scale**-2),
            "final_logit_softcapping": spec.logit_softcap,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        yield from common.llama_ends()
        for n in range(spec.dims.n_layers):
            ours, theirs = f"stack.blocks.{n}", f"model.layers.{n}"
            yield from common.llama_layer(ours, theirs)
            yield from module(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
            yield from module(f"{ours}.attention_out_norm", f"{theirs}.post_attention_layernorm")
            yield from module(f"{ours}.ffn_norm", f"{theirs}.pre_feedforward_layernorm")
            yield from module(f"{ours}.ffn_out_norm", f"{theirs}.post_feedforward_layernorm")


def capped(config: Config, name: str, default: float | None) -> float | None:
    """A soft cap: `default` where the config says nothing, none where it says null."""
    return config.get(name, float, None if name in config.values else default)


def score_cap(spec: ModelSpec) -> float | None:
    """The soft cap on the scores."""
    attention = common.first_attention(spec)
    if not isinstance(attention, ScoreSpec):
        raise FormatError(f"attention is {attention.kind}")
    return attention.softcap
