"""A Headwise model as a Hugging Face class.

Nothing else of Headwise is needed: the modules that the line uses are in `SOURCES` below and are imported from there,
under a name of their own. Each class is the module that Headwise builds from `config.line`, with the interface of
transformers' models: `HeadwiseForCausalLM` for decoders, `HeadwiseForMaskedLM` and `HeadwiseModel` for encoders,
`HeadwiseForSeq2SeqLM` for encoder–decoders.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import linecache
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from types import CodeType
from typing import Any

import pydantic  # noqa: F401  named here so that transformers asks for it where it is missing
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

ROOT = "headwise"
SOURCES: dict[str, str] = {}  # path in the package → its text; empty where Headwise itself is what runs
MECHANISMS: tuple[str, ...] = ()  # modules that register what the line uses


class _Bundle(MetaPathFinder, InspectLoader):
    """Imports `ROOT` and what is in it from `SOURCES`."""

    def __init__(self) -> None:
        self.paths = {ROOT: "__init__.py"}
        for path in SOURCES:
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if name != "__init__":
                self.paths[f"{ROOT}.{name}"] = path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.paths:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=self.is_package(name))

    def is_package(self, fullname: str) -> bool:
        return self.paths[fullname].endswith("__init__.py")

    def get_source(self, fullname: str) -> str:
        return SOURCES[self.paths[fullname]]

    def get_code(self, fullname: str) -> CodeType:
        source, file = self.get_source(fullname), f"<{ROOT}/{self.paths[fullname]}>"
        # Tracebacks and Triton look lines up by a file's name.
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        return self.source_to_code(source, file)


if SOURCES and ROOT not in sys.modules:
    sys.meta_path.append(_Bundle())
for _name in MECHANISMS:
    importlib.import_module(_name)


class HeadwiseConfig(PretrainedConfig):
    """`line` is the architecture; the other sizes repeat it under the names that tools look for."""

    model_type = "headwise"

    def __init__(self, line: str = "gpt2", **fields: Any) -> None:
        self.line = line
        super().__init__(**fields)


class HeadwiseCache(Cache):
    """The model's own cache in the place where transformers hands one on."""

    def __init__(self, held: Any) -> None:
        super().__init__(layers=[])
        self.held = held
        self.rows = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held.length

    def get_max_length(self, layer_idx: int | None = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.held.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.held.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.held.reorder(torch.arange(self.rows).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        self.held.crop(max_length if max_length >= 0 else self.held.length + max_length)

    def reset(self) -> None:
        self.held.crop(0)

    @property
    def is_compileable(self) -> bool:
        return False


class HeadwisePreTrainedModel(PreTrainedModel):
    """`model`: the module that Headwise builds from the line."""

    config_class = HeadwiseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # A loss is the mean over its own batch's labels: who accumulates gradients has to divide by the number of batches.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012  as transformers declares it

    def __init__(self, config: HeadwiseConfig) -> None:
        super().__init__(config)
        build = importlib.import_module(f"{ROOT}.model").build
        self.model = build(config.line, device=torch.empty(0).device)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Initial values are the line's own; a loaded model has all of its weights."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.model.head = value


class HeadwiseModel(HeadwisePreTrainedModel):
    """An encoder's vectors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any) -> BaseModelOutput:
        """`last_hidden_state` [B,T,C] of `input_ids`, int64 [B,T]; `attention_mask` is [B,T], 0 where it is padding."""
        place, stack = importlib.import_module(f"{ROOT}.cache").place, self.model.stack
        placed = place(input_ids, _segments(attention_mask, input_ids.shape[1]), None)
        return BaseModelOutput(last_hidden_state=stack(self.model.embed(input_ids, stack, placed), placed))


class HeadwiseForMaskedLM(HeadwisePreTrainedModel):
    """An encoder, which says what stands where tokens are masked."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **ignored: Any,
    ) -> MaskedLMOutput:
        """Logits [B,T,V] of `input_ids`, int64 [B,T]; with `labels` [B,T] (−100: not counted) the mean loss too.

        `attention_mask` is [B,T], 1 where a token is one and 0 where it is padding.
        """
        logits = self.model(input_ids, segments=_segments(attention_mask, input_ids.shape[1]))
        return MaskedLMOutput(loss=_loss(logits, labels), logits=logits)


class _Decodes(HeadwisePreTrainedModel, GenerationMixin):
    """What decoders and encoder–decoders share: the cache."""

    _supports_cache_class = True

    def _cache(self, given: Any, use_cache: bool | None) -> HeadwiseCache | None:
        """The cache of this call: the one given, or a new one where one is wanted."""
        if given is not None and not isinstance(given, HeadwiseCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}; this model decodes with a cache of its own: "
                "leave it out, or give what an earlier call returned"
            )
        return HeadwiseCache(self.model.new_cache()) if given is None and use_cache else given

    def _decode(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        cache: HeadwiseCache | None,
        logits_to_keep: int,
        **read: Tensor | None,
    ) -> Tensor:
        held = cache.held if cache is not None else None
        segments, last = _segments(attention_mask, ids.shape[1]), logits_to_keep == 1
        logits = self.model(ids, segments=segments, cache=held, last=last, **read)
        if cache is not None:
            cache.rows = ids.shape[0]
        return logits[:, -logits_to_keep:] if logits_to_keep else logits

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HeadwiseCache(self.model.new_cache())


class HeadwiseForCausalLM(_Decodes):
    """A decoder."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: HeadwiseCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,V] of `input_ids`, int64 [B,T]; with `labels` (−100: not counted) the mean loss too.

        `attention_mask` is [B, past + T], 1 where a token is one and 0 where it is padding.
        """
        cache = self._cache(past_key_values, use_cache)
        logits = self._decode(input_ids, attention_mask, cache, logits_to_keep)
        loss = _loss(logits[:, :-1], labels[:, 1:]) if labels is not None else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


class _Encoder(torch.nn.Module):
    """The reading half of an encoder–decoder, as `get_encoder` gives it out: the model's own parameters."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList([model.embedding, model.embedding_norm, model.encoder])
        self.encode = model.encode

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any) -> BaseModelOutput:
        """`last_hidden_state` [B,S,C] of `input_ids`, int64 [B,S]; `attention_mask` is [B,S], 0 where it is padding."""
        vectors = self.encode(input_ids, _segments(attention_mask, input_ids.shape[1]))
        return BaseModelOutput(last_hidden_state=vectors)


class HeadwiseForSeq2SeqLM(_Decodes):
    """An encoder–decoder.

    What the decoder writes begins with `generation_config.decoder_start_token_id`; while there is none, with the last
    token that the encoder reads, as it was trained in Headwise. That holds for `generate` and for `labels`.
    """

    def get_encoder(self, modality: str | None = None) -> torch.nn.Module:
        return _Encoder(self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: HeadwiseCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **ignored: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [B,T,V] of `decoder_input_ids`, int64 [B,T]; with `labels` (−100: not counted) the mean loss too.

        The encoder reads `input_ids`, int64 [B,S]; neither these nor `encoder_outputs` (its vectors [B,S,C] first) are
        needed where a cache holds what it has read. Without `decoder_input_ids` the decoder reads before each of the
        `labels` [B,T] the one that goes before. The masks, [B,S] and [B, past + T], are 1 where a token is one and 0
        where it is padding.

        Raises:
            ValueError: the encoder or the decoder has nothing to read.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("the decoder has nothing to read: give decoder_input_ids, or labels")
            first = self._first(input_ids, attention_mask, labels)
            # What is not counted stands at the end as a rule, and nothing that is counted sees it.
            written = labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)
            decoder_input_ids = torch.cat([first[:, None], written], 1)
        cache, read = self._cache(past_key_values, use_cache), {}
        carrier = cache
        if encoder_outputs is not None:
            # Only in a cache does the model take what its encoder has read before.
            carrier = cache if cache is not None else HeadwiseCache(self.model.new_cache())
            vectors = encoder_outputs[0]
            carrier.held.memory = (vectors, _segments(attention_mask, vectors.shape[1]))
        elif input_ids is not None:
            segments = _segments(attention_mask, input_ids.shape[1])
            read = {"encoder_ids": input_ids, "encoder_segments": segments}
        elif cache is None or cache.held.memory is None:
            raise ValueError("the encoder has nothing to read: give input_ids, or encoder_outputs")
        logits = self._decode(decoder_input_ids, decoder_attention_mask, carrier, logits_to_keep, **read)
        return Seq2SeqLMOutput(
            loss=_loss(logits, labels),
            logits=logits,
            past_key_values=cache,  # type: ignore[arg-type]
            encoder_last_hidden_state=carrier.held.memory[0] if carrier is not None else None,
        )

    def _first(self, ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor) -> Tensor:
        """What each row of the decoder begins with, int64 [B]."""
        start = self.generation_config.decoder_start_token_id
        if start is not None:
            return torch.as_tensor(start, device=labels.device).expand(len(labels))
        if ids is None:
            raise ValueError("the decoder has no first token: give input_ids, decoder_input_ids or a start token's id")
        return _last(ids, attention_mask)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **options: Any) -> Any:
        """As in transformers, apart from the token that the decoder begins with."""
        start, begun = "decoder_start_token_id", options.get("decoder_input_ids")
        ids: Any = inputs if inputs is not None else options.get("input_ids")
        given = [options.get(start), getattr(generation_config, start, None), getattr(self.generation_config, start)]
        if all(each is None for each in given) and (ids is not None or begun is not None):
            # One a row. Where a text is begun already, transformers puts no token before its own first.
            first = begun[:, 0] if begun is not None else _last(ids, options.get("attention_mask"))
            options[start] = first.tolist()
        return super().generate(inputs, generation_config, *args, **options)  # type: ignore[misc]


def _segments(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Segments int64 [B,length] of the last tokens of a mask; None where none is padding.

    Padding is a segment of its own, which no token looks at.
    """
    if attention_mask is None or bool(attention_mask.bool().all()):
        return None
    return attention_mask[:, -length:].long() - 1


def _last(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Each row's last token that is no padding, int64 [B] of [B,S]."""
    if attention_mask is None:
        return ids[:, -1]
    places = torch.arange(ids.shape[1], device=ids.device) * (attention_mask != 0)
    return ids.gather(1, places.argmax(1, keepdim=True))[:, 0]


def _loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross-entropy of logits [B,T,V] for labels [B,T], without those that are −100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()) if labels is not None else None
