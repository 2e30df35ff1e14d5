"""`headwise generate`: text from a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from headwise.cli.arguments import Parser, say
from headwise.cli.writing import converse, tell, write_file
from headwise.errors import DataError, SettingsError
from headwise.train.settings import Settings

if TYPE_CHECKING:
    from headwise.data import Tokenizer
    from headwise.generate import Request, Sampling
    from headwise.generate.beam import Beams
    from headwise.generate.constraints import Constraint
    from headwise.generate.writer import Writer

EXAMPLES = """
generate runs/gpt2 --prompt 'ROMEO:'
generate runs/gpt2 --prompt 'To be' --max-new-tokens 500 --temperature 0.8 --top-k 40 --seed 7
generate model.gguf --chat
generate model.gguf --prompt 'A colour: ' --regex '(red|green|blue)' --json
generate models/large --draft models/small --temperature 0 --prompt-file question.txt
generate model.gguf --batch prompts.jsonl --out answers.jsonl --batch-size 16
"""

# What a search for the likeliest text has no use for.
DRAWN: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
DRAWN += ("chat", "logprobs", "json_schema", "regex", "draft", "ngram")
APART: tuple[tuple[str, ...], ...] = (
    ("prompt", "prompt_file", "batch"),
    ("chat", "batch"),
    ("draft", "ngram"),
    ("compile", "batch"),
    ("compile", "beams"),
    ("compile", "draft"),
    ("compile", "ngram"),
    ("json_schema", "regex"),
)
# What does something only beside something else.
NEEDED = {
    ("batch_size",): ("batch",),
    ("system",): ("chat",),
    ("length_penalty", "early_stopping", "num_return_sequences"): ("beams",),
    ("draft_tokens",): ("draft", "ngram"),
}


class GenerateSettings(Settings):
    """How text is drawn. `headwise.generate` states what each value means, and which are allowed."""

    prompt: str | None = Field(None, description="text to go on from, default a line break; with --chat the one turn")
    prompt_file: Path | None = Field(None, description="file with the text to go on from")
    chat: bool = Field(False, description="a conversation: typed in a terminal, one turn where stdin is piped")
    system: str | None = Field(None, description="what the model is told before a conversation")
    batch: Path | None = Field(None, description="JSONL file whose lines have a prompt or messages each")
    out: Path | None = Field(None, description="JSONL file for the answers of --batch; finished lines are kept")
    batch_size: int | None = Field(None, description="lines of --batch decoded in one pass, default 8")
    max_new_tokens: int = Field(200, description="tokens to write, if the text does not end before")
    temperature: float = Field(1.0, description="0 takes the likeliest token every time")
    top_k: int | None = Field(None, description="draw from the k likeliest tokens only")
    top_p: float | None = Field(None, description="draw from the likeliest tokens that make up p only")
    min_p: float | None = Field(
        None, description="draw from tokens at least min_p times as likely as the likeliest only"
    )
    typical_p: float | None = Field(None, description="draw from the most typical tokens that make up p only")
    repetition_penalty: float = Field(1.0, description="more than 1 makes tokens that stood before less likely")
    presence_penalty: float = Field(0.0, description="taken from the logits of tokens that were written already")
    frequency_penalty: float = Field(0.0, description="the same, for each time that a token was written")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="added to logits of token ids, as 50=-2.5")
    seed: int = Field(0, description="seed of the draws")
    logprobs: int | None = Field(None, description="also log-probabilities, and those of the N likeliest tokens")
    json_schema: Path | None = Field(None, description="file with a JSON schema that the text must follow")
    regex: str | None = Field(None, description="regular expression that the whole text must match")
    beams: int | None = Field(None, description="search for the likeliest text with N beams; nothing is drawn")
    length_penalty: float | None = Field(None, description="of beams: above 0 favours long texts, default 1")
    early_stopping: Literal["false", "true", "never"] | None = Field(
        None, description="of beams: when to stop looking, default false"
    )
    num_return_sequences: int | None = Field(None, description="of beams: how many texts, default 1")
    draft: Path | None = Field(None, description="smaller model of the same vocabulary that proposes tokens")
    ngram: bool = Field(False, description="propose what followed the last time the text ended so")
    draft_tokens: int | None = Field(None, description="tokens proposed at a time, default 4")
    cache: str = Field("auto", description="contiguous, static, rolling, paged, int8, int4; auto: each layer's own")
    quantise: Literal["int8", "int4"] | None = Field(None, description="put the weights into 8 or 4 bits first")
    compile: bool = Field(
        False, description="compile the step of one token, which takes a minute or so: for long texts"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, mps or auto: a GPU where there is one")

    def contradictions(self) -> Iterable[tuple[tuple[str, ...], str]]:
        given = {n for n in self.model_fields_set if (v := getattr(self, n)) is not None and v is not False}

        def among(*names: str) -> list[str]:
            return [f"--{name.replace('_', '-')}" for name in names if name in given]

        for names in APART:
            if len(both := among(*names)) > 1:
                yield names, f"{' and '.join(both)} do not go together"
        if len(one := among("batch", "out")) == 1:
            yield ("batch", "out"), f"{one[0]}: --batch FILE and --out FILE need each other"
        for names, needed in NEEDED.items():
            if (lonely := among(*names)) and not among(*needed):
                yield names, f"{', '.join(lonely)}: does something only with --{' or --'.join(needed)}"
        if "beams" in given and (wrong := among(*DRAWN)):
            yield ("beams",), f"{', '.join(wrong)}: does not go with --beams"
        for make in (self.sampling, self.request, self.search):
            try:
                make()
            except SettingsError as error:
                yield from (((problem.partition(":")[0],), problem) for problem in error.problems)

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        from headwise.generate import Sampling

        return Sampling(**{name: getattr(self, name) for name in Sampling.__dataclass_fields__})

    def request(self, **more: Any) -> Request:
        """What holds for every prompt; `more` are fields of it that are no settings."""
        from headwise.generate import Request

        return Request("", max_new_tokens=self.max_new_tokens, logprobs=self.logprobs, **more)

    def search(self) -> Beams | None:
        """How a beam search runs, None where none is asked for."""
        from headwise.generate.beam import Beams

        if self.beams is None:
            return None
        stopping = {"true": True, "false": False, "never": "never"}
        given: dict[str, Any] = {
            "length_penalty": self.length_penalty,
            "num_return_sequences": self.num_return_sequences,
        }
        given["early_stopping"] = None if self.early_stopping is None else stopping[self.early_stopping]
        return Beams(self.beams, **{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str]) -> int:
    parser = Parser("generate", "Text from a trained model, as it comes.", EXAMPLES)
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="a training run, a saved model, a Hugging Face folder or a .gguf file"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    arguments = parser.read(argv, GenerateSettings)
    options = arguments.options
    settings = GenerateSettings(**arguments.settings)
    if settings.logprobs is not None and not (options.json or settings.batch):
        raise SettingsError("logprobs: is shown with --json or --batch only")
    if settings.beams is not None and options.stop:
        raise SettingsError("--stop does not go with --beams")
    settings.request(stop=options.stop)

    writer = _writer(options.model, settings)
    request = settings.request(
        sampling=settings.sampling(), stop=options.stop, constraint=_constraint(settings, writer.tokenizer)
    )
    if settings.batch is not None and settings.out is not None:
        kept = settings.model_dump_json(exclude={"batch", "out", "batch_size", "device"})
        return write_file(writer, settings.batch, settings.out, request, f"{kept} {options.stop}", options.json)
    given = settings.prompt if settings.prompt_file is None else _text(settings.prompt_file)
    if settings.chat:
        from headwise.generate.chat import Chat

        return converse(Chat(writer, request, system=settings.system), given, options.json)
    prompt = "\n" if given is None else given
    return tell(
        lambda on_text: writer.complete(replace(request, prompt=prompt), on_text), {"prompt": prompt}, options.json
    )


def _writer(path: Path, settings: GenerateSettings) -> Writer:
    from headwise.data import load_tokenizer
    from headwise.generate.compiled import cache_kind
    from headwise.generate.speculative import Draft, DraftModel, NgramLookup
    from headwise.generate.writer import Writer
    from headwise.io.pretrained import load
    from headwise.model.quantise import quantise
    from headwise.train.job import resolve_device

    if settings.compile:
        cache_kind(settings.cache)  # refused before a model is read
    device = resolve_device(settings.device)
    tokenizer = load_tokenizer(path)
    model = load(path, device=device)
    if settings.quantise is not None:
        quantise(model, settings.quantise)
    more = {} if settings.draft_tokens is None else {"n_tokens": settings.draft_tokens}
    draft: Draft | None = NgramLookup(**more) if settings.ngram else None
    if settings.draft is not None:
        draft = DraftModel(load(settings.draft, device=device), model, **more)
    size: dict[str, Any] = {} if settings.batch_size is None else {"batch_size": settings.batch_size}
    options = {"cache": settings.cache, "compile": settings.compile, "draft": draft, "beams": settings.search(), **size}
    writer = Writer(model, tokenizer, **options)
    if writer.compile:
        say("compiling the step of one token when the second one is due: a minute or so")
    return writer


def _constraint(settings: GenerateSettings, tokenizer: Tokenizer) -> Constraint | None:
    from headwise.generate.constraints import json_schema, regex

    if settings.json_schema is not None:
        return json_schema(_text(settings.json_schema), tokenizer)
    return None if settings.regex is None else regex(settings.regex, tokenizer)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start:,})") from None
