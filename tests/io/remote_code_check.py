"""Run by test_remote_code.py in a process where Headwise cannot be imported: loads folders as their users do."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any


class Absent(MetaPathFinder):
    """Headwise is not installed here."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "headwise" or name.startswith("headwise."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
warnings.simplefilter("error")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

N_NEW = 6
OPTIONS = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}


def close(a: Tensor, b: Tensor, share: float = 1e-5) -> bool:
    """Whether two tensors agree to a share of the largest number."""
    # A mapped file may lie otherwise in memory than the model did, and there may be more threads: either can change
    # last bits of a product.
    return torch.allclose(a, b, atol=share * max(1.0, b.abs().max().item()), rtol=0)


def check(folder: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto, ways = next(pair for pair in CHECKS.items() if pair[0].__name__ in config.auto_map)
    model = auto.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found = ways(model, load_file(f"{folder}/expected.safetensors"), folder)
    return {"type": type(model).__name__, **found}


def decoder(model: Any, held: dict[str, Tensor], folder: str) -> dict[str, bool]:
    ids, options = held["ids"], OPTIONS
    out = model(ids, labels=ids)
    plain = model.generate(ids, **options)
    padded = torch.cat([torch.zeros(len(ids), 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    loss = torch.nn.functional.cross_entropy(held["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return {
        "logits": close(out.logits, held["logits"]),
        "loss": close(out.loss, loss),
        "uncached": torch.equal(plain, model.generate(ids, use_cache=False, **options)),
        "padded": torch.equal(plain, model.generate(padded, attention_mask=mask, **options)[:, 3:]),
        "greedy": torch.equal(plain, held["greedy"]),
        "beams": torch.equal(
            model.generate(ids, num_beams=3, **options), model.generate(ids, num_beams=3, use_cache=False, **options)
        ),
    }


def padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Two rows with their mask: the first, and 7 tokens of the second beside tokens that are none."""
    none = torch.full((ids.shape[1] - 7,), 39)
    row, mask = torch.ones_like(ids), torch.ones_like(ids)
    row[0] = ids[0]
    row[1] = torch.cat([none, ids[1, :7]] if side == "left" else [ids[1, :7], none])
    mask[1] = torch.cat([none * 0, mask[1, :7]] if side == "left" else [mask[1, :7], none * 0])
    return row, mask


def encoder(model: Any, held: dict[str, Tensor], folder: str) -> dict[str, bool]:
    ids = held["ids"]
    labels = torch.where(torch.arange(ids.shape[1]) % 3 == 0, ids, -100)
    loss = torch.nn.functional.cross_entropy(held["logits"][:, ::3].flatten(0, 1), ids[:, ::3].flatten())
    out = model(ids, labels=labels)
    found = {"logits": close(out.logits, held["logits"]), "loss": close(out.loss, loss)}
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for side in ("left", "right"):
        rows, mask = padded(ids, side)
        logits = model(rows, attention_mask=mask).logits
        found[side] = close(logits[0], held["logits"][0]) and close(logits[1][mask[1] == 1], held["short"][0])
        vectors = base(rows, attention_mask=mask).last_hidden_state
        found[f"vectors {side}"] = close(model.model.logits(vectors), logits)
    return found


def refused(model: Any, message: str, **given: Tensor) -> bool:
    try:
        model(**given)
    except ValueError as error:
        return str(error).startswith(message) and "\n" not in str(error)
    return False


def encoder_decoder(model: Any, held: dict[str, Tensor], folder: str) -> dict[str, bool]:
    read, ids, labels = held["read"], held["ids"], held["labels"]
    taught = model(read, labels=labels)
    some = labels.clone()
    some[:, 4:] = -100
    loss = torch.nn.functional.cross_entropy(held["logits"][:, :4].flatten(0, 1), labels[:, :4].flatten())
    found = {
        "logits": close(model(read, decoder_input_ids=ids).logits, held["logits"]),
        "loss": close(taught.loss, held["loss"]),
        "taught": close(taught.logits, held["logits"]),
        "not counted": close(model(read, labels=some).loss, loss),
        "refused": refused(model, "the decoder has nothing to read: give decoder_input_ids, or labels", input_ids=read)
        and refused(model, "the decoder has no first token: give input_ids, decoder_input_ids or a", labels=labels)
        and refused(model, "the encoder has nothing to read: give input_ids, or encoder_out", decoder_input_ids=ids),
    }
    runs: list[int] = []
    hook = model.model.encoder.register_forward_hook(lambda *about: runs.append(1))
    for side in ("left", "right"):
        rows, mask = padded(read, side)
        out = model(rows, attention_mask=mask, decoder_input_ids=ids)
        found[side] = close(out.logits[0], held["logits"][0]) and close(out.logits[1], held["short"][0])
        masked = {"attention_mask": mask, **OPTIONS}
        begins = torch.stack([read[0, -1], read[1, 6]])[:, None]
        greedy = torch.cat([begins, held["greedy"]], 1)
        runs.clear()
        found[f"greedy {side}"] = torch.equal(model.generate(rows, **masked), greedy) and len(runs) == 1
        found[f"uncached {side}"] = torch.equal(model.generate(rows, use_cache=False, **masked), greedy)
        beams = model.generate(rows, num_beams=3, **masked)
        found[f"beams {side}"] = torch.equal(beams, model.generate(rows, num_beams=3, use_cache=False, **masked))
        further = model.generate(rows, decoder_input_ids=ids[:, 1:4], **masked)
        logits = model(rows, attention_mask=mask, decoder_input_ids=further[:, :-1]).logits[:, 2:]
        found[f"begun {side}"] = torch.equal(further, torch.cat([ids[:, 1:4], logits.argmax(-1)], 1))
        # What was read before: handed over, or in the cache.
        outputs = model.get_encoder()(rows, attention_mask=mask)
        again = model(encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=ids)
        first = model(rows, attention_mask=mask, decoder_input_ids=ids[:, :-2], use_cache=True)
        rest = model(decoder_input_ids=ids[:, -2:], past_key_values=first.past_key_values)
        found[f"handed over {side}"] = close(again.logits, out.logits)
        found[f"in the cache {side}"] = close(rest.logits, out.logits[:, -2:])
        found[f"vectors {side}"] = close(first.encoder_last_hidden_state, outputs.last_hidden_state)
        # Padding in what the decoder reads, in a row without any for the encoder, and in one with.
        late = torch.cat([ids[:, :2] * 0, ids], 1)
        late_mask = (torch.arange(late.shape[1]) >= 2).long().expand_as(late)
        padded_twice = model(rows, attention_mask=mask, decoder_input_ids=late, decoder_attention_mask=late_mask)
        found[f"late {side}"] = close(padded_twice.logits[:, 2:], out.logits, share=1e-4)  # sums in another order
    hook.remove()
    model.generation_config.decoder_start_token_id = 5
    begun = torch.cat([torch.full((2, 1), 5), labels[:, :-1]], 1)
    found["told to begin"] = close(
        model(read, labels=labels).logits, model(read, decoder_input_ids=begun).logits
    ) and bool((model.generate(read, **OPTIONS)[:, 0] == 5).all())
    return found


CHECKS = {
    AutoModelForCausalLM: decoder,
    AutoModelForMaskedLM: encoder,
    AutoModelForSeq2SeqLM: encoder_decoder,
}


def harness(folder: str, pairs: list[tuple[str, str]]) -> list[float]:
    """The log-probability of each second text after the first, as lm-eval takes it."""
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=folder, trust_remote_code=True, batch_size=2, device="cpu")
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    return [logprob for logprob, _ in lm.loglikelihood(asked, disable_tqdm=True)]


def accumulates(folder: str) -> bool:
    """Whether Trainer makes the same step of two texts in one pass and in two."""
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainingArguments

    held, heads = load_file(f"{folder}/expected.safetensors"), []
    texts = [{"input_ids": read, "labels": labels} for read, labels in zip(held["read"], held["labels"])]
    for rows in (1, 2):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
        arguments = TrainingArguments(
            f"{folder}/trained", max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=2 // rows,
            optim="sgd", learning_rate=0.1, max_grad_norm=0, lr_scheduler_type="constant", use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        before = model.model.head.weight.detach().clone()
        Trainer(model, arguments, train_dataset=texts).train()
        heads.append(model.model.head.weight.detach() - before)
    largest = heads[0].abs().max().item()
    # Gradients of some hundreds blow last bits up; counted twice, a step would be twice as long.
    return largest > 1e-4 and torch.allclose(*heads, atol=1e-2 * largest)


if __name__ == "__main__":
    folders, pairs = sys.argv[1:-1], json.loads(sys.argv[-1])
    checks = [check(folder) for folder in folders]
    encoder_decoders = [folder for folder, found in zip(folders, checks) if "taught" in found]
    answer = {
        "checks": checks,
        "accumulates": accumulates(encoder_decoders[0]),
        "harness": harness(folders[-1], [(a, b) for a, b in pairs]),
    }
    print(json.dumps(answer))
