"""Answers taken apart: calls, thinking and text, the same however the text was cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.tool_calls import (
    AnswerParser,
    CallArguments,
    CallBegin,
    CallEnd,
    ContentDelta,
    Event,
    ReasoningDelta,
    parse,
)
from models.tool_format import reasoning_formats, tool_formats
from models.tool_grammar import written_calls

FORMS = tool_formats()
THINK = reasoning_formats()["think"]
NAMES = ("get_weather", "f", "g.h-2")


def events_of(form: str, pieces: list[str], **more: Any) -> list[Event]:
    return parse(AnswerParser(tools=FORMS[form], tool_names=NAMES, **more), pieces)


def call(index: int, name: str, arguments: str, *, complete: bool = True) -> list[Event]:
    middle: list[Event] = [CallArguments(index, arguments)] if arguments else []
    return [CallBegin(index, name), *middle, CallEnd(index, complete)]


def cut(text: str, at: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(one % (len(text) + 1) for one in at)})
    return [text[a:b] for a, b in pairwise(edges)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
arguments_texts = st.builds(
    lambda value, indent, ascii_: json.dumps(value, indent=indent, ensure_ascii=ascii_),
    st.dictionaries(st.text(max_size=6), json_values, max_size=3),
    st.sampled_from([None, 2]),
    st.booleans(),
)
cuts = st.lists(st.integers(0, 2000), max_size=12)
# Plain text that no form could take for one of its marks.
prose = st.text(alphabet="abc é日\n.,!?😀", max_size=30)


@pytest.mark.parametrize("form", sorted(FORMS))
@given(
    made=st.lists(st.tuples(st.sampled_from(NAMES), arguments_texts), min_size=1, max_size=3),
    before=prose,
    at=cuts,
)
@settings(max_examples=40, deadline=None)
def test_what_a_model_writes_is_read(
    form: str, made: list[tuple[str, str]], before: str, at: list[int]
) -> None:
    lead = "" if FORMS[form].layout == "bare" else before
    text = lead + written_calls(FORMS[form], made)
    expected: list[Event] = [ContentDelta(lead.rstrip())] if lead.strip() else []
    for index, (name, arguments) in enumerate(made):
        expected += call(index, name, arguments)
    assert events_of(form, cut(text, at)) == expected


PARTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json\n"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "function", "<｜tool▁sep｜>", "\n```"),
    *(
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "<think>",
        "</think>",
        '{"name": "f"',
        "[",
        "]",
    ),
    *(
        ', "arguments": {"a": 1}',
        ', "parameters": {}',
        "}",
        "{",
        '"',
        ",",
        ";",
        " ",
        "\n",
        "é😀",
        "x",
    ),
    *('"name": "g.h-2"', '"arguments": "{}"', ":", "\\", "f", "<", "null", "<tool", "text"),
]


@pytest.mark.parametrize("form", sorted(FORMS))
@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), at=cuts, thinking=st.booleans())
@settings(max_examples=150, deadline=None)
def test_nothing_depends_on_the_cuts_and_nothing_is_made_up(
    form: str, parts: list[str], at: list[int], thinking: bool
) -> None:
    text = "".join(parts)
    more = {"reasoning": THINK, "thinking": thinking}
    whole = events_of(form, [text], **more)
    assert events_of(form, cut(text, at), **more) == whole
    assert events_of(form, list(text), **more) == whole
    opened: list[int] = []
    rest = text
    for event in whole:
        match event:
            case CallBegin(index, name):
                assert index == len(opened)
                opened.append(index)
                assert name
            case CallArguments(index, _) | CallEnd(index, _):
                assert index == opened[-1]
            case ReasoningDelta(shown) | ContentDelta(shown):
                assert shown
                _, found, rest = rest.partition(shown)
                assert found == shown  # as it was written, in its order
    if not opened and not thinking and "<think>" not in text:
        said = [event.text for event in whole if isinstance(event, ContentDelta)]
        assert "".join(said) == text  # no call: no character is lost


CASES: list[tuple[str, str, list[Event]]] = [
    (
        "hermes",
        "Sure.\n<tool_call>\n{'name'}\n</tool_call>",
        [ContentDelta("Sure.\n<tool_call>\n{'name'}\n</tool_call>")],
    ),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', call(0, "f", "{}")),
    (
        "hermes",
        '<tool_call>{"arguments": {"a":1}, "name": "f"}</tool_call> and <b>',
        [*call(0, "f", '{"a":1}'), ContentDelta("and <b>")],
    ),
    (  # the object as a text, and a list
        "hermes",
        '<tool_call>[{"name":"f","arguments":"{\\"a\\":1}"},{"name":"f","parameters":null}]'
        "</tool_call>",
        [*call(0, "f", '{"a":1}'), *call(1, "f", "{}")],
    ),
    (  # an end that was forgotten
        "hermes",
        '<tool_call>{"name": "f"}\n<tool_call>{"name": "f"}</tool_call>',
        [*call(0, "f", "{}"), *call(1, "f", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a', call(0, "f", '{"a', complete=False)),
    (
        "hermes",
        '<tool_call>{"name": "f", "argu',
        [ContentDelta('<tool_call>{"name": "f", "argu')],
    ),
    ("hermes", "less < more <tool", [ContentDelta("less < more <tool")]),
    ("hermes", " \n", [ContentDelta(" \n")]),
    ("llama3", '<|python_tag|>{"name": "f", "parameters": {}}', call(0, "f", "{}")),
    ("llama3", '{"name": "Bob", "age": 3}', [ContentDelta('{"name": "Bob", "age": 3}')]),
    ("llama3", '{"name": "Bob"}', [ContentDelta('{"name": "Bob"}')]),
    ("llama3", 'so: {"name": "f"}', [ContentDelta('so: {"name": "f"}')]),
    ("llama3", '\n{"answer": 4}\n', [ContentDelta('\n{"answer": 4}\n')]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abc"}] so',
        [*call(0, "f", "{}"), ContentDelta("so")],
    ),
    (
        "mistral_args",
        '[TOOL_CALLS]f[CALL_ID]123[ARGS]{"a": 1}[TOOL_CALLS]f[ARGS]{}',
        [*call(0, "f", '{"a": 1}'), *call(1, "f", "{}")],
    ),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_cases(form: str, text: str, expected: list[Event]) -> None:
    assert events_of(form, [text]) == expected


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        (
            "<think>\nhm <b\n</think>\n\nyes ",
            False,
            [ReasoningDelta("hm <b"), ContentDelta("yes ")],
        ),
        ("hm</think>yes", True, [ReasoningDelta("hm"), ContentDelta("yes")]),
        ("<think>for ever ", False, [ReasoningDelta("for ever")]),
        ("<think></think>a </think>", False, [ContentDelta("a </think>")]),
        ("a <think>b</think>", False, [ContentDelta("a <think>b</think>")]),
        (" <thin air", False, [ContentDelta(" <thin air")]),
    ],
)
def test_thinking_is_split_off(text: str, thinking: bool, expected: list[Event]) -> None:
    parser = AnswerParser(reasoning=THINK, thinking=thinking)
    assert parse(parser, [text]) == expected
    assert parse(AnswerParser(reasoning=THINK, thinking=thinking), list(text)) == expected
    assert parser.num_calls == 0


def test_without_tools_nothing_is_a_call() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert parse(AnswerParser(), [text]) == [ContentDelta(text)]


def test_arguments_come_out_as_they_are_written() -> None:
    parser = AnswerParser(tools=FORMS["hermes"])
    for char in '<tool_call>{"name": "f", "arguments": ':
        assert parser.push(char) == []
    assert parser.push("{") == [CallBegin(0, "f"), CallArguments(0, "{")]
    assert parser.push('"a": ') == [CallArguments(0, char) for char in '"a": ']
    assert parser.num_calls == 1
