"""A published model as the teacher: SmolLM2-135M, quantised, with its own tokenizer and grouped queries."""

from __future__ import annotations

from pathlib import Path

from headwise.data import load_tokenizer
from headwise.distill import DistillSettings
from headwise.distill.profile import profile


def test_a_published_teacher_and_what_a_step_makes_of_it(smollm2_path: Path, tmp_path: Path) -> None:
    """Its cache has 3 heads of 64 in 30 layers, which the student's 2 of 4 in 2 layers are matched with."""
    text = tmp_path / "text.txt"
    text.write_text("The city of Paris lies on the river Seine, and has done so for two thousand years. " * 8)
    settings = DistillSettings(
        teacher=str(smollm2_path),
        student="llama(d_model=8, n_layers=2, n_heads=2)",
        data=str(text),
        val_fraction=0.3,
        seq_len=8,
        batch_size=2,
        threads=1,
        logit_kd=(2.0, 0.5),
    )
    found = profile(settings, rounds=1)
    assert found.teacher_shapes["keys"] == found.teacher_shapes["values"] == [2, 30, 3, 8, 64]
    assert found.teacher_shapes["final"] == [2, 8, 576]
    assert found.aligned_shapes == {"k": [2, 2, 2, 8, 4], "v": [2, 2, 2, 8, 4]}
    assert found.params["teacher"] == 134_515_008
    assert found.params["aligner"] == 2 * (2 * 3 + 4 * 64)
    assert found.not_finite == []
    assert load_tokenizer(smollm2_path).vocab_size <= 49_152
