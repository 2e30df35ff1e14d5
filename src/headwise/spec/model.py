"""A whole model in one frozen value: what `parse` returns, `build` builds and `count` counts.

A spec starts from a preset, which fills every field not given. Widths may stay open (None): they are then chosen by
`resolve`, so that the same line serves at any size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from headwise.attention import AttentionSpec
from headwise.dims import Dims
from headwise.errors import Problem, SpecError, short
from headwise.position import PositionSpec
from headwise.registry import ATTENTION, FFN, NORM, POSITION, ComponentSpec, Pattern, Registry, validated
from headwise.spec.presets import preset_fields
from headwise.spec.sizing import fill_widths

DEFAULT_SIZE = "1m"
DEFAULT_VOCAB_SIZE = 65  # the characters of the embedded Shakespeare
DEFAULT_MAX_SEQ_LEN = 256
# Ceilings far above any model, so that checking a line stays quick whatever it says.
MOST_WIDTH, MOST_LAYERS, MOST_TOKENS = 10**6, 10**5, 10**9
MOST_PARAMS = 10**13


def _component(registry: Registry) -> Any:
    return Annotated[SerializeAsAny[ComponentSpec], BeforeValidator(registry.spec)]


class ModelSpec(BaseModel):
    """One architecture.

    Attributes:
        preset: the style every field starts from; `size` names one of its published models.
        architecture: causal decoder, bidirectional encoder, or encoder–decoder.
        d_model, n_layers, n_heads, n_encoder_layers, vocab_size, max_seq_len: widths; None is open until `resolve`.
        attention, position, norm, ffn: the mechanisms, each a component or a pattern of components.
        order: where the norms stand: pre, post, sandwich, reordered, parallel or parallel_two_norms (see
            `model/block.py`).
        bias, dropout: defaults for components that leave theirs open.
        tie_embeddings: the output head shares the token embedding's matrix; `head_bias` gives it a bias.
        logit_softcap: c bends logits x to c·tanh(x/c) (Gemma 2).
        scale_embeddings: token embeddings are multiplied by √d_model; `embedding_norm`: and normalised.
        init, init_std: the initialisation's name and width (see `model/init.py`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: str
    size: str | None = None
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
    d_model: int | None = Field(None, gt=0, le=MOST_WIDTH)
    n_layers: int | None = Field(None, gt=0, le=MOST_LAYERS)
    n_heads: int | None = Field(None, gt=0, le=MOST_WIDTH)
    n_encoder_layers: int | None = Field(None, gt=0, le=MOST_LAYERS)
    vocab_size: int | None = Field(None, gt=0, le=MOST_TOKENS)
    max_seq_len: int | None = Field(None, gt=0, le=MOST_TOKENS)
    attention: _component(ATTENTION)  # type: ignore[valid-type]
    position: _component(POSITION)  # type: ignore[valid-type]
    norm: _component(NORM)  # type: ignore[valid-type]
    ffn: _component(FFN)  # type: ignore[valid-type]
    order: Literal["pre", "post", "sandwich", "reordered", "parallel", "parallel_two_norms"] = "pre"
    bias: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float | None = Field(None, gt=0)
    scale_embeddings: bool = False
    embedding_norm: bool = False
    init: Literal["gpt2", "normal", "xavier"] = "gpt2"
    init_std: float = Field(0.02, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "preset" not in given:
            return given
        fields = preset_fields(given["preset"], given.get("size"))
        return {**fields, **given, "size": fields.get("size")}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = self._problems()
        if problems:
            raise SpecError(problems)
        return self

    def _problems(self) -> list[Problem]:
        problems = []
        items = self.position.items if isinstance(self.position, Pattern) else ()
        if any(isinstance(item, PositionSpec) and item.embeds for item in items):
            problems.append(
                Problem("position", "learned and sinusoidal act once, on the embeddings, not layer by layer")
            )
        if self.architecture == "encoder_decoder" and self.order.startswith("parallel"):
            allowed = "pre, post, sandwich, reordered"
            problems.append(Problem("order", f"{self.order} is for decoders and encoders; allowed: {allowed}"))
        if self.d_model is None or self.n_heads is None:
            return problems
        dims = self.dims
        for name in ("attention", "ffn", "norm", "position"):
            component: ComponentSpec = getattr(self, name)
            problems += [Problem(f"{name}.{p.field}".rstrip("."), p.message) for p in component.check(dims)]
        if not any(p.field.startswith("attention") for p in problems):
            heads: dict[str, Problem] = {}
            # Past one round of both patterns the pairs of attention and position repeat.
            period = math.lcm(len(self.attention.each()), len(self.position.each()))
            for layer in range(min(self.n_layers or period, period)):
                attention, position = self.attention.at(layer), self.position.at(layer)
                if isinstance(attention, AttentionSpec) and isinstance(position, PositionSpec):
                    for problem in position.check_head(attention.rotary_dim(dims)):
                        heads[problem.message] = problem
                    if position.biases and not attention.takes_bias:
                        message = f"{position.kind} adds to scores, and {attention.kind} has none; use rope or none"
                        heads[message] = Problem("position", message)
            problems += heads.values()
        return problems

    @property
    def dims(self) -> Dims:
        """The widths the components share; open lengths and vocabulary take the defaults."""
        if self.d_model is None or self.n_heads is None:
            raise SpecError(f"the widths of {str(self)!r} are open; call resolve() first")
        return Dims(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_layers=self.n_layers or 1,
            max_seq_len=self.max_seq_len or DEFAULT_MAX_SEQ_LEN,
            vocab_size=self.vocab_size or DEFAULT_VOCAB_SIZE,
            bias=self.bias,
            dropout=self.dropout,
            norm_eps=getattr(self.norm.at(0), "eps", None),
            norm_unit_offset=getattr(self.norm.at(0), "unit_offset", False),
        )

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and those before it."""
        return self.architecture != "encoder"

    @property
    def cross_attention(self) -> ComponentSpec:
        """What the decoder looks at the encoder with: softmax attention with the heads of the decoder's first layer."""
        first = self.attention.at(0)
        if not isinstance(first, AttentionSpec):
            return ATTENTION.spec("softmax")
        shared = ("kv_heads", "head_dim", "bias", "out_bias", "qk_norm", "scale", "dropout")
        return ATTENTION.spec({"kind": "softmax", **{name: getattr(first, name) for name in shared}})

    @property
    def is_resolved(self) -> bool:
        """Whether every width is known."""
        widths = [self.d_model, self.n_layers, self.n_heads, self.vocab_size, self.max_seq_len]
        if self.architecture == "encoder_decoder":
            widths.append(self.n_encoder_layers)
        return all(w is not None for w in widths)

    def replace(self, **fields: Any) -> ModelSpec:
        """A copy with some fields changed, checked as a whole.

        Raises:
            SpecError: the result is no architecture.
        """
        return model_spec({**dict(self), **fields})

    def resolve(
        self, size: str | None = None, vocab_size: int | None = None, max_seq_len: int | None = None
    ) -> ModelSpec:
        """Every open field filled in; fields already set stay.

        Args:
            size: parameters to aim at where widths are open, such as "1m" (the default) or "10m"; see `spec/sizing.py`.
            vocab_size: the tokenizer's vocabulary.
            max_seq_len: the longest input.

        Raises:
            SpecError: the size is malformed, or the widths do not fit the components.
        """
        per_layer = 28 if self.architecture == "encoder_decoder" else 12
        n_params = parse_size(size or DEFAULT_SIZE)
        widths = fill_widths(
            self.d_model, self.n_layers, self.n_heads, self._kv_heads(), n_params, per_layer=per_layer, fits=self._turns
        )
        encoder_layers = self.n_encoder_layers
        if self.architecture == "encoder_decoder" and encoder_layers is None:
            encoder_layers = widths["n_layers"]
        return self.replace(
            **widths,
            n_encoder_layers=encoder_layers,
            vocab_size=self.vocab_size or vocab_size or DEFAULT_VOCAB_SIZE,
            max_seq_len=self.max_seq_len or max_seq_len or DEFAULT_MAX_SEQ_LEN,
        )

    def _turns(self, head_dim: int) -> bool:
        """Whether attention and position code take heads of this width."""
        codes, kinds = self.position.each(), self.attention.each()
        n_heads = self.n_heads or self._kv_heads()
        dims = Dims(d_model=head_dim * n_heads, n_heads=n_heads)
        turned = {a.rotary_dim(dims) for a in kinds if isinstance(a, AttentionSpec) and not a.check(dims)} or {head_dim}
        return not any(code.check_head(width) for code in codes if isinstance(code, PositionSpec) for width in turned)

    def _kv_heads(self) -> int:
        """A number that n_heads must divide by."""
        counts = [a.kv_heads for a in self.attention.each() if isinstance(a, AttentionSpec) and a.kv_heads]
        return math.lcm(*counts)

    def __str__(self) -> str:
        from headwise.spec.grammar import to_line

        return to_line(self)

    def __repr__(self) -> str:
        return f"ModelSpec({str(self)!r})"


def model_spec(fields: Mapping[str, Any]) -> ModelSpec:
    """`ModelSpec(**fields)`, but with all problems: those of the preset, of single fields, and of fields that do not
    fit together. pydantic alone stops at the first of the three, so the fields found wrong are left out and the rest
    is looked at again.

    Raises:
        SpecError: the fields describe no architecture.
    """
    try:
        return validated(ModelSpec, fields)
    except SpecError as error:
        problems, latest, rest = error.problems, error.problems, dict(fields)
    wrong: set[str] = set()
    while True:
        new = {p.field.partition(".")[0] for p in latest} - wrong
        if "preset" in new:
            rest |= {"preset": "gpt2", "size": None}
        kept = {k: v for k, v in rest.items() if k not in new or k == "preset"}
        wrong |= new
        if not new or (kept == rest and "preset" not in new):
            raise SpecError(problems)
        rest = kept
        try:
            validated(ModelSpec, rest)
            latest = []
        except SpecError as error:
            latest = [p for p in error.problems if p.field.partition(".")[0] not in wrong]
            problems = problems + latest


def parse_size(text: str) -> int:
    """Parameters from "500k", "1m", "1.5b" or a plain number.

    Raises:
        SpecError: it is none of these, or more than any model has.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmb]?)\s*", str(text).lower())
    if not match or float(match[1]) == 0:
        raise SpecError(
            [Problem("size", f"{short(text)} is no size; write a number with k, m or b, such as 1m or 500k")]
        )
    n_params = float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]]
    if not 1 <= n_params <= MOST_PARAMS:
        raise SpecError(
            [Problem("size", f"{short(text)} is out of range; from 1 to {MOST_PARAMS // 10**9}b are allowed")]
        )
    return round(n_params)
