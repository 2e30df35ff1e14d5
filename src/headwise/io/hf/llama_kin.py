"""What Llama and the families after it have in common: RoPE, RMSNorm, a gated feed-forward, one layout of names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from headwise.io.hf import common
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family
from headwise.norm.rmsnorm import RMSNormSpec
from headwise.position.rope import RoPESpec
from headwise.spec import ModelSpec


class LlamaKin(Family):
    """A family that reads as Llama but for its attention, and what it adds to `fields` and `config`.

    Attributes:
        preset: the line's.
        eps, ties: what an absent rms_norm_eps and tie_word_embeddings stand for.
        activation: under which name the gate's activation stands, and what its absence stands for.
    """

    preset: ClassVar[str] = "llama"
    eps: ClassVar[float] = 1e-6
    ties: ClassVar[bool] = False
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")

    def attention(self, config: Config) -> dict[str, Any]:
        """The attention's fields; here softmax in every layer."""
        return {"kind": "softmax", **common.heads(config)}

    def position(self, config: Config) -> dict[str, Any]:
        """The position code's fields."""
        return common.rope(config)

    def feed_forward(self, config: Config) -> dict[str, Any]:
        """The feed-forward's fields; here gated, in every layer."""
        return common.gated(config, *self.activation)

    def fields(self, config: Config) -> dict[str, Any]:
        return {
            "preset": self.preset,
            **common.widths(config),
            "attention": self.attention(config),
            "position": self.position(config),
            "norm": {"kind": "rmsnorm", "eps": config.get("rms_norm_eps", float, self.eps)},
            "ffn": self.feed_forward(config),
            "tie_embeddings": config.get("tie_word_embeddings", bool, self.ties),
        }

    def written_position(self, spec: ModelSpec) -> dict[str, Any]:
        """`position` taken back."""
        return common.written_rope(common.part(spec.position, RoPESpec, "position"))

    def written_heads(self, spec: ModelSpec) -> dict[str, Any]:
        """The widths of `attention` taken back."""
        return common.written_heads(spec)

    def written_feed_forward(self, spec: ModelSpec) -> dict[str, Any]:
        """`feed_forward` taken back."""
        return common.written_gated(spec, self.activation[0])

    def config(self, spec: ModelSpec) -> dict[str, Any]:
        return {
            **common.written_widths(spec),
            **self.written_heads(spec),
            **self.written_position(spec),
            **self.written_feed_forward(spec),
            "rms_norm_eps": common.part(spec.norm, RMSNormSpec, "norm").eps,
        }

    def entries(self, spec: ModelSpec) -> Iterator[Entry]:
        return common.llama_entries(spec)


def qwen_windows(config: Config, fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen's attention: where `use_sliding_window` asks for it, the layers from `max_window_layers` on see a window."""
    wanted = config.get("use_sliding_window", bool, False)
    first = config.get("max_window_layers", int, 28)
    return common.windows(config, common.sliding_layers(config, lambda layer: wanted and layer >= first), fields)


def written_qwen_windows(spec: ModelSpec) -> dict[str, Any]:
    """`qwen_windows` taken back, layer by layer."""
    written = common.written_windows(spec)
    return {**written, "use_sliding_window": written["sliding_window"] is not None}
