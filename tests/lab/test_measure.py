"""Speed and memory: what is measured, in which order, and what happens to a line that cannot be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_comparisons import GPT2, LLAMA, write_corpus

from headwise.data import Dataset, load_dataset
from headwise.lab import measure
from headwise.lab.runner import Pool, Task, WorkerSetup
from headwise.train import TrainSettings
from headwise.train.guards import StopRequest


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def dataset(corpus: Path) -> Dataset:
    return load_dataset(corpus)


def settings(corpus: Path, **changes: Any) -> TrainSettings:
    return TrainSettings(**{"data": str(corpus), "seq_len": 32, "batch_size": 4, "threads": 1, **changes})


def test_one_entry_a_round_for_every_line(corpus: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLICE_SECONDS", 0.001)
    found = measure.speed([GPT2, LLAMA], settings(corpus), dataset, 3)
    for each in found:
        assert {name: len(values) for name, values in each.items()} == {
            "train_tokens_per_s": 3,
            "decode_tokens_per_s": 3,
        }
        assert min(each["train_tokens_per_s"] + each["decode_tokens_per_s"]) > 0
    (only,) = measure.speed([GPT2], settings(corpus), dataset, 1, decode=False)
    assert only["decode_tokens_per_s"] == []


def test_the_order_rotates_and_all_do_the_same_steps(
    corpus: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rotation the first of every round would always meet the machine in the state the last one left."""
    order: list[tuple[int, int]] = []
    lines = [GPT2, LLAMA, "gpt2(d_model=16, n_layers=1, n_heads=2)"]
    widths = {32: 0, 16: 2}

    def note(self: Any, steps: int, *, decode: bool) -> None:
        spec = self._job.spec
        order.append((1 if spec.preset == "llama" else widths[spec.d_model], steps))

    monkeypatch.setattr(measure._Timed, "measure", note)
    measure.speed(lines, settings(corpus), dataset, 4)
    assert [index for index, _ in order] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert len({steps for _, steps in order}) == 1


def test_a_line_whose_training_fails_has_no_speed_and_stops_no_other(corpus: Path, dataset: Dataset) -> None:
    broken = "gpt2(d_model=32, n_layers=1, n_heads=2, init_std=1e30)"
    found = measure.speed([broken, GPT2], settings(corpus), dataset, 1)
    assert found[0] == {"train_tokens_per_s": [], "decode_tokens_per_s": []}
    assert len(found[1]["train_tokens_per_s"]) == 1


def test_an_encoder_decodes_nothing(corpus: Path, dataset: Dataset) -> None:
    (found,) = measure.speed([GPT2.replace(")", ", architecture=encoder)")], settings(corpus), dataset, 1)
    assert found["decode_tokens_per_s"] == []
    assert len(found["train_tokens_per_s"]) == 1


def test_memory_is_that_of_the_model(corpus: Path) -> None:
    """Parameters, gradients, two moments: 16 bytes a parameter at least; and a fourth of them takes about a fourth."""
    lines = [f"gpt2(d_model={width}, n_layers=4, n_heads=4)" for width in (128, 256)]
    about = settings(corpus, batch_size=1).model_dump(mode="json")
    with Pool(1, WorkerSetup(), StopRequest(), one_task_each=True) as pool:
        outcomes = pool.run([Task("memory", "memory", {"line": line, "settings": about}) for line in lines])
    assert [outcome.error for outcome in outcomes] == [None, None]
    small, large = (outcome.value for outcome in outcomes)
    assert large > 16 * 3.15e6
    assert large < 3 * 16 * 3.15e6
    assert 2.5 < large / small < 5
