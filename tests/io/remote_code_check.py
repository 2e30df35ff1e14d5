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
from transformers import AutoModelForCausalLM  # noqa: E402

N_NEW = 6


def check(folder: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    held = load_file(f"{folder}/expected.safetensors")
    ids = held["ids"]
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = model(ids, labels=ids)
    plain = model.generate(ids, **options)
    padded = torch.cat([torch.zeros(len(ids), 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 3).long().expand_as(padded)
    loss = torch.nn.functional.cross_entropy(held["logits"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return {
        "type": type(model).__name__,
        # A mapped file may lie otherwise in memory than the model did, which can change last bits of a product.
        "logits": torch.allclose(out.logits, held["logits"], atol=1e-5, rtol=1e-5),
        "loss": torch.allclose(out.loss, loss, atol=1e-5),
        "uncached": torch.equal(plain, model.generate(ids, use_cache=False, **options)),
        "padded": torch.equal(plain, model.generate(padded, attention_mask=mask, **options)[:, 3:]),
        "greedy": torch.equal(plain, held["greedy"]),
        "beams": torch.equal(
            model.generate(ids, num_beams=3, **options), model.generate(ids, num_beams=3, use_cache=False, **options)
        ),
    }


def harness(folder: str, pairs: list[tuple[str, str]]) -> list[float]:
    """The log-probability of each second text after the first, as lm-eval takes it."""
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=folder, trust_remote_code=True, batch_size=2, device="cpu")
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    return [logprob for logprob, _ in lm.loglikelihood(asked, disable_tqdm=True)]


if __name__ == "__main__":
    folders, pairs = sys.argv[1:-1], json.loads(sys.argv[-1])
    found = [check(folder) for folder in folders]
    print(json.dumps({"checks": found, "harness": harness(folders[-1], [(a, b) for a, b in pairs])}))
