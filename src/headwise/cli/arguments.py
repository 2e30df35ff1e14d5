"""From argv to settings: flags are the fields of the pydantic model that Python callers fill by keyword.

pydantic-settings reads the values and writes the help; argparse finds the words; here stand the rules between the two:
underscores are as good as dashes, unknown flags get the nearest spelling, dotted flags speak of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError as SourceError

from headwise.errors import SettingsError, nearest
from headwise.lab.plan import read_all
from headwise.spec import ModelSpec, apply_flags, parse
from headwise.spec.flags import ROOTS, is_model_flag

MODEL_FLAGS = """\
flags of the model:
  --model.FIELD VALUE            a field of every line, as --model.d_model 256
  --model.COMPONENT.kind NAME    a component, as --model.attention.kind window; its fields follow in the same way
  --attn.impl NAME, --ffn.impl NAME are short for the kinds of attention and ffn
"""


@dataclass(frozen=True)
class Arguments:
    """What was typed.

    Attributes:
        settings: the given ones among the model's fields; what was not given is left out.
        options: the other arguments of the command.
        flags: the dotted flags, without dashes.
    """

    settings: dict[str, Any]
    options: argparse.Namespace
    flags: dict[str, str] = field(default_factory=dict)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are errors of ours, and in which every command has --json."""

    def __init__(self, command: str, description: str, examples: str, *, model_flags: bool = False) -> None:
        shown = "\n".join(f"  headwise {line}" for line in examples.strip().splitlines())
        super().__init__(
            prog=f"headwise {command}",
            description=description,
            epilog=f"{MODEL_FLAGS}\nexamples:\n{shown}" if model_flags else f"examples:\n{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._model_flags = model_flags
        self.add_argument("--json", action="store_true", help="the result as JSON on stdout")

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; see `{self.prog} --help`")

    def read(self, argv: Sequence[str], settings: type[BaseModel] | None = None) -> Arguments:
        """Parse `argv`; the fields of `settings` are flags beside the parser's own arguments.

        Raises:
            SettingsError: an unknown flag, a value missing, or one that is not of the field's form.
        """
        source = None if settings is None else _source(settings, self)
        words, flags = self._split(argv)
        options, unknown = self.parse_known_args(words)
        if unknown:
            self.error("; ".join(self._unknown(word) for word in unknown if word.startswith("-")) or _extra(unknown))
        if source is None:
            return Arguments({}, options, flags)
        try:
            return Arguments(dict(source(parsed_args=options)()), options, flags)
        except (SourceError, ValueError) as error:
            self.error(_reason(error))

    def _split(self, argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The words without the dotted flags, underscores in flags made dashes; and the dotted flags."""
        words: list[str] = []
        flags: dict[str, str] = {}
        rest = iter(argv)
        for word in rest:
            if word == "--":
                words += [word, *rest]
                break
            if not word.startswith("--"):
                words.append(word)
                continue
            name, equals, value = word[2:].partition("=")
            if not (self._model_flags and is_model_flag(name)):
                words.append(f"--{name.replace('_', '-')}{equals}{value}")
                continue
            if not equals:
                value = next(rest, "--")
                if value.startswith("--"):
                    self.error(f"--{name} needs a value, as --{name}=VALUE")
            flags[name] = value
        return words, flags

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        if self._model_flags:
            known += [f"--{root}.{name.partition('.')[2]}" for root in ROOTS]
        return f"unknown flag {name}{nearest(name, known)}"


def _extra(words: Sequence[str]) -> str:
    return f"too many arguments: {' '.join(words)}"


def _source(settings: type[BaseModel], parser: Parser) -> CliSettingsSource[Any]:
    """The fields as flags of `parser`. Only the command line is read: no environment variable sets anything."""
    adapter = type("Flags", (BaseSettings, settings), {"__doc__": None})
    return CliSettingsSource(
        adapter,
        root_parser=parser,
        add_argument_method=_add_argument,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        case_sensitive=True,
    )


# What stands for a value in the help, by what pydantic-settings would write.
METAVARS = {"float": "X", "int": "N", "Path": "PATH", "str": "TEXT"}
METAVARS |= {"dict[str,float]": "PATTERN=X", "dict[int,float]": "ID=X", "tuple[str,...]": "MODEL"}


def _add_argument(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """`add_argument` with a help text for people: defaults where there are some, values in words."""
    text = str(options.get("help") or "")
    for empty in (" (default: null)", " (default: None)", " (default: ())", " (default factory: dict)"):
        text = text.replace(empty, "")
    text = re.sub(r"\(default: \((.*)\)\)", lambda found: f"(default: {found[1].replace(' ', '')})", text)
    options["help"] = text
    metavar = options.get("metavar")
    if isinstance(metavar, str):
        many = "tuple[" in metavar
        options["metavar"] = METAVARS.get(metavar, "X,X…" if many and "float" in metavar else metavar)
        if many and "int" in metavar:
            options["metavar"] = "N"
    parser.add_argument(*names, **options)


def _reason(error: Exception) -> str:
    """A value that pydantic-settings could not take apart, in a sentence."""
    cause = " ".join(str(error).split()).removeprefix("Parsing error encountered for ")
    name, _, _ = cause.partition(":")
    return f"--{name.replace('_', '-')}: its value is no list or mapping that can be read, as 1,2 or NAME=1"


def read_lines(lines: Sequence[str], flags: dict[str, str]) -> list[ModelSpec]:
    """The lines, each as it stands or that of the model at a path, with the dotted flags worked in; `SpecError` with
    the problems of all of them."""
    return read_all(lines, lambda line: apply_flags(_spec(line), flags))


def _spec(line: str) -> ModelSpec:
    a_path = os.sep in line and "(" not in line and not line.endswith((".yaml", ".yml"))
    if a_path or line.endswith(".gguf") or os.path.isdir(line):
        from headwise.io.pretrained import saved_spec

        return saved_spec(line)
    return parse(line)


def print_json(value: Any) -> None:
    """A result on stdout, as JSON that every reader takes."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()


def say(text: str) -> None:
    """Words for people that are no result: on stderr."""
    print(text, file=sys.stderr)


def show(arguments: Arguments, value: Any, render: Callable[[], None]) -> None:
    """The result, as JSON if that was asked for, else for people."""
    if arguments.options.json:
        print_json(value)
    else:
        render()
