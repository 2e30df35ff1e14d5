"""Gemma 3 (2025), the models for text alone: Gemma 2 without the cap on scores, with normed queries and keys, and five
layers in a window for each without; the two sorts turn by bases of their own."""

from __future__ import annotations

from typing import Any

from headwise.errors import FormatError
from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.gemma_kin import LaterGemma
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec

LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Gemma3Text(LaterGemma):
    """RoPE's base is 10⁴ in the windows and 10⁶ outside, where the config does not say otherwise."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    full_every = 6
    logit_cap = None

    def heads(self, config: Config) -> dict[str, Any]:
        config.only("attn_logit_softcapping", None)
        return {**super().heads(config), "qk_norm": True}

    def position(self, config: Config) -> dict[str, Any]:
        both = config.section("rope_parameters") or Config({}, config.where)
        scaled = config.section("rope_scaling") or Config({}, config.where)
        local, full = (both.section(kind) or Config({}, config.where) for kind in (LOCAL, GLOBAL))
        full = Config({**full.values, **scaled.values}, config.where)
        local_base = local.get("rope_theta", float, config.get("rope_local_base_freq", float, 1e4))
        full_base = full.get("rope_theta", float, config.get("rope_theta", float, 1e6))
        return common.in_turn(
            self.sliding(config),
            {"kind": "rope", "base": local_base, **common.scaling(local, config)},
            {"kind": "rope", "base": full_base, **common.scaling(full, config)},
        )

    def written_position(self, spec: ModelSpec) -> dict[str, Any]:
        found: dict[str, RoPESpec] = {}
        for layer, kind in enumerate(common.written_windows(spec)["layer_types"]):
            found[kind] = common.part(spec.position.at(layer), RoPESpec, "position")
        written = {kind: common.written_rope(rope) for kind, rope in found.items()}
        local, full = written.get(LOCAL, {}), written.get(GLOBAL, {})
        if "rope_scaling" in local:
            raise FormatError("the positions inside its windows are scaled")
        return {**full, "rope_local_base_freq": local.get("rope_theta", 1e4)}


FAMILY = Gemma3Text()
