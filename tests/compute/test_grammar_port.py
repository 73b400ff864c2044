"""A port with the default model: grammars by message, compiled beside the streams, resumed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import pytest

from bridge import gen_server
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from compute.port_server import PortServer
from models.checkpoint import open_checkpoint
from models.tokenizer import Tokenizer
from tests.models.default_model import default_model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # compiles on a fresh machine
WAIT_S = 200.0
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "n": {"enum": [1, 22, 333]}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
)
# Some 0.1 s to compile, beside what the vocabulary takes the first time.
LARGE = json.dumps({"enum": [f"value {number} {'x' * 90}" for number in range(2000)]})
Body = Callable[[Process, Pid], Awaitable[None]]


@cache
def tokenizer() -> Tokenizer:
    return open_checkpoint(default_model_path()).tokenizer()


def on_a_port(body: Body) -> None:
    """Run ``body`` with a port that holds the model."""

    async def scenario() -> None:
        node, ended = Node("port@127.0.0.1", "c"), list[int]()
        port = await gen_server.start(node, PortServer("p", end=ended.append))
        options: dict[Any, Term] = {
            Atom("instance"): "i",
            Atom("epoch"): 1,
            Atom("rank"): 0,
            Atom("path"): str(default_model_path()),
            Atom("context_tokens"): 200,
            Atom("threads"): 2,
            Atom("device"): "cpu",
        }
        with node.open_process(label="test") as me:
            loaded: Any = await gen_server.call(me, port, (Atom("load"), options), timeout_s=WAIT_S)
            assert loaded[0] == "ok"
            await body(me, port)
            gone = me.monitor(port)
            gen_server.cast(me, port, Atom("stop"))
            await me.receive(lambda m: m if m[:2] == ("DOWN", gone) else None, timeout_s=WAIT_S)
        await node.stop()
        assert not ended

    asyncio.run(scenario())


def submit(me: Process, port: Pid, kind: str, text: str, **more: Term) -> Ref:
    options: dict[Any, Term] = {
        Atom("prompt"): tokenizer().encode("Who?"),
        Atom("max_tokens"): 80,
        Atom("temperature"): 1.0,
        Atom("seed"): 4,
        Atom("stop_ids"): sorted(tokenizer().eos_ids),
    }
    if kind:
        options[Atom("grammar")] = {Atom("kind"): Atom(kind), Atom("text"): text}
    ref = me.make_ref()
    given = {Atom(key): value for key, value in more.items()}
    gen_server.cast(me, port, (Atom("submit"), me.pid, ref, options | given))
    return ref


async def answer(me: Process, ref: Ref) -> tuple[list[int], str, str]:
    """Token ids, reason and text."""
    ids: list[int] = []
    while True:
        message: Any = await me.receive(
            lambda m: m if m[0] in ("token", "done") and m[1] == ref else None, timeout_s=WAIT_S
        )
        if message[0] == "done":
            return ids, str(message[2]), text_of(message[3])
        ids.append(message[3])


def test_a_schema_by_message_and_after_a_crash_in_the_middle() -> None:
    found: list[list[int]] = []

    async def whole(me: Process, port: Pid) -> None:
        ids, reason, _ = await answer(me, submit(me, port, "json_schema", SCHEMA))
        assert reason == "stop"
        assert json.loads(tokenizer().decode(ids))["n"] in (1, 22, 333)
        found.append(ids)

    async def rest(me: Process, port: Pid) -> None:
        (ids,) = found
        for cut in (3, len(ids) - 1, len(ids)):
            given = submit(me, port, "json_schema", SCHEMA, generated=ids[:cut])
            assert await answer(me, given) == (ids[cut:], "stop", "")

    on_a_port(whole)
    on_a_port(rest)  # another port, as the next epoch's


def test_bad_grammars_end_their_requests_and_no_stream_waits() -> None:
    async def body(me: Process, port: Pid) -> None:
        stream = submit(me, port, "", "", max_tokens=60, stop_ids=[])
        large = submit(me, port, "json_schema", LARGE, max_tokens=2)
        bad = [
            (submit(me, port, "json_schema", '{"not": {}}'), "keyword 'not'"),
            (submit(me, port, "regex", "(a"), "unclosed group"),
            (submit(me, port, "xml", "a"), "grammar: expected one of json_object"),
            (submit(me, port, "lark", "start: <|none|>"), "unknown special token"),
            (submit(me, port, "regex", "a+", generated=[4000]), "cannot go on"),
        ]
        gone = submit(me, port, "regex", "(a|b)+")
        gen_server.cast(me, port, (Atom("cancel"), gone))
        ids, reason, _ = await answer(me, stream)
        assert (len(ids), reason) == (60, "length")
        for ref, why in bad:
            ids, reason, text = await answer(me, ref)
            assert (ids, reason) == ([], "error")
            assert why in text
        assert (await answer(me, gone))[1] == "cancelled"
        assert (await answer(me, large))[1] == "length"

    on_a_port(body)
