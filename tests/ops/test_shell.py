"""What can be typed into ``ctl shell``, what Tab offers there, and what runs nothing."""

from __future__ import annotations

import ast
import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.shell import LEAVE, NAMES, Call, Functions, ShellError, option_names, parse, run_line
from ops.shell_completion import Wanted, wanted

NOBODY: Any = None  # nothing may be asked of a node
GENERATE = [f"{name}=" for name in option_names("generate")]
LOAD = [f"{name}=" for name in option_names("load")]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("status()", Call("status", (), {})),
        ('  load("m", slots=4) ', Call("load", ("m",), {"slots": 4})),
        ("load('m', shares=[2, 1])", Call("load", ("m",), {"shares": [2, 1]})),
        ("f(-1, 2.5, None, True, (1, 'a'))", Call("f", (-1, 2.5, None, True, (1, "a")), {})),
        ("exit", Call("exit", (), {})),
    ],
)
def test_calls_with_literals(line: str, call: Call) -> None:
    assert parse(line) == call


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("status", "write status()"),
        ("1 + 1", "only calls"),
        ("a.b()", "only calls"),
        ("__import__('os').system('id')", "only calls"),
        ("(lambda: 1)()", "only calls"),
        ("load(open('x'))", "is no literal"),
        ("load(*['a'])", "is no literal"),
        ("load(**{'a': 1})", "write each option as name=value"),
        ("load(x)", "x is no literal"),
        ("load(f'{1}')", "is no literal"),
        ("load(", "syntax error at column 5"),
        ("a = 1", "syntax error"),
        ("status(); status()", "syntax error"),
        ("load('\0')", "."),
        ("(" * 3000, "."),
        ("load(" + "-" * 9000 + "1)", "cannot be read"),
        ("f(" + "[" * 500 + "]" * 500 + ")", "too many nested parentheses"),
        ("load(x" + ".a" * 5000 + ")", "cannot be read"),
        ("x" * 30_000, "a line has up to 20000 characters"),
    ],
)
def test_what_is_refused_in_one_line(line: str, why: str) -> None:
    with pytest.raises(ShellError) as caught:
        parse(line)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40) | st.text("abc()[]{},='\"1 *.:-+\\\n#f", max_size=40))
def test_any_line_is_a_call_of_literals_or_an_error(line: str) -> None:
    try:
        call = parse(line)
    except ShellError:
        return
    for value in (*call.args, *call.options.values()):
        assert ast.literal_eval(repr(value)) == value


LITERAL = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)


@given(st.lists(LITERAL | st.lists(LITERAL)), st.dictionaries(st.sampled_from("abc"), LITERAL))
def test_literals_arrive_as_they_were_typed(args: list[object], options: dict[str, object]) -> None:
    typed = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in options.items())])
    if "inf" not in typed:
        assert parse(f"name({typed})") == Call("name", tuple(args), options)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nothing()", "no function nothing; there are: status, nodes"),
        ("__init__()", "no function __init__"),
        ("_ask('status')", "no function _ask"),
        ("load()", "load: model: Missing required argument. It is load(model, tensor="),
        ("load(1)", "load: 0: Input should be a valid string"),
        ("load('m', slots='4')", "slots: Input should be a valid integer"),
        ("load('m', slots=0)", "slots: Input should be greater than or equal to 1"),
        ("load('m', colour=1)", "colour: Unexpected keyword argument"),
        ("kill('a', 'b')", "1: Unexpected positional argument"),
        ("generate('m', 'p', temperature=3)", "temperature: Input should be less than"),
    ],
)
def test_functions_and_arguments_are_checked_before_anything_is_asked(line: str, why: str) -> None:
    with pytest.raises(ShellError) as caught:
        asyncio.run(run_line(Functions(NOBODY), line))
    assert why in str(caught.value)


NAMED = tuple(f"{name}(" for name in NAMES)


@pytest.mark.parametrize(
    ("before", "offered"),
    [
        ("", Wanted("", words=(*NAMED, *sorted(LEAVE)))),
        ("sta", Wanted("sta", words=(*NAMED, *sorted(LEAVE)))),
        ('kill("sch', Wanted("sch", about="tree")),
        ("load('smol", Wanted("smol", about="models")),
        ('swap("a", "b', Wanted("b", about="models")),
        ('swap("', Wanted("", about="instances")),
        ('generate("m", "what is kill(', Wanted("what is kill(")),
        ('generate("m", "p", max', Wanted("max", words=tuple(GENERATE))),
        ('load("m", slots=4, ', Wanted("", words=tuple(LOAD))),
        ("nonsense(x", Wanted("")),
        ("1 + ", Wanted("")),
    ],
)
def test_what_tab_offers(before: str, offered: Wanted) -> None:
    assert wanted(before) == offered
