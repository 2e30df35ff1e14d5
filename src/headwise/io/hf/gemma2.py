"""Gemma 2 (2024): norms before and after each part, every other layer in a window, scores and logits capped."""

from __future__ import annotations

from typing import Any

from headwise.io.hf.config import Config
from headwise.io.hf.gemma_kin import LaterGemma, capped, score_cap
from headwise.spec import ModelSpec


class Gemma2(LaterGemma):
    """Caps of 50 on the scores and 30 on the logits, where the config does not say otherwise."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    preset = "gemma2"

    def heads(self, config: Config) -> dict[str, Any]:
        return {**super().heads(config), "softcap": capped(config, "attn_logit_softcapping", 50.0)}

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {**super().config(spec), "attn_logit_softcapping": score_cap(spec)}


FAMILY = Gemma2()
