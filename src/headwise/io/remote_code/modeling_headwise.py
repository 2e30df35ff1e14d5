"""A Headwise model as a Hugging Face class.

Nothing else of Headwise is needed: the modules that the line uses are in `SOURCES` below and are imported from there,
under a name of their own. `HeadwiseForCausalLM` is the module that Headwise builds from `config.line`, with the
interface of transformers' models: `model(input_ids, attention_mask, past_key_values, labels)`, `generate`.
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
from transformers.modeling_outputs import CausalLMOutputWithPast

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


class HeadwiseForCausalLM(PreTrainedModel, GenerationMixin):
    """`model`: the module that Headwise builds from the line."""

    config_class = HeadwiseConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = True
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
        if past_key_values is not None and not isinstance(past_key_values, HeadwiseCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model decodes with a cache of its own: "
                "leave it out, or give what an earlier call returned"
            )
        if past_key_values is None and use_cache and self.model.spec.causal:
            past_key_values = HeadwiseCache(self.model.new_cache())
        cache = past_key_values.held if past_key_values is not None else None
        segments = None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            # Padding is a segment of its own, which no token looks at.
            segments = attention_mask[:, -input_ids.shape[1] :].long() - 1
        logits = self.model(input_ids, segments=segments, cache=cache)
        if past_key_values is not None:
            past_key_values.rows = input_ids.shape[0]
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **more: Any
    ) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HeadwiseCache(self.model.new_cache())
