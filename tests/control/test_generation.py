"""A generation goes on over the deaths of its servers: same tokens, none lost, none twice."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Ref, Term
from bridge.text import text_of
from control.backend import DoneEvent, GenerateRequest, TokenEvent
from control.generation import GenerationLimits, generate
from control.journal import Journal
from models.constraint import Constraint

LIMITS = GenerationLimits(route_s=5.0, token_s=5.0)
REQUEST = GenerateRequest(
    model="m",
    prompt_ids=(1, 2, 3),
    max_tokens=12,
    request_id="r",
    constraint=Constraint("regex", "a+"),
)


class Books(GenServer):
    """Stands for the scheduler: starts the next epoch's server for every question."""

    def __init__(self, lives: list[int], *, admits: bool = True) -> None:
        super().__init__()
        self.admits = admits
        self.lives = lives  # tokens each epoch sends before it dies
        self.epoch = 0

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("find", "m"):
                self.epoch += 1
                life = self.lives.pop(0) if self.lives else 100
                pid = await gen_server.start(
                    self.me.node, Server(life, self.epoch, admits=self.admits or life > 0)
                )
                return (Atom("ok"), "m-1", pid)
            case ("find", _):
                return (Atom("error"), Atom("unknown_model"), "no such model")
            case _:
                return None


class Server(GenServer):
    """Stands for coordinator and rank: token n is 100 + n; dies after ``life`` tokens."""

    def __init__(self, life: int, epoch: int, *, admits: bool) -> None:
        super().__init__()
        self.admits = admits
        self.life, self.epoch = life, epoch

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("submit", Ref() as ref, dict(options)):
                self.me.spawn(lambda me: self._speak(me, from_[0], ref, options), link=True)
                return (Atom("ok"), self.epoch, self.me.pid)
            case _:
                return None

    async def _speak(self, me: Process, to: Pid, ref: Ref, options: dict[Any, Term]) -> None:
        start = len(options["generated"])
        assert options["generated"] == [100 + n for n in range(start)]
        grammar = {key: text_of(value) for key, value in options["grammar"].items()}
        assert grammar == {"kind": "regex", "text": "a+", "before": ""}
        if self.admits:
            me.send(to, (Atom("admitted"), ref))
        for index in range(start, options["max_tokens"]):
            if self.life == 0:
                raise RuntimeError("rank lost")
            self.life -= 1
            stale = me.make_ref()
            me.send(to, (Atom("token"), stale, index, 999, Atom("undefined"), []))
            me.send(to, (Atom("token"), ref, index, 100 + index, -0.5, [(7, -1.5)]))
            await asyncio.sleep(0)
        me.send(to, (Atom("done"), ref, Atom("length"), b""))


async def run(lives: list[int], *, admits: bool = True) -> tuple[list[Any], int, Any]:
    node = Node("t@127.0.0.1", "c")
    journal = Journal()
    pauses: list[float] = []
    books = Books(lives, admits=admits)
    await gen_server.start(node, books, name="scheduler")
    events = [
        event
        async for event in generate(
            node, journal, REQUEST, limits=LIMITS, on_recovery=pauses.append
        )
    ]
    assert len(journal) == 0
    left = [p.label for p in node.processes() if p.label.startswith("request")]
    await node.stop()
    assert left == []
    return events, books.epoch, pauses


def undisturbed() -> list[Any]:
    tokens = [TokenEvent(n, 100 + n, -0.5, ((7, -1.5),)) for n in range(12)]
    return [*tokens, DoneEvent("length")]


@pytest.mark.parametrize("lives", [[], [5], [1, 1, 1, 1, 1], [0, 3, 0, 2], [12]])
def test_every_token_once_and_in_order(lives: list[int]) -> None:
    deaths = len([life for life in lives if life < 12])
    events, epochs, pauses = asyncio.run(run(list(lives)))
    assert events == undisturbed()
    assert epochs == deaths + 1
    assert len(pauses) <= deaths
    assert bool(pauses) == bool(deaths)


def test_a_request_that_kills_every_server_ends_with_an_error() -> None:
    events, epochs, _ = asyncio.run(run([0] * 10))
    (done,) = events
    assert done.reason == "error"
    assert "4 servers were lost in a row" in done.text
    assert epochs == 4


def test_a_request_that_waits_in_a_queue_is_not_to_blame() -> None:
    events, epochs, _ = asyncio.run(run([0] * 10, admits=False))
    assert events == undisturbed()
    assert epochs == 11


def test_closing_the_iterator_ends_its_process_so_that_the_rank_hears_of_it() -> None:
    async def main() -> None:
        node = Node("t@127.0.0.1", "c")
        await gen_server.start(node, Books([]), name="scheduler")
        journal = Journal()
        stream = generate(node, journal, REQUEST, limits=LIMITS)
        await anext(stream)
        assert any(p.label == "request r" for p in node.processes())
        await stream.aclose()
        assert not any(p.label == "request r" for p in node.processes())
        assert len(journal) == 0
        await node.stop()

    asyncio.run(main())


class FarServer(Server):
    """On another node, and it outlives its ports: each speaks as long as the next of ``lives``."""

    def __init__(self, lives: list[int]) -> None:
        super().__init__(0, 1, admits=True)
        self._lives = lives

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("submit", Ref() as ref, dict(options)):
                self.life = self._lives.pop(0)
                if self.life < 0:
                    return (Atom("error"), Atom("unreachable"), "no way to that machine")
                speak = partial(self._speak, to=from_[0], ref=ref, options=options)
                return (Atom("ok"), 1, self.me.spawn(speak))
            case _:
                return await super().handle_call(request, from_)


class Found(GenServer):
    """Stands for the scheduler of a machine whose models run on another."""

    def __init__(self, server: Pid) -> None:
        super().__init__()
        self._server = server

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return (Atom("ok"), "m-1", self._server)


@pytest.mark.parametrize(
    ("lives", "limits", "end"),
    [
        ([5, 0, 3, 100], LIMITS, undisturbed()),  # the link to a port is lost, the rest lives
        ([5, -1, -1, 100], LIMITS, undisturbed()),  # and the way back takes time
        (
            [-1] * 99,
            GenerationLimits(route_s=0.1, token_s=5.0),
            [
                DoneEvent(
                    "error",
                    'no token for 0 s; at last: {error,unreachable,<<"no way to that machine">>}',
                )
            ],
        ),
    ],
)
def test_a_port_of_another_machine_is_watched_besides_its_coordinator(
    lives: list[int], limits: GenerationLimits, end: list[Any]
) -> None:
    async def main() -> None:
        here, there = Node("here@127.0.0.1", "c"), Node("there@127.0.0.1", "c")
        for node in (here, there):
            await node.start(listen=("127.0.0.1", 0), epmd=None)
        try:
            assert there.address is not None
            assert await here.connect("there@127.0.0.1", address=there.address)
            server = await gen_server.start(there, FarServer(list(lives)))
            await gen_server.start(here, Found(server), name="scheduler")
            events = [e async for e in generate(here, Journal(), REQUEST, limits=limits)]
            assert events == end
        finally:
            await here.stop()
            await there.stop()

    asyncio.run(main())
