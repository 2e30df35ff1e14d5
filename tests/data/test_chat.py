"""Chat templates: the same text as transformers' `apply_chat_template`, in the same sandbox; every error one line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.data.chat import render_chat
from headwise.errors import DataError, FormatError, HeadwiseError, SettingsError

# Templates of published models, in the forms that matter: set, namespaces, loop controls, filters, slices, strip marks.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'+ message.content|trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
QWEN3 = """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- message.content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content|string + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Blocks on lines of their own (trim_blocks, lstrip_blocks), loop controls, and what the sandbox offers.
WORKSHOP = """\
{% set seen = namespace(count=0, last=dict(role='none')) %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
    {% generation %}
        {% set seen.count = seen.count + 1 %}
{{ message | tojson(indent=2) }} {{ message.content | tojson }} {{ dict.fromkeys(['a'], 1) | tojson(sort_keys=true) }}
    {% endgeneration %}
{% endfor %}
{{ seen.count }} {{ strftime_now('%Y') }} {{ documents is none }} {{ missing }} {{ eos_token }}
"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "qwen3": QWEN3, "workshop": WORKSHOP}

TALKS: dict[str, list[dict[str, Any]]] = {
    "a question": [{"role": "user", "content": "Who are you?"}],
    "a system's words": [
        {"role": "system", "content": "  Answer briefly. "},
        {"role": "user", "content": "1 < 2 & 'so' \"on\"?\n"},
        {"role": "assistant", "content": "Ja: ünïcödé 🦙 <|im_end|>"},
        {"role": "user", "content": " And then?"},
    ],
    "reasoning": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4", "reasoning": "\ntwo twos\n"},
    ],
    "a tool": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"at": "Zürich"}}}],
        },
        {"role": "tool", "content": ["18 °C", {"wind": None}]},
    ],
}


def reference(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text by transformers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template, bos_token="<s>", eos_token="</s>", **options
    )
    return rendered[0]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_is_that_of_transformers(template: str, talk: str, add_generation_prompt: bool) -> None:
    source, messages = TEMPLATES[template], TALKS[talk]
    try:
        wanted = reference(source, messages, add_generation_prompt=add_generation_prompt)
    except Exception:  # a template that takes no such talk: both refuse it
        with pytest.raises(HeadwiseError) as refusal:
            render_chat(source, messages, add_generation_prompt=add_generation_prompt)
        assert "\n" not in str(refusal.value)
        return
    text = render_chat(source, messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>")
    assert text == wanted


def test_most_templates_take_most_talks() -> None:
    """The comparison above would be empty if all were refused."""
    taken = 0
    for template in TEMPLATES.values():
        for messages in TALKS.values():
            try:
                taken += bool(render_chat(template, messages))
            except HeadwiseError:
                continue
    assert taken >= 15


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20)), min_size=1, max_size=4)
)
@settings(max_examples=50)
def test_any_words_stay_as_they_are(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert render_chat(CHATML, messages) == reference(CHATML, messages, add_generation_prompt=True)


def test_a_refusal_by_the_template_is_one_line() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match="refuses these messages: Conversation roles must alternate") as refusal:
        render_chat(LLAMA2, messages)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for %}", "is no Jinja"),
        ("{{ messages[7].content }}", "fails on these messages"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "fails on these messages"),
        ("{{ none.x.y }}", "fails on these messages"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% include 'other' %}", "fails on these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ range(1000000) | list }}", "[Rr]ange too big"),
        ("{% set ns = namespace(__class__=1) %}", "underscore"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscore"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as failure:
        render_chat(template, [{"role": "user", "content": "a"}])
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": {1}}],
    ],
)
def test_messages_that_are_no_conversation_are_one_line(messages: list[Any]) -> None:
    with pytest.raises(SettingsError, match="messages: ") as failure:
        render_chat(CHATML, messages)
    assert "\n" not in str(failure.value)


def test_the_messages_are_left_as_they_were() -> None:
    messages = [{"role": "assistant", "content": "4", "reasoning": "two twos"}]
    render_chat(QWEN3, messages)
    assert messages == [{"role": "assistant", "content": "4", "reasoning": "two twos"}]
