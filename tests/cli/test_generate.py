"""`headwise generate`: every way of decoding from the command line, and every mistake in one line."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run, run_json

import headwise as hw
from headwise.data.tokenizers import RustBackedTokenizer, train_bpe
from headwise.generate import Request, Sampling, complete
from headwise.generate.beam import Beams, beam_search
from headwise.generate.chat import Chat
from headwise.generate.session import Session
from headwise.generate.writer import Writer
from headwise.model.decoder import Decoder
from headwise.model.quantise import quantise

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tokenizer() -> RustBackedTokenizer:
    made = train_bpe(['the cat sat {"a": true} [user] the mat 0123456789'] * 20, 300)
    return RustBackedTokenizer(made.rust, "bpe", made.eos_id, {**made.config, "chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def folder(tokenizer: RustBackedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same vocabulary: `model` and, smaller, `draft`."""
    path = tmp_path_factory.mktemp("models")
    for name, d_model in (("model", 16), ("draft", 8)):
        line = f"llama(d_model={d_model}, n_layers=1, n_heads=2, vocab_size={tokenizer.vocab_size}, max_seq_len=256)"
        model = hw.build(hw.parse(line).replace(init="normal", init_std=0.5), seed=3)
        hw.save_pretrained(model, path / name, tokenizer)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hw.load(folder / "model")


def generate(folder: Path, *flags: str) -> list[str]:
    return ["generate", str(folder / "model"), *flags]


PROMPT = ["--prompt", "the cat", "--max-new-tokens", "12"]


def test_options_reach_the_sampling_and_facts_come_back(
    folder: Path, model: Any, tokenizer: RustBackedTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--temperature 0.8 --top-k 30 --top-p 0.9 --min-p 0.01 --typical-p 0.95 --repetition-penalty 1.1"
    flags += " --presence-penalty 0.1 --frequency-penalty 0.2 --logit-bias 5=2.5,9=-inf --seed 4 --logprobs 2"
    sampling = Sampling(0.8, 30, 0.9, 0.01, 0.95, 1.1, 0.1, 0.2, {5: 2.5, 9: float("-inf")}, 4)
    wanted = complete(model, tokenizer, Request("the cat", sampling, max_new_tokens=12, logprobs=2))
    found = run_json(capsys, *generate(folder, *PROMPT, *flags.split()))
    assert {name: found[name] for name in wanted.as_json()} == json.loads(json.dumps(wanted.as_json()))
    assert found["prompt"] == "the cat"
    assert found["tokens_per_s"] == pytest.approx(len(wanted.token_ids) / found["seconds"])


def test_the_same_text_comes_with_and_without_json_and_from_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_json(capsys, *generate(folder, *PROMPT))["text"]
    assert run(capsys, *generate(folder, *PROMPT)) == (0, f"the cat{text}\n", "")
    (tmp_path / "prompt.txt").write_text("the cat")
    from_file = ["--prompt-file", str(tmp_path / "prompt.txt"), *PROMPT[2:]]
    assert run(capsys, *generate(folder, *from_file)) == (0, f"the cat{text}\n", "")
    middle = text[3:5]
    found = run_json(capsys, *generate(folder, *PROMPT, "--stop", "nowhere", "--stop", middle))
    assert (found["text"], found["stopped_by"]) == (text[: text.index(middle)], middle)


@pytest.mark.parametrize("kind", ["contiguous", "static", "paged"])
def test_kinds_of_cache_change_nothing_but_themselves(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    new_cache = Decoder.new_cache

    def watched(self: Any, kind: str = "auto", **options: Any) -> Any:
        asked.append(kind)
        return new_cache(self, kind, **options)

    plain = run_json(capsys, *generate(folder, *PROMPT))["text"]
    monkeypatch.setattr(Decoder, "new_cache", watched)
    assert run_json(capsys, *generate(folder, *PROMPT, "--cache", kind))["text"] == plain
    assert set(asked) == {kind}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_are_quantised_first(
    scheme: Any, folder: Path, tokenizer: RustBackedTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    small = quantise(hw.load(folder / "model"), scheme)
    wanted = complete(small, tokenizer, Request("the cat", Sampling(temperature=0), max_new_tokens=12, logprobs=0))  # type: ignore[arg-type]
    found = run_json(capsys, *generate(folder, *PROMPT, "--temperature", "0", "--quantise", scheme, "--logprobs", "0"))
    assert wanted.logprobs is not None
    assert [each["logprob"] for each in found["logprobs"]] == pytest.approx([each.logprob for each in wanted.logprobs])


def test_a_step_is_compiled_and_what_fails_in_it_has_a_line_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = [*PROMPT, "--temperature", "0"]
    _, plain, _ = run(capsys, *generate(folder, *greedy))
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    said = "compiling the step of one token when the second one is due: a minute or so\n"
    assert run(capsys, *generate(folder, *greedy, "--compile")) == (0, plain, said)

    def no_compiler(*args: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda step, **options: no_compiler)
    status, out, err = run(capsys, *generate(folder, *greedy, "--compile"))
    assert status == 1
    assert out != "\n"
    assert out.endswith("\n")
    assert plain.startswith(out[:-1])
    assert err == f"{said}error: compile: torch.compile failed: no C++ compiler; leave compile out, or mend that\n"
    status, out, err = run(capsys, "generate", "nowhere", "--compile", "--cache", "paged")
    assert (status, out) == (2, "")
    assert err == "error: cache: paged does not go with compile; allowed: auto, contiguous\n"


def test_drafts_tell_what_was_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = [*PROMPT[:2], "--temperature", "0", "--max-new-tokens", "40"]
    plain = run_json(capsys, *generate(folder, *greedy))["text"]
    for flags in (["--draft", str(folder / "draft")], ["--draft", str(folder / "model")], ["--ngram"]):
        found = run_json(capsys, *generate(folder, *greedy, *flags, "--draft-tokens", "3"))
        assert found["text"] == plain
        assert found["acceptance"] == found["accepted"] / found["drafted"]
        status, out, err = run(capsys, *generate(folder, *greedy, *flags, "--draft-tokens", "3"))
        assert (status, out) == (0, f"the cat{plain}\n")
        assert f"{found['accepted']} of {found['drafted']} proposed tokens taken" in err


def test_beams(folder: Path, model: Any, tokenizer: RustBackedTokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--beams", "3", "--num-return-sequences", "2", "--length-penalty", "0.5", "--early-stopping", "never"]
    wanted = beam_search(
        model, tokenizer, Request("the cat", max_new_tokens=12), Beams(3, 0.5, "never", num_return_sequences=2)
    )
    found = run_json(capsys, *generate(folder, *PROMPT, *flags))
    assert [found["score"], found["others"][0]["score"]] == pytest.approx([each.score for each in wanted])
    _, out, _ = run(capsys, *generate(folder, *PROMPT, *flags))
    assert out == "".join(f"the cat{each.text}\n" for each in wanted)


def test_forms(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for seed in range(3):
        more = ["--prompt", "the", "--max-new-tokens", "60", "--seed", str(seed)]
        found = run_json(capsys, *generate(folder, *more, "--json-schema", str(tmp_path / "schema.json")))
        assert json.loads(found["text"]) in ({"a": True}, {"a": False})
        found = run_json(capsys, *generate(folder, *more, "--regex", "[0-9]{3}(cat|mat)"))
        assert re.fullmatch("[0-9]{3}(cat|mat)", found["text"])
    (tmp_path / "schema.json").write_text("{")
    status, out, err = run(capsys, *generate(folder, *PROMPT, "--json-schema", str(tmp_path / "schema.json")))
    assert (status, out, err.count("\n")) == (2, "", 1)


class Piped(io.StringIO):
    def isatty(self) -> bool:
        return False


def test_a_conversation_of_one_turn(
    folder: Path,
    model: Any,
    tokenizer: RustBackedTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = Chat(Writer(model, tokenizer), Request("", max_new_tokens=12), system="sit")
    wanted = chat.say("the mat").text
    flags = ["--chat", "--system", "sit", "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "stdin", Piped("the mat\n"))
    assert run(capsys, *generate(folder, *flags)) == (0, f"{wanted}\n", "")
    found = run_json(capsys, *generate(folder, *flags, "--prompt", "the mat"))
    assert (found["turn"], found["text"]) == ("the mat", wanted)


def test_a_file_of_prompts_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": "the"}, {"messages": [{"role": "user", "content": "cat"}]}, {"prompt": 1}, {"prompt": "mat"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--batch", str(source), "--out", str(out), "--max-new-tokens", "5", "--batch-size", "2"]
    status, said, err = run(capsys, *generate(folder, *flags))
    assert status == 1
    assert said.startswith(f"3 of 4 lines in {out}; ")
    assert err == f"error: {source} line 3: prompt: given 1, should be text\n"
    whole = out.read_text()
    out.write_text(whole[: whole.index("\n") + 5])
    status, said, _ = run(capsys, *generate(folder, *flags, "--json"))
    figures = json.loads(said)
    assert (figures["earlier"], figures["finished"], [each["line"] for each in figures["problems"]]) == (1, 3, [3])
    assert sorted(out.read_text().splitlines()) == sorted(whole.splitlines())
    status, _, err = run(capsys, *generate(folder, *flags, "--seed", "9"))
    assert (status, err.count("\n")) == (2, 1)
    assert "other lines or settings" in err


WRONG: list[tuple[str, list[str]]] = [
    ("--prompt a --prompt-file b", ["--prompt and --prompt-file do not go together"]),
    ("--batch a", ["--batch: --batch FILE and --out FILE need each other"]),
    ("--out a --batch-size 3", ["--out: --batch FILE", "--batch-size: does something only with --batch"]),
    ("--system a", ["--system: does something only with --chat"]),
    ("--chat --batch a --out b", ["--chat and --batch do not go together"]),
    ("--ngram --draft a", ["--draft and --ngram do not go together"]),
    ("--draft-tokens 3", ["--draft-tokens: does something only with --draft or --ngram"]),
    ("--regex a --json-schema b", ["--json-schema and --regex do not go together"]),
    ("--length-penalty 2", ["--length-penalty: does something only with --beams"]),
    ("--beams 2 --temperature 0 --ngram --seed 4", ["--temperature, --seed, --ngram: does not go with --beams"]),
    ("--beams 2 --num-return-sequences 3", ["num_return_sequences: given 3"]),
    ("--beams 2 --stop a", ["--stop does not go with --beams"]),
    ("--logprobs 2", ["logprobs: is shown with --json or --batch only"]),
    ("--temperature -1 --top-p 2 --max-new-tokens -1 --seed x", ["temperature:", "top_p:", "max_new_tokens:", "seed:"]),
    ("--logit-bias 3", ["--logit-bias: its value is no list or mapping"]),
    ("--logit-bias 4000=1", ["logit_bias: token 4000 is not in the vocabulary"]),
    ("--regex (", ["regex: unclosed group"]),
    ("--ngram --draft-tokens 0", ["draft_tokens: given 0"]),
    ("--cache rolling", ["rolling cache:"]),
    ("--cache rollin", ["did you mean 'rolling'?"]),
]


@pytest.mark.parametrize(("flags", "parts"), WRONG, ids=[flags for flags, _ in WRONG])
def test_what_does_nothing_or_cannot_be_is_said(
    flags: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *generate(folder, *flags.split()))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert all(part in err for part in parts), err


def test_other_mistakes_are_one_line_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    for flags in (["--prompt-file", str(tmp_path / "none")], ["--prompt-file", str(tmp_path / "latin")]):
        status, out, err = run(capsys, *generate(folder, *flags))
        assert (status, out, err.count("\n")) == (1, "", 1)
    status, out, err = run(capsys, *generate(tmp_path / "nowhere", *PROMPT))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "nowhere/model is no folder; give the folder of a model" in err


@pytest.mark.parametrize("flags", [[], ["--json"], ["--ngram"]])
def test_ctrl_c_leaves_what_was_written(
    flags: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run_json(capsys, *generate(folder, *PROMPT, *[flag for flag in flags if flag != "--json"]))["text"]
    read, times = Session.read, iter(range(3))

    def tiring(*args: Any, **more: Any) -> Any:
        if next(times, None) is None:
            raise KeyboardInterrupt
        return read(*args, **more)

    monkeypatch.setattr(Session, "read", tiring)
    status, out, err = run(capsys, *generate(folder, *PROMPT, *flags))
    assert status == 130
    if "--json" in flags:
        found = json.loads(out)
        assert (found["finish_reason"], len(found["token_ids"]), err) == ("interrupted", 3, "")
        assert plain.startswith(found["text"])
    else:
        assert out.endswith("\n")
        assert f"the cat{plain}".startswith(out[:-1])
        assert err.endswith("error: interrupted\n")


def test_a_conversation_in_a_terminal_is_typed_until_ctrl_d(
    folder: Path,
    model: Any,
    tokenizer: RustBackedTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    chat = Chat(Writer(model, tokenizer), Request("", max_new_tokens=12))
    wanted = "".join(f"{chat.say(turn).text}\n" for turn in ("the", "cat"))
    turns = iter(["the", " ", "cat"])

    def typed(prompt: str) -> str:
        try:
            return next(turns)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    status, out, err = run(capsys, *generate(folder, "--chat", "--max-new-tokens", "12"))
    assert (status, out, err) == (0, f"{wanted}\n", "Ctrl-D ends the conversation\n")
    status, _, err = run(capsys, *generate(folder, "--chat", "--json"))
    assert status == 2
    assert "--json shows one turn" in err
