"""Grammars of tool calls over a real vocabulary, with marks as text and as tokens of their own."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import tokenizers

from compute.grammar import Grammars
from models.checkpoint import open_checkpoint
from models.constraint import Constraint, check
from models.errors import BadConstraint
from models.tokenizer import Tokenizer
from models.tool_calls import AnswerParser, CallArguments, CallBegin, CallEnd, parse
from models.tool_format import reasoning_formats, tool_formats
from models.tool_grammar import Tool, after_thinking, call_constraint, check_tools, written_calls
from tests.models.default_model import default_model_path

pytestmark = pytest.mark.slow
FORMS = tool_formats()
THINK = reasoning_formats()["think"]
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string"}},
}
TOOLS = [Tool("get_weather", "w", WEATHER, strict=True), Tool("f.g", "", {"not": {}})]
ONE = [("get_weather", '{"city": "Rome é"}')]
TWO = [*ONE, ("f.g", '{"any": [1]}')]
MARKS = [
    *("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>", "<｜tool▁sep｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
]


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """SmolLM2's, as it is or with the marks of every form as control tokens."""
    plain = open_checkpoint(default_model_path()).tokenizer()
    if kind == "text":
        return plain
    backend = tokenizers.Tokenizer.from_str(plain.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in MARKS])
    found = {mark: backend.token_to_id(mark) for mark in MARKS}
    ids = {token_id: mark for mark, token_id in found.items() if token_id is not None}
    return Tokenizer(
        backend,
        spelling="byte_level",
        added={**{n: plain.token_bytes(n).decode() for n in plain.special_ids}, **ids},
        special_ids={*plain.special_ids, *ids},
        eos_ids=plain.eos_ids,
    )


@cache
def grammars_of(kind: str) -> Grammars:
    return Grammars(tokenizer_of(kind), tokenizer_of(kind).vocab_size)


def fits(kind: str, constraint: Constraint | None, text: str) -> bool:
    """Whether an answer may be this text as a whole, token by token."""
    assert constraint is not None
    tokenizer = tokenizer_of(kind)
    matcher = grammars_of(kind).matcher(constraint)
    ends = sorted(tokenizer.eos_ids)
    for token_id in tokenizer.encode(text):
        if matcher.complete or not matcher.allowed(ends)[token_id]:
            return False
        matcher.accept(token_id)
    return matcher.complete or bool(matcher.allowed(ends)[ends].all())


def made(kind: str, form: str, **more: Any) -> Constraint | None:
    return call_constraint(FORMS[form], TOOLS, tokenizer_of(kind), **more)


CASES = [*(("text", form) for form in sorted(FORMS)), ("tokens", "mistral"), ("tokens", "llama3")]


@pytest.mark.parametrize(("kind", "form"), [*CASES, ("tokens", "deepseek_v31")])
def test_calls_are_written_in_the_models_own_form(kind: str, form: str) -> None:
    one, two = written_calls(FORMS[form], ONE), written_calls(FORMS[form], TWO)
    wrong = [one.replace("get_weather", "get_wether"), one.replace('"Rome é"', "3"), one[:-2], "Hi"]
    lead = "" if FORMS[form].layout == "bare" else "I look, 3 < 4.\n"

    required = made(kind, form, choice="required")
    assert [fits(kind, required, text) for text in (one, two)] == [True, True]
    assert not any(fits(kind, required, text) for text in wrong)
    single = made(kind, form, choice="required", parallel=False)
    assert [fits(kind, single, text) for text in (one, two)] == [True, False]
    named = made(kind, form, named="f.g")
    assert [fits(kind, named, text) for text in (one, two)] == [False, False]
    assert fits(kind, named, written_calls(FORMS[form], TWO[1:]))

    auto = made(kind, form)
    assert all(fits(kind, auto, text) for text in (one, two, lead + one, "Hi", "3 < 4 <tool", ""))
    assert not any(fits(kind, auto, text) for text in wrong[:3])
    once = made(kind, form, parallel=False)
    assert [fits(kind, once, text) for text in (lead + one, lead + two)] == [True, False]

    thought = made(kind, form, choice="required", thoughts=THINK)
    assert fits(kind, thought, f"<think>\nhm < 3\n</think>\n\n{one}")
    assert fits(kind, thought, one)
    opened = made(kind, form, choice="required", thoughts=THINK, thinking=True)
    assert [fits(kind, opened, text) for text in (f"hm</think>{two}", one)] == [True, False]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_any_form_may_follow_the_thinking(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    lark = Constraint("lark", 'start: "x" y\ny: /[0-9]+/')
    for form, text in ((Constraint("json_object"), '{"a": 1}'), (lark, "x12")):
        assert after_thinking(form, None, tokenizer) == form
        either = after_thinking(form, THINK, tokenizer)
        check(either)
        assert fits(kind, either, text)
        assert fits(kind, either, f"<think>a {{ b</think>\n\n{text}")
        assert not fits(kind, either, "<think>a</think>\n\nb")
        opened = after_thinking(form, THINK, tokenizer, thinking=True)
        assert fits(kind, opened, f"a\n</think>\n{text}")
        assert not fits(kind, opened, text)


def test_what_is_written_under_a_grammar_is_read_as_calls() -> None:
    for form in FORMS.values():
        events = parse(
            AnswerParser(tools=form, tool_names=("get_weather", "f.g")), list(_all(form))
        )
        names = [event.name for event in events if isinstance(event, CallBegin)]
        given = [json.loads(event.text) for event in events if isinstance(event, CallArguments)]
        assert names == ["get_weather", "f.g"]
        assert given == [{"city": "Rome é"}, {"any": [1]}]
        assert all(event.complete for event in events if isinstance(event, CallEnd))


def _all(form: Any) -> str:
    return written_calls(form, TWO)


def test_nothing_is_enforced_where_nothing_was_asked() -> None:
    tokenizer, loose = tokenizer_of("text"), [Tool("f"), Tool("g", "", {"not": {}})]
    assert call_constraint(FORMS["hermes"], TOOLS, tokenizer, choice="none") is None
    assert call_constraint(FORMS["hermes"], loose, tokenizer) is None
    assert call_constraint(FORMS["hermes"], loose, tokenizer, choice="required") is not None


@pytest.mark.parametrize(
    ("tools", "more", "why"),
    [
        (
            [Tool("f", "", {"not": {}}, strict=True)],
            {},
            r"tools: f: parameters: at \$: keyword 'not'",
        ),
        ([Tool("f g")], {}, "name 'f g'"),
        ([Tool("f"), Tool("f")], {}, "two tools have the name 'f'"),
        ([Tool(f"f{n}") for n in range(200)], {}, "at most 128"),
        ([Tool("f")], {"named": "g"}, "no tool has the name 'g'"),
        ([], {"choice": "required"}, "at least one tool"),
    ],
)
def test_what_cannot_be_is_named(tools: list[Tool], more: dict[str, Any], why: str) -> None:
    with pytest.raises(BadConstraint, match=why):
        call_constraint(FORMS["hermes"], tools, tokenizer_of("text"), **more)


def test_many_tools_with_real_schemas() -> None:
    tools = [Tool(f"tool_{n}", "", WEATHER, strict=True) for n in range(128)]
    check_tools(tools)
    form = call_constraint(FORMS["hermes"], tools, tokenizer_of("text"), choice="required")
    last = written_calls(FORMS["hermes"], [("tool_127", '{"city": "X", "days": 3}')])
    assert fits("text", form, last)
