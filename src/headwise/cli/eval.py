"""`headwise eval`: the loss of a trained model on a text, the answers it gives, and the tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from headwise.cli.arguments import Arguments, Parser, say, show
from headwise.errors import SettingsError
from headwise.train.settings import Settings

if TYPE_CHECKING:
    from headwise.data import Examples, Tokenizer
    from headwise.data.segments import Format
    from headwise.model.base import LanguageModel
    from headwise.train.evaluation import EvalResult

T = TypeVar("T")
EXAMPLES = """
eval runs/gpt2 --data shakespeare
eval runs/gpt2 --data other.txt --split all --json
eval runs/gpt2 --quantise int4
eval model.gguf --data gsm8k --limit 100 --exact-match
eval model.gguf --tasks arc_easy,hellaswag --limit 100
"""


class EvalSettings(Settings):
    """What a model is evaluated on."""

    data: str = Field("shakespeare", description="shakespeare, a text file, folder, .jsonl, .parquet or hf:owner/name")
    format: Literal["auto", "gsm8k", "chat", "marks", "text"] = Field(
        "auto", description="what rows of .jsonl hold; of all but text the loss of each part is told"
    )
    text_column: str = Field("text", description="column that holds the text in .jsonl, .parquet and hf: data")
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the text, at its end, that is the val split")
    split: Literal["val", "train", "all"] = Field(
        "val", description="what is evaluated: the last val_fraction of the data, what stands before it, or both"
    )
    seq_len: int | None = Field(None, ge=2, description="tokens of a window, default as the model was trained")
    batch_size: int | None = Field(None, ge=1, description="windows at once, default as many as suit the machine")
    quantise: Literal["int8", "int4"] | None = Field(
        None, description="also with the weights in int8 or int4, and what that costs"
    )
    limit: int | None = Field(None, ge=1, description="at most so many examples of a split, or questions of a task")
    exact_match: bool = Field(
        False, description="also let the model answer the examples' questions, and compare the final numbers"
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer")
    shots: int | None = Field(
        None, ge=0, description="examples before each question; default none, and for tasks what they ask for"
    )
    tasks: str | None = Field(
        None, description="tasks of lm-eval in place of the loss, as arc_easy,gsm8k (extra: eval)"
    )
    include_path: Path | None = Field(None, description="folder of tasks of your own (lm-eval's YAML)")
    chat: bool = Field(False, description="ask the tasks with the model's chat template")
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        if self.tasks is None:
            for name in sorted({"include_path", "chat"} & self.model_fields_set):
                yield (name,), f"{name}: is for tasks; name some, as --tasks gsm8k"
        for name in sorted({"exact_match", "quantise"} & self.model_fields_set if self.tasks is not None else ()):
            yield (name,), f"{name}: does not go with tasks; leave one of them out"


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        "eval",
        "A trained model's loss over a whole split, in nats a token and bits a byte, and what it makes of questions.",
        EXAMPLES,
    )
    parser.add_argument("folder", type=Path, metavar="MODEL", help="a training run, or a model with its tokenizer")
    arguments = parser.read(argv, EvalSettings)
    settings = EvalSettings(**arguments.settings)

    from headwise.data import load_tokenizer
    from headwise.io.pretrained import load
    from headwise.train.job import resolve_device

    model = load(arguments.options.folder, device=resolve_device(settings.device))
    tokenizer = load_tokenizer(arguments.options.folder)
    if settings.tasks is not None:
        return _tasks(arguments, settings, model, tokenizer)
    return _loss(arguments, settings, model, tokenizer)


def _loss(arguments: Arguments, settings: EvalSettings, model: LanguageModel, tokenizer: Tokenizer) -> int:
    from headwise.data import load_dataset
    from headwise.data.examples import detected
    from headwise.model.quantise import quantise
    from headwise.train import evaluate
    from headwise.train.evaluation import together_over
    from headwise.train.parts import evaluate_examples, parts_together

    form = detected(settings.data) if settings.format == "auto" else settings.format
    column, share, seq_len, rows = settings.text_column, settings.val_fraction, settings.seq_len, settings.batch_size
    if form == "text" and (wrong := {"exact_match", "limit"} & settings.model_fields_set):
        raise SettingsError([f"{name}: is for examples, and these data are plain text" for name in sorted(wrong)])
    examples = None if form == "text" else _examples(settings, form, tokenizer)
    dataset = examples or load_dataset(settings.data, tokenizer, text_column=column, val_fraction=share)

    def measured() -> EvalResult:
        if examples is not None:
            splits = _of_split(settings, examples.train, examples.val)
            found = [evaluate_examples(model, each, seq_len=seq_len, batch_size=rows) for each in splits]
            return parts_together(found, [each.n_bytes for each in splits])
        texts = _of_split(settings, dataset.train, dataset.val)
        results = [evaluate(model, each, seq_len=seq_len, batch_size=rows) for each in texts]  # type: ignore[arg-type]
        return together_over(results, [each.n_bytes for each in texts])

    result = measured()
    bits = "" if result.bits_per_byte is None else f", {result.bits_per_byte:.4f} bits a byte"
    about = {"val": f"val, its last {share:.0%}", "train": "train", "all": "all of it"}[settings.split]
    about = about if examples is None else settings.split
    text = f"{result.nats:.4f} nats a token{bits}, over {result.n_tokens:,} tokens of {dataset.name} ({about})"
    record = {**asdict(result), "data": dataset.name, "split": settings.split}
    for name, nats in record.get("by_part", {}).items():
        text += f"\n  {name:<10} {nats:.4f}, over {record['tokens_by_part'][name]:,} tokens"
    if settings.exact_match and examples is not None:
        found = _answers(settings, model, examples)
        text += _matches(found)
        record |= {"exact_match": found}
    if settings.quantise is not None:
        quantise(model, settings.quantise)
        small = measured()
        text += f"\n{small.nats:.4f} nats a token in {settings.quantise}: {small.nats - result.nats:+.4f}"
        record |= {"quantised": {"scheme": settings.quantise, **asdict(small)}}
    show(arguments, record, lambda: print(text))
    return 0


def _examples(settings: EvalSettings, form: Format, tokenizer: Tokenizer) -> Examples:
    """What is evaluated, and of the other split what is needed beside it."""
    from headwise.data import load_examples

    return load_examples(
        settings.data,
        tokenizer,
        format=form,
        val_fraction=settings.val_fraction,
        train_limit=settings.limit if settings.split != "val" else max(settings.shots or 0, 1),
        val_limit=settings.limit if settings.split != "train" else 1,
    )


def _of_split(settings: EvalSettings, train: T, val: T) -> list[T]:
    return {"val": [val], "train": [train], "all": [train, val]}[settings.split]


def _answers(settings: EvalSettings, model: LanguageModel, examples: Examples) -> dict[str, Any]:
    from headwise.distill.exact_match import exact_match

    shots = examples.train.texts[: settings.shots or 0]
    texts = [text for each in _of_split(settings, examples.train, examples.val) for text in each.texts]
    asked = [text for text in texts if text not in shots]
    done = 0

    def told(answer: object) -> None:
        nonlocal done
        done += 1
        if done % 10 == 0:
            say(f"{done} of {len(asked)} questions answered")

    found = exact_match(
        model,
        examples.tokenizer,
        asked,
        shots=shots,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size or 8,
        on_answer=told,
    )
    return {**found.figures(), "shots": len(shots)}


def _matches(found: dict[str, Any]) -> str:
    ways = {"strict": "the number behind ####", "flexible": "the last number"}
    lines = [f"\nexact match of {found['questions']:,} questions, {found['shots']} examples before each:"]
    for way, words in ways.items():
        share, low, high = (found[way][name] for name in ("share", "low", "high"))
        lines.append(f"  {way:<10} {share:.1%} ({low:.1%} to {high:.1%}), {words}")
    if found["unanswered"]:
        lines.append(f"  {found['unanswered']:,} were too long for the model")
    return "\n".join(lines)


def _tasks(arguments: Arguments, settings: EvalSettings, model: LanguageModel, tokenizer: Tokenizer) -> int:
    try:
        from headwise.lab.harness import evaluate_tasks
    except ImportError as error:
        raise SettingsError(f"tasks: needs lm-eval ({error}): pip install 'headwise[eval]'") from None

    found = evaluate_tasks(
        model,
        tokenizer,
        [name.strip() for name in str(settings.tasks).split(",") if name.strip()],
        include_path=settings.include_path,
        shots=settings.shots,
        limit=settings.limit,
        chat=settings.chat,
        batch_size=settings.batch_size or 8,
    )
    lines = []
    for task, values in found.items():
        for name, value in values.items():
            metric, _, how = name.partition(",")
            if how and not metric.endswith("_stderr"):
                stderr = values.get(f"{metric}_stderr,{how}")
                spread = "" if stderr is None else f" ± {stderr:.4f}"
                lines.append(f"{task:<24} {metric if how == 'none' else f'{metric} ({how})':<28} {value:.4f}{spread}")
    show(arguments, {"tasks": found}, lambda: print("\n".join(lines)))
    return 0
