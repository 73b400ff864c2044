"""Erlang text in and out: parsing what the shell evaluates, printing as ``~p`` does."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.erl_eval import Commands, EvalError, Evaluator
from bridge.erl_format import format_term
from bridge.erl_parse import parse, parse_text
from bridge.erl_scan import ErlangSyntaxError, from_erlang
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, BitBinary, Export, ImproperList, MapPairs, Pid, Ref, Term

A = Atom


async def echo(me: Process, *arguments: Term) -> Term:
    return list(arguments)


COMMANDS: Commands = {("echo", 0): echo, ("echo", 2): echo}


def value_of(text: str, evaluator: Evaluator | None = None) -> Term:
    async def main() -> Term:
        chosen = evaluator or Evaluator(COMMANDS, {("mod", "echo", 1): echo})
        with Node("here@127.0.0.1", "cookie").open_process() as me:
            return await chosen.evaluate(me, parse_text(text))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a, 'B c', \"de\", 'it\\'s'}.", (A("a"), A("B c"), [100, 101], A("it's"))),
        ("[1, -2, +3, 16#fF, 2#101, 1_000]", [1, -2, 3, 255, 5, 1000]),
        ("[1.5, -2.0e-3, $a, $\\n, $\\s]", [1.5, -0.002, 97, 10, 32]),
        ("[a | b]", ImproperList((A("a"),), A("b"))),
        ("[a, b | [c]]", [A("a"), A("b"), A("c")]),
        ('#{a => 1, <<"k">> => #{}}.', {A("a"): 1, b"k": {}}),
        ("#{[] => 1}", MapPairs((([], 1),))),
        ('<<"abc", 1, 256>>', b"abc\x01\x00"),
        ('<<"é"/utf8>>', "é".encode()),
        ('"two " "parts\\x{e9}"', [ord(c) for c in "two partsé"]),
        ("true, false.", False),
        ("{}, [], ({a}).", (A("a"),)),
        ("% a comment\n x % and another\n.", A("x")),
        ("echo(1, echo()).", [1, []]),
        ("mod:echo({x}).", [(A("x"),)]),
        ("X = 1, Y = [X, X], Y.", [1, 1]),
        ("", None),
    ],
)
def test_values(text: str, value: Term) -> None:
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo(", "* 1:4: syntax error before: "),
        ("foo(a b).", "* 1:7: syntax error before: b"),
        ("{a,\n  )}.", "* 2:3: syntax error before: ')'"),
        ("1 + 2.", "* 1:3: syntax error before: '+'"),
        ("a. b.", "* 1:4: syntax error before: b"),
        ("'abc", "* 1:1: unterminated atom"),
        ('"abc', "* 1:1: unterminated string"),
        ("a ~ b", "* 1:3: illegal character"),
        ("37#1", "* 1:1: illegal integer"),
        ("1" * 5000, "* 1:1: illegal integer"),
        ("1.0e999", "* 1:1: illegal float"),
        ("[" * 5000, "* 1:101: nested too deep"),
        ("X.", "* 1:1: variable 'X' is unbound"),
        ("foo().", "** exception error: undefined shell command foo/0"),
        ("foo:bar(1).", "** exception error: undefined function foo:bar/1"),
        ("X = 1, X = 2.", "** exception error: no match of right hand side value"),
        ("<<{}>>", "** exception error: bad argument in a binary"),
    ],
)
def test_errors_read_as_in_the_erlang_shell(text: str, message: str) -> None:
    with pytest.raises((ErlangSyntaxError, EvalError)) as caught:
        value_of(text)
    assert str(caught.value) == message


def test_variables_stay_bound_in_a_session() -> None:
    evaluator = Evaluator(COMMANDS, {})
    value_of("X = {1}.", evaluator)
    assert value_of("[X].", evaluator) == [(1,)]


def test_tokens_of_a_stock_scanner() -> None:
    tokens: Term = [
        (A("{"), (1, 1)),
        (A("atom"), (1, 2), True),
        (A(","), 1),
        (A("string"), (1, 5), []),
        (A("}"), (1, 7)),
        (A("dot"), (1, 8)),
    ]
    assert value_of_tokens(tokens) == (True, [])
    for bad in (None, [1], [(A("atom"), A("x"), 1)], [(1, 2)]):
        with pytest.raises(ErlangSyntaxError):
            from_erlang(bad)


def value_of_tokens(tokens: Term) -> Term:
    async def main() -> Term:
        with Node("here@127.0.0.1", "cookie").open_process() as me:
            return await Evaluator({}, {}).evaluate(me, parse(from_erlang(tokens)))

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (A("ok"), "ok"),
        (A("Hello"), "'Hello'"),
        (A("and"), "'and'"),
        (A(""), "''"),
        (A("a@b.c"), "'a@b.c'"),
        (True, "true"),
        (1.0, "1.0"),
        (1e22, "1.0e22"),
        (-1.5e-10, "-1.5e-10"),
        (b"text", '<<"text">>'),
        ("é".encode(), '<<"é"/utf8>>'),
        (b"", "<<>>"),
        (b"\xff\x00", "<<255,0>>"),
        ([104, 105], '"hi"'),
        ([104, 1], "[104,1]"),
        ([], "[]"),
        ((A("a"), [1, 2]), "{a,[1,2]}"),
        ({A("k"): {1: 2}}, "#{k => #{1 => 2}}"),
        (ImproperList((1,), A("x")), "[1|x]"),
        (BitBinary(b"\x01\xa0", 3), "<<1,5:3>>"),
        (Export(A("m"), A("f"), 2), "fun m:f/2"),
        (Pid("here@h", 5, 0, 1), "<0.5.0>"),
        (Pid("there@h", 5, 0, 1), "<there@h.5.0>"),
        (Ref("here@h", 1, (1, 2, 3)), "#Ref<0.3.2.1>"),
    ],
)
def test_printing(term: Term, text: str) -> None:
    assert format_term(term, node="here@h") == text


def test_long_terms_are_broken_as_the_shell_does() -> None:
    term = {A("key"): [A("a" * 30), A("b" * 30), A("c" * 30)], A("other"): 1}
    assert format_term(term) == (
        "#{key => [" + "a" * 30 + ",\n          " + "b" * 30 + ",\n          " + "c" * 30 + "],\n"
        "  other => 1}"
    )


TERMS = st.recursive(
    st.one_of(
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.text(max_size=8).map(A).filter(lambda a: a not in ("true", "false")),
        st.binary(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.binary(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(TERMS)
def test_what_is_printed_reads_as_the_same_term(term: Term) -> None:
    assert value_of(format_term(term)) == term
