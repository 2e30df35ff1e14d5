"""Text into batches: corpora, tokenizers, packed token files and the order in which they are seen.

dataset = load_dataset("shakespeare", "char")
batch = Batches(dataset.train, batch_size=12, seq_len=64, seed=0).batch(step=0)
batch.ids, batch.targets                                    # int64 [12, 64]

examples = load_examples("gsm8k", "models/smollm2")         # rows whose parts are known: prompt, reasoning, answer
batch = WindowBatches(examples.train, batch_size=8, seq_len=256, seed=0).batch(step=0)
"""

from __future__ import annotations

from headwise.data.batches import IGNORE, Batch, Batches, eval_batches
from headwise.data.examples import Examples, ExampleSet, load_examples
from headwise.data.pack import Dataset, Tokens, default_cache_dir, load_dataset
from headwise.data.tokenizers import Tokenizer, load_tokenizer
from headwise.data.windows import WindowBatches, Windows, eval_windows

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Dataset",
    "ExampleSet",
    "Examples",
    "Tokenizer",
    "Tokens",
    "WindowBatches",
    "Windows",
    "default_cache_dir",
    "eval_batches",
    "eval_windows",
    "load_dataset",
    "load_examples",
    "load_tokenizer",
]
