"""Several teachers at once, and teachers with a tokenizer of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_distillations import QUICK, check_same_student, run

import headwise as hw
from headwise.distill import DistillSettings, resume
from headwise.distill.job import prepare, settled
from headwise.distill.router import Router, mixture_loss, prompts
from headwise.distill.trainer import DistillTrainer
from headwise.errors import SettingsError
from headwise.train import train

UNTRAINED = "llama(d_model=8, n_layers=2, n_heads=2)"


def reader_of(tokenizer: str, text_file: Path, out: Path) -> Path:
    """A teacher trained for a moment with that tokenizer."""
    sizes = {"seq_len": 16, "steps": 5, "threads": 1, "eval_every": 0}
    train("llama(d_model=16, n_layers=3, n_heads=2)", data=str(text_file), tokenizer=tokenizer, out=out, **sizes)
    return out


@pytest.fixture(scope="module")
def foreign(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that reads tokens of several characters."""
    return reader_of("bpe:300", text_file, tmp_path_factory.mktemp("foreign") / "run")


@pytest.fixture(scope="module")
def bytewise(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with other ids for the same characters."""
    return reader_of("byte", text_file, tmp_path_factory.mktemp("bytes") / "run")


# ---- several ----


def test_a_teacher_of_weight_zero_teaches_nothing(teacher: Path, text_file: Path) -> None:
    both = (str(teacher), UNTRAINED)
    options = {"logit_kd": (2.0, 0.5), "hidden": 0.2, "clip": 0.0}
    check_same_student(run(teacher, text_file, **options), run(both, text_file, teacher_weights=(3.0, 0.0), **options))


def test_two_of_one_teacher_are_one(teacher: Path, text_file: Path) -> None:
    """Equal shares of the same, up to rounding; with projectors that are not trained, for those would differ."""
    options = {"freeze_projector": True, "logit_kd": (1.0, 1.0)}
    one = run(teacher, text_file, **options)
    two = run((str(teacher), str(teacher)), text_file, **options)
    assert two.val_loss == pytest.approx(one.val_loss, abs=1e-4)
    for name in ("loss_k", "loss_logits"):
        assert two.history[0][name] == pytest.approx(one.history[0][name], rel=1e-5)
    assert two.teachers == (str(teacher), str(teacher))


def test_the_router_finds_the_teacher_that_knows_the_text(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    """It begins with equal shares and comes to prefer the trained one; and goes on to the same bits."""
    out, options = tmp_path / "run", {"teacher_weights": "router", "lr": 3e-2, "steps": 30, "log_every": 1}
    result = run((UNTRAINED, str(teacher)), text_file, out=out, eval_every=0, checkpoint_every=20, **options)
    shares = [record["teacher_shares"] for record in result.history]
    assert all(sum(each) == pytest.approx(1) for each in shares)
    assert shares[0] == pytest.approx([0.5, 0.5])
    assert shares[-1][1] > 0.7
    assert result.history[-1]["loss_router"] < result.history[0]["loss_router"]
    (out / "checkpoints" / "step-000030" / "model.safetensors").write_bytes(b"")
    again = resume(out, warn=lambda text: None)
    check_same_student(result, again)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(1, 6))
def test_mixture_is_the_likelihood_of_a_mixture(n_rows: int, n_teachers: int, n_tokens: int) -> None:
    torch.manual_seed(n_rows)
    logits = [torch.randn(n_rows, n_tokens, 5) for _ in range(n_teachers)]
    shares_BN = torch.rand(n_rows, n_teachers).softmax(-1)
    targets_BT = torch.randint(0, 5, (n_rows, n_tokens))
    targets_BT[0, 0] = -100
    values = [
        sum(shares_BN[b, n] * logits[n][b, t].softmax(-1)[targets_BT[b, t]] for n in range(n_teachers)).log()
        for b in range(n_rows)
        for t in range(n_tokens)
        if targets_BT[b, t] >= 0
    ]
    wanted = -torch.stack(values).mean() if values else torch.zeros(())
    torch.testing.assert_close(mixture_loss(shares_BN, logits, targets_BT), wanted)


def test_the_router_reads_the_prompt_alone() -> None:
    torch.manual_seed(0)
    router, x_BTC = Router(4, 3), torch.randn(2, 8, 4)
    torch.nn.init.normal_(router.shares.weight)
    prompt_BT = prompts(torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [1] * 8]), 0)
    assert prompt_BT.sum(1).tolist() == [3, 2]
    other = x_BTC + ~prompt_BT[..., None] * torch.randn(2, 8, 4)
    assert torch.equal(router(x_BTC, prompt_BT), router(other, prompt_BT))
    assert prompts(torch.zeros(1, 8, dtype=torch.int64), None).sum() == 2


# ---- with a tokenizer of its own ----


def test_aligned_by_characters(foreign: Path, text_file: Path, tmp_path: Path) -> None:
    """Live and from the cache alike, to the bit; and the student keeps its own tokenizer."""
    options = {"align": "spans", "tokenizer": "char", "hidden": 0.2, "structural_loss": True}
    live = run(foreign, text_file, out=tmp_path / "live", **options)
    cached = run(
        foreign,
        text_file,
        out=tmp_path / "cached",
        cache_teacher=True,
        cache_dtype="float32",
        cache_dir=tmp_path / "cache",
        **options,
    )
    check_same_student(live, cached)
    assert live.spec.dims.vocab_size < 60
    assert all(live.history[-1][f"loss_{name}"] > 0 for name in ("k", "v", "hidden", "struct"))
    assert all(value is not None for value in live.likeness["cka_v"])


def test_one_token_a_character_on_both_sides_is_no_alignment(bytewise: Path, text_file: Path) -> None:
    """Bytes of plain English are its characters: the teacher reads the window itself, under other ids."""
    options = {**QUICK, "teacher": str(bytewise), "student": UNTRAINED, "data": str(text_file)}
    job = prepare(settled(DistillSettings(**options, tokenizer="char", align="spans")))
    trainer = DistillTrainer(job)
    part = trainer.lesson(trainer.batches.batch(0))
    seen = trainer.look(0, part, {"keys"})
    assert seen.segments is not None
    assert torch.equal(*seen.segments)
    texts = [job.dataset.tokenizer.decode(ids) for ids in part.ids_BT.tolist()]
    ids_BT = torch.tensor([list(text.encode()) for text in texts])
    assert torch.equal(seen.signals["keys"], job.teachers[0].signals(ids_BT, torch.full((2,), 16), {"keys"})["keys"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"teacher: .* has another tokenizer \(300 ids, the student's 52\).*--align spans"),
        ({"align": "spans", "logit_kd": (1.0, 1.0)}, r"logit_kd: .* has another vocabulary"),
        ({"align": "spans", "side": "student"}, "side: student is for tokens that are the teacher's"),
    ],
)
def test_unlike_vocabularies(
    changes: dict[str, object], message: str, foreign: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(foreign, text_file, tokenizer="char", out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_weights_alone_read_any_ids_that_they_have(teacher: Path, text_file: Path, tmp_path: Path) -> None:
    """A teacher without a tokenizer is taken at its word, as far as its vocabulary goes."""
    hw.save_pretrained(hw.load(teacher), tmp_path / "bare")
    assert run(tmp_path / "bare", text_file, tokenizer="char").steps == 6
    with pytest.raises(SettingsError, match="tokenizer: neither teacher nor student brings one"):
        run(tmp_path / "bare", text_file)
    with pytest.raises(SettingsError, match="teacher: its vocabulary is 52, the data need 256 ids"):
        run(tmp_path / "bare", text_file, tokenizer="byte")


def test_a_router_wants_one_vocabulary(foreign: Path, teacher: Path, text_file: Path) -> None:
    with pytest.raises(SettingsError, match=r"teacher_weights: .* has another vocabulary"):
        run((str(teacher), str(foreign)), text_file, align="spans", teacher_weights="router")
