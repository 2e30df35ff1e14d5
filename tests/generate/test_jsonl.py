"""Files of prompts: every line its answer, whatever happens to the others and however often it is begun again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_models import small, tokenizer_of

from headwise.errors import DataError, HeadwiseError, SettingsError
from headwise.generate import Generation, Request, Sampling, complete
from headwise.generate.beam import Beams
from headwise.generate.jsonl import Tally, complete_file
from headwise.generate.speculative import NgramLookup
from headwise.generate.writer import Writer

WRITER = Writer(small(), tokenizer_of(), batch_size=3)
REQUEST = Request("", Sampling(seed=5), max_new_tokens=6)
LINES = [
    '{"prompt": "abc", "id": "first"}',
    "",
    '{"prompt": "a", "id": 7}',
    "no JSON",
    '{"prompt": "Ω"}',
    '{"prompt": "a", "messages": []}',
    '{"messages": [{"role": "user", "content": "a"}]}',
    '{"prompt": 3}',
    '{"text": "a"}',
    '{"prompt": "ponm.\\n"}',
    '{"prompt": "a"}',
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(LINES))
    return path


def records(out: Path) -> dict[int, Any]:
    return {record["line"]: record for record in map(json.loads, out.read_text().splitlines())}


def test_every_good_line_is_answered_and_every_bad_one_told(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    seen: list[tuple[int, int]] = []
    tally = complete_file(
        WRITER, source, out, REQUEST, on_progress=lambda t: seen.append((t.finished, len(t.problems)))
    )
    found = records(out)
    assert sorted(found) == [1, 3, 10, 11]
    assert {n: record["id"] for n, record in found.items() if "id" in record} == {1: "first", 3: 7}
    for n, record in found.items():
        alone = complete(
            WRITER.model, WRITER.tokenizer, replace(REQUEST, prompt=json.loads(LINES[n - 1])["prompt"], index=n)
        )
        assert {key: record[key] for key in alone.as_json()} == alone.as_json()
    assert found[3]["text"] != found[11]["text"], "equal prompts draw apart"
    assert sorted(tally.problems) == [4, 5, 6, 7, 8, 9]
    wanted = [
        "no JSON",
        "'Ω'",
        '"prompt" or "messages"',
        "no chat template",
        "should be text",
        '"prompt" or "messages"',
    ]
    assert all(part in tally.problems[n] for n, part in zip(range(4, 10), wanted))
    assert (tally.lines, tally.finished, tally.earlier, tally.tokens) == (10, 4, 0, 24)
    assert seen[-1] == (4, 6)


def test_what_is_finished_is_not_done_again(source: Path, tmp_path: Path) -> None:
    """Cut anywhere, also inside a line, the file is completed to what it would have been."""
    out = tmp_path / "out.jsonl"
    complete_file(WRITER, source, out, REQUEST)
    whole = out.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        earlier = whole[:cut].count(b"\n")
        tally = complete_file(WRITER, source, out, REQUEST)
        assert (tally.earlier, tally.finished) == (earlier, 4)
        assert records(out) == {record["line"]: record for record in map(json.loads, whole.splitlines())}
    source.write_text("\n".join([*LINES, '{"prompt": "abcd"}']))
    assert complete_file(WRITER, source, out, REQUEST).earlier == 4
    assert sorted(records(out)) == [1, 3, 10, 11, 12]


def test_an_interruption_leaves_whole_lines(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def tire(tally: Tally) -> None:
        if tally.finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete_file(WRITER, source, out, REQUEST, on_progress=tire)
    assert len(records(out)) == 2
    assert complete_file(WRITER, source, out, REQUEST).earlier == 2
    assert len(records(out)) == 4


def test_results_of_other_lines_or_settings_are_not_mixed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    complete_file(WRITER, source, out, REQUEST, settings="a")
    before = out.read_bytes()
    with pytest.raises(SettingsError, match="other lines or settings"):
        complete_file(WRITER, source, out, REQUEST, settings="b")
    source.write_text("\n".join(LINES[1:]))
    with pytest.raises(SettingsError, match="other lines or settings"):
        complete_file(WRITER, source, out, REQUEST, settings="a")
    assert out.read_bytes() == before
    out.write_text("something else\n")
    with pytest.raises(SettingsError, match=r"line 1 of .* is no result"):
        complete_file(WRITER, source, out, REQUEST)
    source.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no UTF-8"):
        complete_file(WRITER, source, out, REQUEST)


@pytest.mark.parametrize("how", [{"draft": NgramLookup()}, {"beams": Beams(2, num_return_sequences=2)}])
def test_lines_are_answered_one_by_one_with_drafts_and_beams(how: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    writer = replace(WRITER, **how)
    tally = complete_file(writer, source, out, REQUEST)
    assert (tally.finished, len(tally.problems)) == (4, 6)
    alone = writer.complete(replace(REQUEST, prompt="abc", index=1))
    assert records(out)[1]["text"] == alone[0].text
    if "beams" in how:
        assert [each["text"] for each in records(out)[1]["others"]] == [alone[1].text]


def test_one_that_cannot_go_on_is_a_problem_of_its_line(source: Path, tmp_path: Path) -> None:
    class Failing(Writer):
        def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Generation] | HeadwiseError]]:
            for place, found in super().answers(requests):
                yield place, HeadwiseError("cannot go on") if place == 1 else found

    out = tmp_path / "out.jsonl"
    tally = complete_file(Failing(WRITER.model, WRITER.tokenizer), source, out, REQUEST)
    assert tally.problems[3] == "cannot go on"
    assert sorted(records(out)) == [1, 10, 11]


def test_a_writer_says_what_does_not_go_together() -> None:
    with pytest.raises(SettingsError) as error:
        replace(WRITER, draft=NgramLookup(), beams=Beams(2), batch_size=0)
    assert len(error.value.problems) == 2
