"""Who waits for an instance: how long, for whom, and what they are told at last."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process_errors import CallTimeout
from bridge.term import Atom, Term
from control.finder import RELAY_S
from tests.control.in_loop import in_loop
from tests.control.lab import LabMachine, lab, until

A = Atom
N1, N2, N3 = "n1@127.0.0.1", "n2@127.0.0.1", "n3@127.0.0.1"
ROOM = 4 * 10**9


def waiting(one: LabMachine) -> int:
    return int(one.state()["waiting"])


def later(one: LabMachine, *request: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(one.ask(*request))


class Leader(GenServer):
    """``scheduler`` of a machine that leads: counts the questions, answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Term, Any]] = []

    async def handle_call(self, request: Term, from_: Term) -> Term:
        self.asked.append((request, from_))
        return NOREPLY

    def answer(self, term: Term) -> None:
        for _, from_ in self.asked:
            gen_server.reply(self.me, from_, term)


@in_loop
async def test_the_leader_lets_them_wait_as_long_as_it_comes_up(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ROOM}, leader=N1) as made:
        one = made[N1]
        assert await one.ask("load", "slow", {}) == (A("ok"), "slow-1")  # it is being fetched
        find = later(one, "find", "slow")
        await until(lambda: waiting(one))
        made.clock.now_s += 60
        one.tick()
        assert await one.states() == {"slow-1": "pulling"}
        assert waiting(one) == 1
        assert await one.ask("unload", "slow-1") == A("ok")
        assert (await find)[:2] == (A("error"), A("not_loaded"))


@in_loop
async def test_who_has_waited_long_gets_15_s_more_when_the_leader_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ROOM, N2: ROOM}, leader=N1) as made:
        two = made[N2]
        assert await two.ask("load", "slow", {}) == (A("ok"), "slow-1")
        find = later(two, "find", "slow")
        await until(lambda: waiting(made[N1]))
        made.clock.now_s += 300
        made.lead("", 1)
        await until(lambda: two.state()["leader"] == "undefined")
        two.tick()
        await two.ask("wanted")
        assert waiting(two) == 1
        made.lead(N2, 2)  # its own patience is not over when the next one leads
        await two.leads()
        made.clock.now_s += 60
        two.tick()
        await two.ask("wanted")
        assert not find.done()
        made.lead("", 2)
        await until(lambda: not two.state()["leading"])
        for wait_s, waits in ((14.0, True), (2.0, False)):
            made.clock.now_s += wait_s
            two.tick()
            await two.ask("wanted")
            assert find.done() != waits
        assert (await find)[:2] == (A("error"), A("no_leader"))


@in_loop
async def test_one_question_a_model_however_many_wait(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ROOM, N2: ROOM}) as made:
        one, boss = made[N1], Leader()
        scheduler = made[N2].node.whereis("scheduler")
        assert scheduler is not None
        made[N2].node.unregister("scheduler")
        await gen_server.start(made[N2].node, boss, name="scheduler")
        made.lead(N2, 1, only=N1)
        finds = [later(one, "find", "tiny") for _ in range(5)]
        finds.append(later(one, "find", "slow"))
        await until(lambda: len(boss.asked) == 2)
        one.tick()
        await one.ask("wanted")
        assert sorted(request[1] for request, _ in boss.asked) == [b"slow", b"tiny"]
        boss.answer((A("error"), A("not_loaded"), "no"))
        assert {(await find)[1] for find in finds} == {A("not_loaded")}
        assert waiting(one) == 0


@in_loop
async def test_the_next_leader_is_asked_when_one_is_lost(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ROOM, N2: ROOM, N3: ROOM}) as made:
        one, bosses = made[N1], {N2: Leader(), N3: Leader()}
        for name, boss in bosses.items():
            made[name].node.unregister("scheduler")
            await gen_server.start(made[name].node, boss, name="scheduler")
        made.lead(N2, 1, only=N1)
        find = later(one, "find", "tiny")
        await until(lambda: bosses[N2].asked)
        made.lead(N3, 2, only=N1)
        await until(lambda: bosses[N3].asked)
        bosses[N2].answer((A("error"), A("not_loaded"), "of the one before"))
        bosses[N3].answer((A("error"), A("failed"), "of the one that leads"))
        assert (await find)[1] == A("failed")


@in_loop
async def test_who_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A model may come up for hours, and clients ask again and again."""
    async with lab(tmp_path, {N1: ROOM, N2: ROOM}, leader=N1) as made:
        assert (await made[N2].ask("load", "slow", {}))[0] == "ok"
        for one in made.machines.values():
            for _ in range(3):
                try:
                    await one.ask("find", "slow", timeout_s=0.02)
                except CallTimeout:
                    continue
        await until(lambda: waiting(made[N2]) == 3 and waiting(made[N1]) == 4)
        for one in made.machines.values():
            one.tick()
        await until(lambda: waiting(made[N2]) == 0 and waiting(made[N1]) == 1)
        made.clock.now_s += RELAY_S  # the relay's call has timed out by now
        made[N1].tick()
        await until(lambda: waiting(made[N1]) == 0)


@in_loop
async def test_two_that_take_each_other_for_the_leader_say_so(tmp_path: Path) -> None:
    """A question must not go to and fro for ever."""
    async with lab(tmp_path, {N1: ROOM, N2: ROOM}) as made:
        made.lead(N2, 1, only=N1)
        made.lead(N1, 1, only=N2)
        place = later(made[N1], "place", "tiny", {})
        load = later(made[N2], "load", "tiny", {})
        await until(lambda: waiting(made[N1]) and waiting(made[N2]))  # each was told no
        processes = len(made[N1].node.processes())
        made[N1].tick()
        await made[N1].ask("wanted")
        await until(lambda: waiting(made[N1]))
        assert len(made[N1].node.processes()) <= processes + 2
        made.clock.now_s += 16
        for one in made.machines.values():
            one.tick()
        assert (await place)[:2] == (A("error"), A("no_leader"))
        assert (await load)[:2] == (A("error"), A("no_leader"))
