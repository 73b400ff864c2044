"""Which form a template speaks, and conversations with tools as templates expect them."""

from __future__ import annotations

from typing import Any

import pytest

from models.chat import names_in
from models.errors import TemplateError
from models.tool_format import (
    GENERIC,
    lists_tools,
    reasoning,
    reasoning_formats,
    tool_format,
    tool_formats,
)
from models.tool_grammar import Tool
from models.tool_messages import render_with_tools
from tests.models.test_chat import CHATML

FORMS = tool_formats()
HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools> <tool_call></tool_call><|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.tool_calls %}{% for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% else %}
{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}
{%- elif m['tool_calls'] %}{% for c in m['tool_calls'] -%}
{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>'
 + c['function']['name'] + '\\n```json\\n' + c['function']['arguments']
 + '\\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}
{%- endfor %}{% elif m['content'] is not none %}<{{ m['role'] }}>{{ m['content'] }}
{%- endif %}{% endfor %}"""
MISTRAL = """{% for m in messages %}{% if m.role == 'user' %}[AVAILABLE_TOOLS]{{ tools | tojson }}
{%- elif m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}
{%- if c.id | length < 9 %}{{ raise_exception('short id') }}{% endif %}
{{- (c.function | tojson)[:-1] }}, "id": "{{ c.id[-9:] }}"}{% endfor %}]
{%- elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}{{ m.tool_call_id[-9:] }}{{ m.name }}
{%- endif %}{% endfor %}"""
LLAMA = (
    """{%- if tools %}{"name": function name, "parameters": dictionary}{% endif %}<|python_tag|>"""
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)
TOOL = Tool("get_weather", "now", {"type": "object", "properties": {"city": {"type": "string"}}})
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_12345678",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome é"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_12345678", "content": "sunny"},
]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (HERMES, "hermes"),
        (HERMES.replace("<tools>", "<function="), GENERIC),  # a form that is not ours to write
        (DEEPSEEK, "deepseek"),
        (DEEPSEEK.replace("```json", ""), "deepseek_v31"),
        (MISTRAL, "mistral"),
        (MISTRAL + "[ARGS]", "mistral_args"),
        (LLAMA, "llama3"),
        (CHATML, GENERIC),
        (None, GENERIC),
    ],
)
def test_the_form_is_read_off_the_template(template: str | None, form: str) -> None:
    assert tool_format(template).id == form
    assert tool_format(template, named="hermes").id == "hermes"


def test_who_lists_tools_and_who_thinks() -> None:
    assert [lists_tools(one) for one in (HERMES, MISTRAL, DEEPSEEK, CHATML)] == [1, 1, 0, 0]
    assert not lists_tools("{% if %}")
    assert "messages" in names_in(CHATML)
    with pytest.raises(TemplateError, match="chat template"):
        names_in("{% if %}")
    think = reasoning(HERMES + "</think>")
    assert think is reasoning_formats()["think"]
    assert think.is_open("<|im_start|>assistant\n<think>\n")
    assert not think.is_open("<think>\n\n</think>\n\n")
    assert reasoning(CHATML) is None
    assert reasoning(None, named="magistral") is reasoning_formats()["magistral"]


def test_a_template_that_knows_tools_gets_them_as_it_expects() -> None:
    text = render_with_tools(HERMES, TALK, [TOOL], FORMS["hermes"])
    assert '{"type": "function", "function": {"name": "get_weather", "description": "now"' in text
    assert '{"name": "get_weather", "arguments": {"city": "Rome é"}}' in text
    assert "<|im_start|>toolsunny<|im_end|>" in text
    assert "<tools>" not in render_with_tools(HERMES, TALK, [], FORMS["hermes"])
    text = render_with_tools(MISTRAL, TALK, [TOOL], FORMS["mistral"])
    assert '{"name": "get_weather", "arguments": {"city": "Rome é"}, "id": "_12345678"}' in text
    assert text.endswith("[TOOL_RESULTS]sunny_12345678get_weather")


def test_arguments_stay_text_where_a_template_joins_them() -> None:
    text = render_with_tools(DEEPSEEK, TALK, [TOOL], FORMS["deepseek"], bos_token="<s>")
    assert text.startswith("<s>## Tools")
    assert '{"name": "get_weather", "description": "now"' in text
    assert 'get_weather\n```json\n{"city": "Rome é"}\n```' in text
    assert text.count("<assistant>") == 0  # a call without text is no empty turn besides
    bad = [{**TALK[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(TemplateError, match="arguments of 'f'"):
        render_with_tools(HERMES, bad, [TOOL], FORMS["hermes"])


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    more = [*TALK, {"role": "user", "content": "and now?"}]
    text = render_with_tools(CHATML, more, [TOOL], FORMS[GENERIC])
    assert text.startswith("<|im_start|>system\nYou can call functions")
    assert '{"name": "get_weather", "description": "now"' in text
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome é"}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{call}<|im_end|>" in text
    result = "<tool_response>sunny</tool_response>\nand now?"
    assert f"<|im_start|>user\n{result}<|im_end|>" in text  # turns alternate

    system = [{"role": "system", "content": "Be brief."}, *TALK]
    text = render_with_tools(CHATML, system, [TOOL], FORMS[GENERIC])
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions")
    text = render_with_tools(NO_SYSTEM, system, [TOOL], FORMS[GENERIC])
    assert text.startswith("<|im_start|>user\nBe brief.\n\nYou can call functions")
    assert "You can call" not in render_with_tools(CHATML, TALK, [], FORMS[GENERIC])


def test_ids_of_calls() -> None:
    assert len(FORMS["mistral"].new_call_id()) == 9
    assert FORMS["mistral"].new_call_id().isalnum()
    assert FORMS["hermes"].new_call_id().startswith("call_")
    assert FORMS["hermes"].new_call_id() != FORMS["hermes"].new_call_id()
