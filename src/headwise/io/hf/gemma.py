"""Gemma (2024): Llama with a GELU gate, scaled embeddings and norms stored as their distance from one."""

from __future__ import annotations

from headwise.io.hf.gemma_kin import GemmaKin


class Gemma(GemmaKin):
    """Norms before each part, as Llama; 16 heads of keys where the config names none."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    kv_heads = 16
    activation = ("hidden_act", "gelu_pytorch_tanh")


FAMILY = Gemma()
