"""Rows of JSON lines become texts whose every character belongs to one part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.data import Tokenizer, load_tokenizer
from headwise.data.segments import Example, Span, detect, reader
from headwise.data.tokenizers import RustBackedTokenizer, train_bpe
from headwise.errors import DataError

THINKING = """\
{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and m.reasoning_content %}\
<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def pieces(example: Example) -> list[tuple[str, str]]:
    return [(part, example.text[start:stop]) for start, stop, part in example.spans]


def chat_tokenizer(template: str) -> Tokenizer:
    bpe = train_bpe(["some text"], 260)
    assert isinstance(bpe, RustBackedTokenizer)
    return RustBackedTokenizer(bpe.rust, "hf", bpe.eos_id, {**bpe.config, "chat_template": template})


def chat(*messages: tuple[str, str], **of_last: str) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return {"messages": [*turns[:-1], {**turns[-1], **of_last}]}


def test_gsm8k_is_question_working_and_final_answer() -> None:
    row = {"question": "How many? ", "answer": "2*3 = <<2*3=6>>6 pages.\nSo #### marks them.\n#### 1,006 "}
    assert detect(row) == "gsm8k"
    example = reader("gsm8k")(row, "row")
    assert pieces(example) == [
        ("prompt", "Question: How many?\nAnswer:"),
        ("reasoning", " 2*3 = <<2*3=6>>6 pages.\nSo #### marks them.\n"),
        ("answer", "#### 1,006"),
    ]
    assert example.prompt == "Question: How many?\nAnswer:"
    assert example.of_part("reasoning", "answer") == example.text[len(example.prompt) :]
    assert not example.special


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "q", "answer": "six"}, "no final answer behind '####'"),
        ({"question": "q", "answer": "six ####"}, "no final answer behind '####'"),
        (
            {"question": "q", "answr": "#### 6"},
            r"no text 'answer' \(did you mean 'answr'\?\); its columns: question, answr",
        ),
        ({"question": 3, "answer": "#### 6"}, "no text 'question'"),
    ],
)
def test_gsm8k_rows_of_another_form_are_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"^line 7:? .*{words}|^line 7 has {words}"):
        reader("gsm8k")(row, "line 7")


# ---- marks ----


@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["prompt", "reasoning", "answer", "part:tool-1"]), st.text("ab <|>é", max_size=6)),
        min_size=1,
        max_size=6,
    )
)
def test_marks_begin_parts_and_are_no_text(parts: list[tuple[str, str]]) -> None:
    wanted = [(name.removeprefix("part:"), text) for name, text in parts if text]
    row = {"text": "".join(f"<|{name}|>{text}" for name, text in parts)}
    assert detect(row) == "marks"
    if wanted:
        assert pieces(reader("marks")(row, "row")) == wanted
    else:
        with pytest.raises(DataError, match="its text is empty"):
            reader("marks")(row, "row")


def test_other_tokens_between_bars_are_text() -> None:
    example = reader("marks")({"text": "<|prompt|>a<|endoftext|>b<|answer|>c"}, "row")
    assert pieces(example) == [("prompt", "a<|endoftext|>b"), ("answer", "c")]


@pytest.mark.parametrize("text", ["hm<|answer|>4", "no marks at all"])
def test_text_before_the_first_mark_belongs_to_nothing(text: str) -> None:
    with pytest.raises(DataError, match=r"^line 3: its segments do not cover the text: .* stands before any mark"):
        reader("marks")({"text": text}, "line 3")


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[0, 2, "prompt"], [3, 5, "answer"]], r"do not cover the text: characters 2 to 3 \('c'\) belong to none"),
        ([[0, 2, "prompt"]], r"do not cover the text: characters 2 to 5 \('cde'\) belong to none"),
        ([[1, 5, "prompt"]], r"do not cover the text: characters 0 to 1 \('a'\) belong to none"),
        ([], r"do not cover the text: characters 0 to 5 \('abcde'\) belong to none"),
        ([[0, 3, "prompt"], [2, 5, "answer"]], "the answer segment, characters 2 to 5, should begin at 3"),
        ([[0, 6, "prompt"]], "the prompt segment, characters 0 to 6, should begin at 0 and end .* the text's 5 char"),
        (
            [[0, 0, "prompt"], [0, 5, "answer"]],
            "the prompt segment, characters 0 to 0, should begin at 0 and end b",
        ),
        ([[0, "2", "prompt"]], "'spans' is .*; wanted is a list such as"),
        ({"0": 5}, "'spans' is .*; wanted is a list such as"),
        ([3], "'spans' is .*; wanted is a list such as"),
    ],
)
def test_spans_that_do_not_cover_the_text_are_refused_with_row_and_place(spans: Any, words: str) -> None:
    row = {"text": "abcde", "spans": spans}
    assert detect(row) == "marks"
    with pytest.raises(DataError, match=f"^rows.jsonl line 4: .*{words}"):
        reader("marks")(row, "rows.jsonl line 4")


def test_spans_in_characters_are_taken_as_they_are() -> None:
    row = {"text": "héllo", "spans": [[0, 2, "prompt"], [2, 4, "x"], [4, 5, "prompt"]]}
    assert pieces(reader("marks")(row, "row")) == [("prompt", "hé"), ("x", "ll"), ("prompt", "o")]


def test_half_characters_and_empty_texts_are_refused() -> None:
    with pytest.raises(DataError, match="half a character"):
        Example("a\ud800", (Span(0, 2, "prompt"),))
    with pytest.raises(DataError, match="its text is empty"):
        Example("", ())


# ---- chat ----


def test_what_the_assistant_says_is_the_answer_with_what_ends_its_turn() -> None:
    row = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Go"))
    assert detect(row) == "chat"
    example = reader("chat", chat_tokenizer(THINKING))(row, "row")
    assert example.special
    assert pieces(example) == [
        ("prompt", "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"),
        ("answer", "Hello<|end|>"),
        ("prompt", "<|user|>Bye<|end|><|assistant|>"),
        ("answer", "Go<|end|>"),
    ]
    ending = reader("chat", chat_tokenizer(THINKING))(chat(("user", "Hi"), ("assistant", "end")), "row")
    assert pieces(ending)[1:] == [("answer", "end<|end|>")], "words of the template are not the answer's"
    unanswered = reader("chat", chat_tokenizer(THINKING))(chat(("user", "Hi")), "row")
    assert pieces(unanswered) == [("prompt", "<|user|>Hi<|end|>")]


@pytest.mark.parametrize(
    "row",
    [
        chat(("user", "3+4?"), ("assistant", "7"), reasoning_content="3+4=7"),
        chat(("user", "3+4?"), ("assistant", "<think>3+4=7</think>7")),
    ],
)
def test_thoughts_before_the_answer_are_reasoning(row: dict[str, Any]) -> None:
    assert pieces(reader("chat", chat_tokenizer(THINKING))(row, "row")) == [
        ("prompt", "<|user|>3+4?<|end|><|assistant|>"),
        ("reasoning", "<think>3+4=7</think>"),
        ("answer", "7<|end|>"),
    ]


def test_a_template_that_rewrites_earlier_turns_is_told_of() -> None:
    """Some templates drop the thoughts of all turns but the last."""
    forgets = THINKING.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "c"},
            {"role": "user", "content": "d"},
        ]
    }
    with pytest.raises(DataError, match=r"^line 2: the chat template writes message 1 another way when more follow"):
        reader("chat", chat_tokenizer(forgets))(row, "line 2")


def test_what_is_no_conversation_is_refused_with_its_row() -> None:
    read = reader("chat", chat_tokenizer(THINKING))
    for row, words in (
        ({"messages": []}, "has no list 'messages'"),
        ({"massages": ["a"]}, r"has no list 'messages' \(did you mean 'massages'\?\)"),
        ({"messages": [{"role": "user"}]}, ": messages: number 0 is"),
        ({"messages": ["hello"]}, ": messages: number 0 is 'hello'"),
    ):
        with pytest.raises(DataError, match=f"^line 5{words}" if words.startswith(":") else f"^line 5 {words}"):
            read(row, "line 5")
    with pytest.raises(DataError, match="needs a tokenizer with a chat template"):
        reader("chat", train_bpe(["text"], 260))


def test_the_real_models_template(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    example = reader("chat", tokenizer)(chat(("user", "Hi"), ("assistant", "Hello")), "row")
    (_, prompt), (part, answer) = pieces(example)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (part, answer) == ("answer", "Hello<|im_end|>\n")
    ids, places = tokenizer.encode_places(example.text, special=True)
    assert ids.tolist() == tokenizer.encode(example.text, special=True).tolist()
    ends = [example.text[start:stop] for i, (start, stop) in zip(ids, places) if i in tokenizer.eos_ids]
    assert ends == ["<|im_end|>"] * 3


def test_rows_without_parts_are_text() -> None:
    assert [detect(row) for row in ({"text": "a"}, {"question": "q", "answer": "6"}, {})] == ["text"] * 3
