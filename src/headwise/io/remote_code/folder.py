"""The folder of a model with its own code: configuration, modeling file, weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.io.atomic import atomic_dir, write_json
from headwise.io.checkpoint import MODEL
from headwise.io.remote_code.bundle import modeling_file
from headwise.io.tensors import module_tensors, write_tensors
from headwise.spec import ModelSpec

if TYPE_CHECKING:
    from headwise.model.base import LanguageModel

MODELING = "modeling_headwise"
# By the line's architecture: the classes in the modeling file for transformers' automatic ones, the model's own first.
CLASSES = {
    "decoder": {"AutoModelForCausalLM": "HeadwiseForCausalLM"},
    "encoder": {"AutoModelForMaskedLM": "HeadwiseForMaskedLM", "AutoModel": "HeadwiseModel"},
    "encoder_decoder": {"AutoModelForSeq2SeqLM": "HeadwiseForSeq2SeqLM"},
}


def save_with_code(module: LanguageModel, folder: Path | str, special_ids: dict[str, int] | None = None) -> str:
    """Write a model so that transformers loads it without Headwise (torch, transformers and pydantic remain needed).

    Args:
        module: the model; its parameters are stored in the dtype they have, bit for bit.
        folder: made, or replaced where it holds such a folder already.
        special_ids: `eos_token_id`, `bos_token_id`, `pad_token_id`, as far as the tokenizer has them.

    Returns:
        The class that it is there.

    Raises:
        FormatError: a mechanism whose source cannot be read.
        WriteError: disk or permission.
    """
    spec = module.spec
    code, about = modeling_file(spec), config(spec)
    tensors = {f"model.{name}": tensor for name, tensor in module_tensors(module).items()}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_dir(Path(folder)) as temporary:
        write_json(temporary / "config.json", {**about, "dtype": dtype, **(special_ids or {})})
        if spec.causal:
            write_json(temporary / "generation_config.json", {"use_cache": True, **(special_ids or {})})
        (temporary / f"{MODELING}.py").write_text(code, encoding="utf-8")
        write_tensors(temporary / MODEL, tensors)
    return about["architectures"][0]


def config(spec: ModelSpec) -> dict[str, Any]:
    """What config.json says of a line: the line, and its sizes under the names tools look for."""
    dims = spec.dims
    classes = CLASSES[spec.architecture]
    return {
        "architectures": [next(iter(classes.values()))],
        "auto_map": {
            "AutoConfig": f"{MODELING}.HeadwiseConfig",
            **{auto: f"{MODELING}.{name}" for auto, name in classes.items()},
        },
        "model_type": "headwise",
        "is_encoder_decoder": spec.architecture == "encoder_decoder",
        "line": str(spec),
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.d_model,
        "num_hidden_layers": dims.n_layers,
        "num_attention_heads": dims.n_heads,
        "max_position_embeddings": dims.max_seq_len,
        "tie_word_embeddings": spec.tie_embeddings,
    }
