"""From settings to the concrete thing to distil: teachers, student, data and caches that fit each other. What does not
fit is said here, before any training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.data.examples import load_examples
from headwise.data.spans import TeacherWindows
from headwise.data.tokenizers import load_tokenizer
from headwise.data.windows import Windows
from headwise.distill.caching import sketch, store_of
from headwise.distill.mixing import check_layerwise
from headwise.distill.recipes import stages_of
from headwise.distill.settings import DistillSettings
from headwise.distill.teacher import Teacher, is_saved
from headwise.errors import DataError, SettingsError, SpecError
from headwise.io.json_file import read_object
from headwise.io.pretrained import saved_spec
from headwise.spec import ModelSpec, parse
from headwise.train.job import Job, pinned, resolve_device
from headwise.train.vein import check_vein, with_last_tau

if TYPE_CHECKING:
    from headwise.data.examples import Examples
    from headwise.data.tokenizers import Tokenizer

SWAP = "swap.json"  # what `headwise swap` leaves beside the new model: {"from": the old one's path}


@dataclass(frozen=True)
class DistillJob(Job):
    """What is distilled. `spec` is the student's, resolved.

    Attributes:
        teachers: in the order given; `shares` are what each counts, adding up to 1.
        start: the model whose weights the student begins with; None: fresh ones.
    """

    settings: DistillSettings
    dataset: Examples  # type: ignore[assignment]
    teachers: tuple[Teacher, ...] = ()
    start: Path | None = None

    @property
    def shares(self) -> list[float]:
        given = self.settings.teacher_weights
        weights = given if isinstance(given, tuple) and given else (1.0,) * len(self.teachers)
        return [weight / sum(weights) for weight in weights]


def settled(settings: DistillSettings) -> DistillSettings:
    """The settings with what recipe and surroundings decide written down, files as absolute paths."""
    settings = settings.with_recipe()
    own_tokenizer = settings.tokenizer
    teacher = settings.teacher
    if not teacher:
        teacher = (_before_swap(str(settings.student), settings.recipe),)
    update = {
        "teacher": tuple(str(Path(each).absolute()) if is_saved(each) else each for each in teacher),
        "student": str(Path(str(settings.student)).absolute()) if is_saved(str(settings.student)) else settings.student,
        "cache_dir": settings.cache_dir and settings.cache_dir.absolute(),
    }
    settings = pinned(settings).model_copy(update=update)  # type: ignore[assignment]
    return settings.model_copy(update={"tokenizer": "teacher"}) if own_tokenizer == "teacher" else settings


def _before_swap(student: str, recipe: str) -> str:
    """The model that a swapped one was made from."""
    about = Path(student) / SWAP
    if not about.is_file():
        raise SettingsError(
            f"teacher: none given, and {student} does not say what it was made from; {recipe} takes the folder that "
            "`headwise swap` wrote, or give --teacher"
        )
    return str(read_object(about, 1 << 20).get("from"))


def prepare(settings: DistillSettings, line: str | None = None) -> DistillJob:
    """Load teachers and data, and resolve the student for them. `line`: the student's, where a run goes on.

    Raises `SettingsError`, `SpecError`, `FormatError`, `DataError`, `HeadwiseError` for what does not fit.
    """
    device, student = resolve_device(settings.device), str(settings.student)
    if settings.dtype == "float16" and device.type != "cuda":
        raise SettingsError(f"dtype: float16 needs a CUDA GPU, the device is {device}; use bfloat16 or float32")
    start = Path(student) if is_saved(student) and line is None else None
    spec = parse(line) if line is not None else saved_spec(student) if start is not None else _line("student", student)
    if spec.architecture != "decoder":
        raise SettingsError(f"student: {student} is an {spec.architecture}; a causal decoder is wanted")
    for name in settings.teacher:
        if not is_saved(name):
            _line("teacher", name)
    loaded = {name: Teacher.load(name, device) for name in settings.teacher if is_saved(name)}
    tokenizer = _tokenizer(settings, loaded)
    dataset = load_examples(
        settings.data,
        tokenizer,
        format=settings.format,
        text_column=settings.text_column,
        val_fraction=settings.val_fraction,
        train_limit=settings.train_limit,
        val_limit=settings.val_limit,
        keep_texts=settings.align == "spans",
    )
    needed = dataset.tokenizer.vocab_size
    untrained = [name for name in settings.teacher if name not in loaded]
    loaded |= {name: Teacher.load(name, device, vocab_size=needed, seq_len=settings.seq_len) for name in untrained}
    teachers = tuple(loaded[name] for name in settings.teacher)
    spec = spec.resolve(
        size=settings.size or ("10m" if device.type == "cuda" else "1m"),
        vocab_size=needed,
        max_seq_len=settings.seq_len,
    )
    _check_sizes(spec, settings, needed, "student")
    for teacher in teachers:
        _check_words(teacher, dataset.tokenizer, settings)
        _check_sizes(teacher.spec, settings, needed if teacher.reads(dataset.tokenizer) else None, "teacher")
        sketch(teacher, spec, settings)  # shapes that do not fit
        if any(stage.layerwise for stage in stages_of(settings)):
            check_layerwise(spec, teacher.spec)
    check_vein(spec, settings)
    if settings.epochs is not None:
        windows = len(Windows(dataset.train, settings.seq_len, settings.loss_on))
        steps = math.ceil(settings.epochs * windows / (settings.batch_size * settings.accumulate))
        settings = DistillSettings(**{**settings.model_dump(exclude_unset=True), "epochs": None, "steps": steps})
    for teacher in teachers:
        if not teacher.reads(dataset.tokenizer):
            teacher.windows = _reread(teacher, dataset, settings)
    job = DistillJob(with_last_tau(spec, settings), settings, dataset, device, teachers, start)
    if settings.cache_teacher:
        for teacher in teachers:
            teacher.store = store_of(job, teacher)
    return job


def _line(role: str, text: str) -> ModelSpec:
    """The line; who gives a single word may as well have meant a folder."""
    try:
        return parse(text)
    except SpecError as error:
        if "(" in text:
            raise
        raise SettingsError(f"{role}: there is no file or folder {text!r}, and as a line: {error}") from None


def _tokenizer(settings: DistillSettings, teachers: dict[str, Teacher]) -> Tokenizer | str:
    """What turns the text into the student's ids."""
    if settings.tokenizer != "teacher":
        return settings.tokenizer
    student = str(settings.student)
    if is_saved(student):
        try:
            return load_tokenizer(student)
        except DataError:  # weights alone: it reads what its teacher reads
            pass
    for teacher in teachers.values():
        if teacher.tokenizer is not None:
            return teacher.tokenizer
    if not teachers and not is_saved(student):
        return "char"  # lines alone, for a trial; any will do
    raise SettingsError("tokenizer: neither teacher nor student brings one; name one, as --tokenizer char")


def _check_sizes(spec: ModelSpec, settings: DistillSettings, vocab: int | None, who: str) -> None:
    if vocab is not None and spec.dims.vocab_size < vocab:
        raise SettingsError(
            f"{who}: its vocabulary is {spec.dims.vocab_size}, the data need {vocab} ids; leave vocab_size out, or "
            "choose its own tokenizer"
        )
    if spec.dims.max_seq_len < settings.seq_len:
        raise SettingsError(
            f"seq_len: {settings.seq_len} is more than the {who}'s max_seq_len={spec.dims.max_seq_len}; choose at most "
            f"{spec.dims.max_seq_len}"
        )


def _check_words(teacher: Teacher, tokenizer: Tokenizer, settings: DistillSettings) -> None:
    """Whether the teacher's ids mean what the student's do, or the two can be aligned."""
    if teacher.reads(tokenizer):
        return
    assert teacher.tokenizer is not None
    sizes = f"{teacher.tokenizer.vocab_size:,} ids, the student's {tokenizer.vocab_size:,}"
    if settings.align == "none":
        raise SettingsError(
            f"teacher: {teacher.name} has another tokenizer ({sizes}); align the two by characters with --align spans, "
            "or give the student the teacher's with --tokenizer teacher"
        )
    if settings.logit_kd is not None:
        raise SettingsError(
            f"logit_kd: {teacher.name} has another vocabulary ({sizes}), so predictions cannot be compared; leave "
            "logit_kd out, or use --tokenizer teacher"
        )
    if settings.teacher_weights == "router":
        raise SettingsError(
            f"teacher_weights: {teacher.name} has another vocabulary ({sizes}), and a router compares predictions; "
            "give fixed weights"
        )


def _reread(teacher: Teacher, dataset: Examples, settings: DistillSettings) -> dict[str, TeacherWindows]:
    """Both splits in the teacher's own tokens."""
    assert teacher.tokenizer is not None
    splits = {"train": dataset.train, "val": dataset.val}
    windows = {name: Windows(split, settings.seq_len, settings.loss_on) for name, split in splits.items()}
    made = {name: TeacherWindows(each, dataset.tokenizer, teacher.tokenizer) for name, each in windows.items()}
    longest, most = max(each.seq_len for each in made.values()), teacher.spec.dims.max_seq_len
    if longest > most:
        raise SettingsError(
            f"seq_len: windows of {settings.seq_len} are up to {longest} of the teacher's tokens, more than its "
            f"max_seq_len={most}; choose a smaller seq_len"
        )
    return made
