"""Hugging Face folders, read: config.json, and safetensors in one file or in shards with an index."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwise.errors import FormatError, SpecError, short
from headwise.io.hf import family_of
from headwise.io.hf.config import Config
from headwise.io.hf.family import Entry, Family
from headwise.io.json_file import read_object
from headwise.io.tensors import assign, check_fits, common_dtype, module_tensors, read_tensors
from headwise.model import build
from headwise.spec import ModelSpec, count
from headwise.spec.model import model_spec

if TYPE_CHECKING:
    from torch import Tensor

    from headwise.model.base import LanguageModel

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
UNOPENED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".npz", ".ot")  # weights in formats that can run code, mostly
MOST_CONFIG = 1 << 19  # bytes; far above any
HEADS = ("ForCausalLM", "LMHeadModel", "Model")  # how such classes end; the bare model's is tied, or it has none
# One of the folder's own files, and no path to anywhere else.
SHARD = re.compile(r"[A-Za-z0-9][\w.+-]*\.safetensors", re.ASCII)


def hf_spec(path: Path) -> ModelSpec:
    """The line that the folder's config.json amounts to. Raises FormatError."""
    return _described(path)[1]


def load_hf(path: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LanguageModel:
    """The model of a Hugging Face folder, its weights mapped from the file: only what is read is fetched, and only a
    change of `dtype` or `device` makes a copy.

    Raises:
        FormatError: the config asks for what we lack, or the tensors are not those of such a model.
    """
    family, spec = _described(path)
    tensors = named(read_folder(path), family)
    fits_count(spec, tensors, path / CONFIG)
    module = build(spec, device="meta")
    assign(module, rearranged(module, tensors, family, path), device, dtype or common_dtype(tensors))
    return module.eval()


def _described(path: Path) -> tuple[Family, ModelSpec]:
    where = str(path / CONFIG)
    values = read_object(path / CONFIG, MOST_CONFIG)
    config = Config(values, where)
    if "quantization_config" in config:
        raise config.lack("quantised weights", "open the folder of the model in full precision, or a GGUF file of it")
    if "text_config" in config:
        raise config.lack("a model of pictures or sound too", "only models of text alone are supported")
    classes = config.get("architectures", list, None) or ["Model"]
    if not any(isinstance(name, str) and name.endswith(HEADS) for name in classes):
        raise config.lack(short(classes[0]), "only the head that predicts the next token (…ForCausalLM) is supported")
    family = family_of(values.get("model_type"), where)
    return family, as_spec(family, config)


def as_spec(family: Family, config: Config) -> ModelSpec:
    """A config's line. Raises FormatError where it describes no model."""
    try:
        return model_spec(family.fields(config))
    except SpecError as error:
        problems = "; ".join(str(problem) for problem in error.problems)
        raise FormatError(f"{config.where} describes no model: {problems}") from None


def read_folder(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its name in the files. Raises FormatError."""
    if (path / WEIGHTS).is_file():
        return read_tensors(path / WEIGHTS)
    if not (path / INDEX).is_file():
        others = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for p in path.glob(pattern)
        )
        if others:
            raise FormatError(
                f"{path} has its weights in {others[0]}, and only safetensors and GGUF are opened; write it anew with "
                "transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise FormatError(f"{path} holds no weights: {WEIGHTS} or {INDEX} is missing")
    shards = _shards(path / INDEX)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        for name, tensor in read_tensors(path / shard).items():
            if shards.get(name) != shard:
                raise FormatError(f"{path / shard} holds {name!r}, which {INDEX} does not place there")
            tensors[name] = tensor
    missing = next((name for name in shards if name not in tensors), None)
    if missing is not None:
        raise FormatError(f"{path / shards[missing]} lacks {missing!r}, which {INDEX} places there")
    return tensors


def _shards(index: Path) -> dict[str, str]:
    # Every name in the index stands in a shard's header too, so it cannot be larger than they.
    most = max(1 << 16, sum(shard.stat().st_size for shard in index.parent.glob("*.safetensors")))
    places = read_object(index, most, (1 << 14) + most // 64).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{index}: 'weight_map' is missing or no object")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            given = f"{short(name)} lies in {short(shard)}"
            raise FormatError(f"{index}: {given}, and should in a .safetensors file of this folder")
    return places


def named(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors by the names that the family's entries use: those of the bare model get its prefix, and what is no
    weight is left out."""
    bare = not any(name.startswith(family.base) for name in tensors)
    full = {(family.base if bare and name != "lm_head.weight" else "") + name: t for name, t in tensors.items()}
    return {name: tensor for name, tensor in full.items() if not family.unused.search(name)}


def fits_count(spec: ModelSpec, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse a config that describes far more than the files hold, before anything of its size is made."""
    held = sum(tensor.numel() for tensor in tensors.values())
    if spec.dims.n_layers > len(tensors):
        raise FormatError(
            f"{where} describes {spec.dims.n_layers:,} layers, and the files hold {len(tensors):,} tensors"
        )
    if (wanted := count(spec).params) > 2 * held:  # what is a little short is better told by the names that are missing
        raise FormatError(f"{where} describes a model of {wanted:,} parameters, and the files hold {held:,}")


def used_entries(family: Family, spec: ModelSpec, own: Mapping[str, Tensor]) -> Iterator[Entry]:
    """The family's entries whose parameters the model has."""
    return (entry for entry in family.entries(spec) if any(name in own for name in entry.ours))


def rearranged(
    module: LanguageModel, tensors: dict[str, Tensor], family: Family, where: Path
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors as parameters of `module`, which is on the meta device, one entry after another.

    Raises:
        FormatError: a tensor is missing, of another shape, or not part of the model.
    """
    own = module_tensors(module)
    entries = list(used_entries(family, module.spec, own))
    wanted: dict[str, Tensor] = {}
    for entry in entries:
        wanted |= zip(entry.theirs, entry.way.write([own[name] for name in entry.ours]))
    if module.spec.tie_embeddings:
        _check_tied(tensors, family, module.spec, where)
    check_fits(wanted, tensors, where)
    if odd := [name for name in wanted if not tensors[name].is_floating_point()]:
        dtype = str(tensors[odd[0]].dtype).removeprefix("torch.")
        raise FormatError(f"{where}: {odd[0]!r} holds {dtype}, and weights are floating-point; is the model quantised?")
    for entry in entries:
        yield from zip(entry.ours, entry.way.read([tensors[name] for name in entry.theirs]))


def _check_tied(tensors: dict[str, Tensor], family: Family, spec: ModelSpec, where: Path) -> None:
    """Drop a tied head that is stored all the same; it must be the embedding's matrix."""
    theirs = {entry.ours[0]: entry.theirs[0] for entry in family.entries(spec)}
    embedding, name = theirs["embedding.weight"], theirs["head.weight"]
    if (head := tensors.pop(name, None)) is None or embedding not in tensors:
        return
    if not torch.equal(head, tensors[embedding]):
        raise FormatError(
            f"{where / CONFIG} ties the head to the embedding, but {name!r} and {embedding!r} differ; "
            'write "tie_word_embeddings": false where the head is its own'
        )
