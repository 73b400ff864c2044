"""Chat templates: the same text as transformers, and no harm from a hostile template."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from models.chat import render
from models.errors import TemplateError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the constructs that templates of real models use
RICH = """{{ bos_token }}
{%- set ns = namespace(found=false, last=-1) -%}
{%- for message in messages %}
    {%- if message.role == 'system' and not ns.found %}{% set ns.found = true %}
[S]{{ message.content | trim | upper }}[/S]
    {% elif message['role'] == "user" %}
        {%- if message.content is string %}
[U]{{ message.content }}{{ loop.index0 }}/{{ loop.length }}
        {%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
    {%- elif message.role == 'assistant' and message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
[C]{{ call.function.name ~ ':' ~ call.function.arguments | tojson }}
            {%- if not loop.last %},{% endif %}
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
{% generation %}{{ message.content.split('</think>')[-1].lstrip('\n') }}{% endgeneration %}
    {%- else %}{% continue %}
    {%- endif %}
{%- endfor %}
{%- macro show(items, sep=', ') %}{{ items | map('string') | join(sep) }}{% endmacro %}
{{ show([1, 'b', 2.5]) }} {{ tools | tojson(indent=2) if tools }}
{{- ' %s' | replace('%s', 'x') }} {{ 'ab'[::-1] }} {{ (1, 2) | list | length }} {{ 7 // 2 }}
{%- for key, value in {'a': 1, 'é<&>': [true, none]}.items() %} {{ key }}={{ value }}{% endfor %}
{%- set text %}{{ eos_token }}|{{ eos_token }}{% endset %}{{ text | indent(2) }}
{{- '{:.2f}'.format(1.0) }} {{ 'assistant' if add_generation_prompt else '-' }} {{ 'x' * 3 }}
"""
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "hé\n<b>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é", "b": [1, None]}}}] * 2,
    },
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "<think>x</think>\nok"},
    {"role": "user", "content": [{"type": "text", "text": "parts"}]},
]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "description": "d'\"<>&"}}]


def test_messages_become_the_prompt() -> None:
    text = render(CHATML, [{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.slow
def test_same_text_as_transformers(tools: list[Any] | None) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected = render_jinja_template(
        conversations=[MESSAGES],
        tools=tools,
        chat_template=RICH,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )[0]
    ours = render(RICH, MESSAGES, tools=tools, bos_token="<s>", eos_token="</s>")
    assert ours == expected[0]


def test_date_is_an_argument() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}", [], now=datetime(2024, 7, 26)) == "26 Jul 2024"


def test_extra_variables_reach_the_template() -> None:
    assert render("{{ 'on' if on else 'off' }}", [], extra={"on": 1}) == "on"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for", "line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3].role }}", "no element 3"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "TypeError|no loader"),
        ("{{ undefined.x }}", "undefined"),
    ],
)
def test_faulty_templates_are_typed_errors(template: str, says: str) -> None:
    with pytest.raises(TemplateError, match=says):
        render(template, [])


DOUBLING = "{% set ns = namespace(x='aa') %}{% for i in range(99) %}BODY{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ (10 ** 999) ** 999 }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format(1, w=10 ** 9) }}",
        "{{ range(10 ** 9) | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        DOUBLING.replace("BODY", "{% set ns.x = ns.x + ns.x %}"),
        DOUBLING.replace("BODY", "{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}"),
        DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] | join %}"),
        DOUBLING.replace("BODY", "{% set ns.x = ''.join([ns.x, ns.x]) %}"),
        DOUBLING.replace("BODY", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
        DOUBLING.replace("BODY", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
        DOUBLING.replace("BODY", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
        DOUBLING.replace("BODY", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | tojson }}",
    ],
)
def test_hostile_templates_end_soon_with_a_typed_error(template: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(TemplateError):
        render(template, [])
    assert time.monotonic() - start_s < 5
