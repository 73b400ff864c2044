"""The module ``phalanx`` of a node: what peers may call by ``rpc`` and ``erpc``.

All of it goes through the registered ``cluster``, and the replies are its own (CONTRACT
section 4). Text may come as a binary, a string or an atom; options as a map or a list of pairs.
"""

from __future__ import annotations

from typing import Any, Final

from bridge import gen_server
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.rpc import ErlangError, Functions
from bridge.term import Atom, MapPairs, Term
from bridge.text import text_of

MODULE: Final = "phalanx"
# Longer than `cluster` itself takes at most: it is the one that knows what was slow.
ASK_S: Final = 30.0
LOAD_S: Final = 90.0
UNLOAD_S: Final = 150.0
SWAP_S: Final = 2000.0
GENERATE_S: Final = 3600.0
TOKEN_S: Final = 660.0  # `cluster` gives up before, and says why

_NO_OPTIONS: Final = MapPairs(())
_TEXT_OPTIONS: Final = frozenset({"engine", "device", "experts"})


async def status(me: Process) -> Term:
    return await ask(me, Atom("status"))


async def leader(me: Process) -> Term:
    return await ask(me, Atom("leader"))


async def nodes(me: Process) -> Term:
    return await ask(me, Atom("nodes"))


async def topology(me: Process) -> Term:
    return await ask(me, Atom("topology"))


async def instances(me: Process) -> Term:
    return await ask(me, Atom("instances"))


async def load(me: Process, model: Term, options: Term = _NO_OPTIONS) -> Term:
    request = (Atom("load"), text(model), options_of(options))
    return await ask(me, request, timeout_s=LOAD_S)


async def unload(me: Process, instance: Term) -> Term:
    return await ask(me, (Atom("unload"), text(instance)), timeout_s=UNLOAD_S)


async def swap(me: Process, old: Term, new: Term) -> Term:
    return await ask(me, (Atom("swap"), text(old), text(new)), timeout_s=SWAP_S)


async def generate(me: Process, model: Term, prompt: Term, options: Term) -> Term:
    request = (Atom("generate"), text(model), _prompt(prompt), options_of(options))
    return await ask(me, request, timeout_s=GENERATE_S)


async def generate_attended(
    me: Process, model: Term, prompt: Term, options: Term = _NO_OPTIONS
) -> Term:
    """``generate`` for somebody who waits: it is cancelled when ``me`` ends."""
    given = options_of(options)
    if Atom("stream_to") in given:
        return await generate(me, model, prompt, options)
    given[Atom("stream_to")] = me.pid
    request = (Atom("generate"), text(model), _prompt(prompt), given)
    reply = await ask(me, request, timeout_s=GENERATE_S)
    if reply[0] != "ok":
        return reply
    ref, parts = reply[1], []
    while True:
        try:
            what = await me.receive(
                lambda m: m[2] if isinstance(m, tuple) and m[:2] == ("phalanx", ref) else None,
                timeout_s=TOKEN_S,
            )
        except ReceiveTimeout:
            return (Atom("error"), Atom("timeout"), f"no token for {TOKEN_S:.0f} s")
        match what:
            case ("token", _, piece):
                parts.append(text_of(piece))
            case ("done", "error", usage):
                return (Atom("error"), Atom("generation"), usage.get(Atom("error"), b""))
            case ("done", _, usage):
                return (Atom("ok"), "".join(parts), usage)


def functions() -> Functions:
    """The table for ``Node.functions``."""
    return {
        (MODULE, "status", 0): status,
        (MODULE, "leader", 0): leader,
        (MODULE, "nodes", 0): nodes,
        (MODULE, "topology", 0): topology,
        (MODULE, "instances", 0): instances,
        (MODULE, "load", 1): load,
        (MODULE, "load", 2): load,
        (MODULE, "unload", 1): unload,
        (MODULE, "swap", 2): swap,
        (MODULE, "generate", 3): generate,
    }


async def ask(me: Process, request: Term, *, timeout_s: float = ASK_S) -> Term:
    """The reply of this node's ``cluster``. Raises CallError, which callers see as OTP's exit."""
    return await gen_server.call(me, Atom("cluster"), request, timeout_s=timeout_s)


def text(value: Term) -> bytes:
    """``value`` as a UTF-8 binary. Raises ErlangError(badarg) for what is no text."""
    match value:
        case str():
            return value.encode("utf-8", "replace")
        case bytes():
            return value
        case list() if _is_text(value):
            return "".join(map(chr, value)).encode("utf-8", "replace")
        case _:
            raise ErlangError(Atom("badarg"))


def options_of(options: Term) -> dict[Any, Term]:
    """A map, or a list of pairs, as a map with atom keys. Raises ErlangError(badarg)."""
    match options:
        case dict():
            pairs = list(options.items())
        case MapPairs():
            pairs = list(options.pairs)
        case list() if all(isinstance(pair, tuple) and len(pair) == 2 for pair in options):
            pairs = options
        case _:
            raise ErlangError(Atom("badarg"))
    return {Atom(name): _option(name, value) for name, value in _named(pairs)}


def _named(pairs: list[tuple[Term, Term]]) -> list[tuple[str, Term]]:
    return [(text(key).decode("utf-8", "replace"), value) for key, value in pairs]


def _option(name: str, value: Term) -> Term:
    """A string is a list of numbers: only the option's name tells which it is meant to be."""
    if name in _TEXT_OPTIONS and isinstance(value, list) and _is_text(value):
        return text(value)
    if name == "stop" and isinstance(value, list):
        if value and _is_text(value):
            return text(value)
        return [text(one) for one in value]
    return value


def _prompt(prompt: Term) -> Term:
    """Text, or a conversation as a list of maps."""
    if isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
        return prompt
    return text(prompt)


def _is_text(codes: list[Term]) -> bool:
    return all(type(code) is int and 0 <= code < 0x110000 for code in codes)
