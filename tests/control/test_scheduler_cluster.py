"""Schedulers of several machines among stand-ins: who places where, and what becomes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

from bridge.term import Atom
from control.desired import read_desired
from control.quorum import alone
from tests.control.in_loop import in_loop
from tests.control.lab import CARD, Lab, LabMachine, lab, until

A = Atom
N1, N2, N3 = "n1@127.0.0.1", "n2@127.0.0.1", "n3@127.0.0.1"
ROOM = 4 * 10**9
ONE, TWO = 250 * 10**6, 400 * 10**6  # room for so many instances of the tiny model
THREE = {N1: ROOM, N2: ROOM, N3: ROOM}


def where(made: Lab) -> dict[str, list[str]]:
    """Instances that run, by machine."""
    return {name: sorted(one.agent.groups) for name, one in made.machines.items()}


def places(made: Lab) -> dict[str, list[str]]:
    """Machines by instance."""
    found: dict[str, list[str]] = {}
    for name, ids in where(made).items():
        for id_ in ids:
            found.setdefault(id_, []).append(name)
    return found


@in_loop
async def test_replicas_are_on_different_machines(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        assert (await made[N1].ask("load", "tiny", {A("replicas"): 3}))[0] == "ok"
        await until(lambda: len(places(made)) == 3)
        assert sorted(map(tuple, places(made).values())) == [(N1,), (N2,), (N3,)]
        assert {w.id for w in read_desired(made[N3].desired_path).wanted} == set(places(made))
        assert (await made[N1].ask("load", "tiny", {}))[0] == "ok"  # a fourth has to share


@in_loop
async def test_any_machine_may_be_asked(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        two = made[N2]
        assert await two.ask("load", "tiny", {}) == (A("ok"), "tiny-1")
        assert (await made[N3].ask("find", "tiny"))[:2] == (A("ok"), "tiny-1")
        assert await two.states() == {"tiny-1": "ready"}
        assert (await two.ask("place", "tiny", {}))[0] == "ok"
        assert await two.ask("path", "tiny") == (A("ok"), "tiny", str(made.model), 128)
        assert (await two.ask("load", "tiny", {A("slots"): -1}))[1] == "bad_option"
        assert await two.ask("unload", "tiny-1") == A("ok")
        for one in made.machines.values():
            assert read_desired(one.desired_path).gone == ("tiny-1",)
        assert places(made) == {}


@in_loop
async def test_nothing_counts_before_a_quorum_has_it(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        made.cut_off(N1)
        load = asyncio.ensure_future(made[N1].ask("load", "tiny", {}))
        await made[N1].rows()
        await asyncio.sleep(0)
        assert not load.done()
        assert places(made) == {}
        made.lead("", 1, only=N1)
        assert (await load)[:2] == (A("error"), A("leader_changed"))
        assert read_desired(made[N2].desired_path).wanted == ()


@in_loop
async def test_a_new_leader_keeps_what_runs_and_brings_up_what_is_missing(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        await made[N1].ask("load", "tiny", {A("replicas"): 3})
        await until(lambda: len(places(made)) == 3)
        before = places(made)
        (lost,) = where(made)[N1]
        made.lead("", 1, only=N1)
        made.cut_off(N1)
        made.lead(N2, 2, only=N2)
        made.lead(N2, 2, only=N3)
        await made[N2].leads()
        rest = {id_: nodes for id_, nodes in before.items() if id_ != lost}
        assert {i: n for i, n in places(made).items() if n != [N1]} == rest
        assert (await made[N3].ask("find", "tiny"))[1] != lost
        made[N2].tell((A("settled"), 2))  # its patience with N1 is over
        await until(lambda: lost in where(made)[N2] or lost in where(made)[N3])

        made.lead(N2, 2, only=N1)  # N1 is back, with an instance that runs elsewhere by now
        await made.come_back(N1)
        await until(lambda: places(made)[lost] not in ([N1], []) and len(places(made)[lost]) == 1)
        assert made[N1].agent.stopped == [(lost, 30.0)]
        assert {i: n for i, n in places(made).items() if i != lost} == rest


@in_loop
async def test_a_machine_that_comes_while_stock_is_taken_is_asked_too(tmp_path: Path) -> None:
    async with lab(tmp_path, THREE, leader=N1) as made:
        await made[N1].ask("load", "tiny", {A("replicas"): 3})
        await until(lambda: len(places(made)) == 3)
        before = places(made)
        made.lead("", 1)
        made.part(N1, N3)
        made[N2].agent.deaf = True  # it takes its time to say what runs
        made.lead(N1, 2)
        await until(lambda: made[N2].agent.asked)
        await made.meet(N1, N3)
        made[N2].agent.hear_again()
        await made[N1].leads()
        await until(lambda: len(made[N1].state()["instances"]) == 3)
        assert places(made) == before
        assert [one.agent.stopped for one in made.machines.values()] == [[], [], []]


async def at(made: Lab, id_: str, *, but: str = "") -> str:
    """The one machine that runs it, once N1 knows it and it is not ``but``."""

    def there() -> bool:
        record = made[N1].scheduler.books.get(id_)
        known = record is not None and record.group is not None and record.state == "ready"
        return known and len(places(made).get(id_, [])) == 1 and places(made)[id_] != [but]

    await until(there)
    return places(made)[id_][0]


@in_loop
async def test_machines_that_flap_cannot_thrash(tmp_path: Path) -> None:
    """What ran on a lost machine is placed again at once, but not again and again."""
    pinned = {A("tensor"): 1}  # it does not grow
    async with lab(tmp_path, {N1: 10**6, N2: ROOM, N3: ROOM}, leader=N1) as made:
        await made[N1].ask("load", "tiny", pinned)
        lost = await at(made, "tiny-1")
        for _ in range(2):
            made.part(N1, lost)
            made[lost].agent.end("tiny-1", A("shutdown"))  # the machine is off
            now = await at(made, "tiny-1", but=lost)
            await made.meet(N1, lost)
            lost = now
        made.part(N1, lost)
        made[lost].agent.end("tiny-1", A("shutdown"))
        await until(lambda: "placed again in 5 s" in made[N1].text_of("tiny-1"))
        assert places(made) == {}
        await made.meet(N1, lost)  # it is back, before the wait is over: where it was
        await until(lambda: places(made) == {"tiny-1": [lost]})
        made.part(N1, lost)
        made[lost].agent.end("tiny-1", A("shutdown"))
        await until(lambda: "placed again in 5 s" in made[N1].text_of("tiny-1"))
        made.clock.now_s += 5
        made[N1].tell((A("move"), "tiny-1", "it is gone"))
        assert await at(made, "tiny-1", but=lost) != lost


@in_loop
async def test_an_instance_moves_though_its_head_still_tries(tmp_path: Path) -> None:
    """A rank's machine is gone; the coordinator is there, and says that it recovers."""
    async with lab(tmp_path, {N1: 10**6, N2: ROOM, N3: ROOM}, leader=N1) as made:
        await made[N1].ask("load", "tiny", {A("tensor"): 2})
        await until(lambda: places(made))
        one = made[N1]
        record = one.scheduler.books.get("tiny-1")
        assert record is not None
        assert record.spec is not None
        head = record.spec.head_node
        (rank,) = {*record.spec.nodes} - {head}
        for _ in range(3):
            one.scheduler._leading.instances.moves.note_move("tiny-1", made.clock.now_s)
        made.part(N1, rank)
        await until(lambda: "placed again in 10 s" in one.text_of("tiny-1"))
        coordinator, _ = made[head].agent.groups["tiny-1"]
        coordinator.state, coordinator.epoch = "recovering", 2
        coordinator.tell()
        await until(lambda: record.epoch == 2)
        made.clock.now_s += 10
        one.tell((A("move"), "tiny-1", "it is gone"))
        await until(lambda: len(made[head].agent.started) == 2)


@in_loop
async def test_why_a_group_ended_is_asked_until_it_is_known(tmp_path: Path) -> None:
    """Its agent was just being restarted: the instance would recover for ever."""
    async with lab(tmp_path, {N1: 10**6, N2: ROOM}, leader=N1) as made:
        await made[N1].ask("load", "tiny", {})
        assert await at(made, "tiny-1") == N2
        agent = made[N2].agent
        agent.known = {A("alone"): True, A("exhausted"): True, A("epoch"): 5, A("last_error"): "x"}
        made[N2].node.unregister("agent")
        agent.end("tiny-1", A("shutdown"))
        await until(lambda: made[N1].text_of("tiny-1") is not None)
        await until(lambda: ("tiny-1", "recovering") in made[N1].known_states())
        made[N2].node.register("agent", agent.me.pid)
        await until(lambda: "budget spent after 5 epochs" in made[N1].text_of("tiny-1"))
        assert await made[N1].states() == {"tiny-1": "failed"}


@in_loop
async def test_what_made_room_comes_back_though_the_newcomer_fails(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ONE}, leader=N1) as made:
        one = made[N1]
        await one.ask("load", "tiny", {})
        await until(lambda: places(made))
        one.agent.refuses = True
        answer = await one.ask("load", "tiny", {A("priority"): 5})
        assert answer == (A("ok"), "tiny-2")
        await until(lambda: ("tiny-2", "failed") in one.known_states())
        assert ("tiny-1", "failed") in one.known_states()
        one.agent.refuses = False
        made.clock.now_s += 60
        one.tell((A("retry"), "tiny-1"))
        await until(lambda: places(made) == {"tiny-1": [N1]})


@in_loop
async def test_a_request_evicts_what_was_used_least_lately(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: TWO}, leader=N1, autoload=True) as made:
        one = made[N1]
        for model in ("far", "slow", "broken"):
            one.store.has.add(CARD.id if model == "far" else model)
        assert (await one.ask("find", "tiny"))[:2] == (A("ok"), "tiny-1")
        assert (await one.ask("find", "slow"))[:2] == (A("ok"), "slow-1")
        assert read_desired(one.desired_path).wanted == ()
        for id_, idle_s in (("tiny-1", 9.0), ("slow-1", 5.0)):
            one.agent.groups[id_][0].idle_s = idle_s
        assert (await one.ask("find", "broken"))[:2] == (A("ok"), "broken-1")
        assert places(made) == {"slow-1": [N1], "broken-1": [N1]}
        assert one.agent.stopped == [("tiny-1", 30.0)]
        assert one.known_states() == [("slow-1", "ready"), ("broken-1", "ready")]
        # What is busy stays; so does what somebody asked for.
        one.agent.groups["slow-1"][0].idle_s = 0.0
        answer = await one.ask("find", "tiny")
        assert answer[:2] == (A("error"), A("failed"))
        assert "lends 0.40 GB" in answer[2]
        again = await one.ask("find", "tiny")  # it is not tried again at once
        assert again == answer
        made.clock.now_s += 11
        one.agent.groups["slow-1"][0].idle_s = 1.0
        assert (await one.ask("find", "tiny"))[:2] == (A("ok"), "tiny-1")


@in_loop
async def test_what_has_more_priority_takes_the_place_of_what_has_less(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ONE}, leader=N1) as made:
        one = made[N1]
        await one.ask("load", "tiny", {})
        refused = await one.ask("load", "tiny", {})
        assert refused[:2] == (A("error"), A("no_placement"))  # an equal
        assert await one.ask("load", "tiny", {A("priority"): 5}) == (A("ok"), "tiny-2")
        await until(lambda: places(made) == {"tiny-2": [N1]})
        assert [w.id for w in read_desired(one.desired_path).wanted] == ["tiny-1", "tiny-2"]
        assert await one.ask("unload", "tiny-2") == A("ok")  # there is room again
        await until(lambda: places(made) == {"tiny-1": [N1]})


@in_loop
async def test_a_machine_that_is_lost_while_it_starts_something_costs_no_load(
    tmp_path: Path,
) -> None:
    async with lab(tmp_path, {N1: 10**6, N2: ROOM, N3: ROOM}, leader=N1) as made:
        for name in (N2, N3):
            made[name].agent.deaf = True
        assert await made[N1].ask("load", "tiny", {}) == (A("ok"), "tiny-1")
        await until(lambda: made[N2].agent.asked or made[N3].agent.asked)
        lost, other = (N2, N3) if made[N2].agent.asked else (N3, N2)
        made[other].agent.hear_again()
        made.part(N1, lost)
        assert await at(made, "tiny-1") == other
        assert [w.id for w in read_desired(made[other].desired_path).wanted] == ["tiny-1"]


@in_loop
async def test_what_an_earlier_leader_ended_is_placed_anew(tmp_path: Path) -> None:
    """It drained an instance to move it, and was lost; the next one found it running."""
    async with lab(tmp_path, {N1: 10**6, N2: ROOM}, leader=N1) as made:
        await made[N1].ask("load", "tiny", {})
        assert await at(made, "tiny-1") == N2
        agent = made[N2].agent
        agent.known = {A("alone"): True, A("ordered"): True}
        agent.end("tiny-1", A("shutdown"))
        await until(lambda: len(agent.started) == 2)
        assert await at(made, "tiny-1") == N2
        assert agent.started[1].first_epoch == 2


def has(one: LabMachine, id_: str) -> bool:
    return read_desired(one.desired_path).has(id_)


@in_loop
async def test_two_clusters_become_one_and_keep_what_both_wanted(tmp_path: Path) -> None:
    async with lab(tmp_path, {N1: ROOM, N2: ROOM}, apart=True) as made:
        one, two = made[N1], made[N2]
        two.store.has.add("slow")
        for name in (N1, N2):
            made[name].election.roster = alone(name, "x")
            made.lead(name, 1, only=name)
            await made[name].leads()
        await one.ask("load", "tiny", {})
        await two.ask("load", "slow", {})
        await two.ask("load", "tiny", {})  # it has the id of the other's
        await two.ask("set_default", "slow")
        await until(lambda: places(made) == {"tiny-1": [N1, N2], "slow-1": [N2]})
        await until(lambda: [state for _, state in two.known_states()] == ["ready", "ready"])

        both = replace(one.election.roster, stamp=(2, 1), members=(N1, N2))
        for each in (one, two):
            each.election.roster = both
        await made.meet(N1, N2)
        made.lead(N1, 2)
        await until(lambda: places(made) == {"tiny-1": [N1], "slow-1": [N2]})
        assert not read_desired(one.desired_path).has("slow-1")
        two.tick()
        for each in (one, two):
            await until(partial(has, each, "slow-1"))
            desired = read_desired(each.desired_path)
            assert {w.id for w in desired.wanted} == {"tiny-1", "slow-1"}
            assert desired.default == "slow"
        record = one.scheduler.books.get("slow-1")
        assert record is not None
        assert not record.on_demand
        await until(lambda: two.scheduler._wishes is None)
        assert await two.states() == {"tiny-1": "ready", "slow-1": "ready"}


@in_loop
async def test_a_group_that_started_after_its_unload_ends(tmp_path: Path) -> None:
    """An order was under way; what nobody has in the books would run for ever."""
    async with lab(tmp_path, {N1: 10**6, N2: ROOM, N3: ROOM}, leader=N1) as made:
        await made[N1].ask("load", "tiny", {})
        first = await at(made, "tiny-1")
        other = N3 if first == N2 else N2
        (of,) = made[first].agent.started
        stray = replace(of, ranks=tuple(replace(rank, node=other) for rank in of.ranks))
        await made[other].agent.begin(stray)  # there are two now
        await until(lambda: places(made) == {"tiny-1": [first]})
        assert await made[N1].ask("unload", "tiny-1") == A("ok")
        assert places(made) == {}
        await made[first].agent.begin(of)
        await until(lambda: len(made[first].agent.stopped) == 2)
        assert places(made) == {}
        assert made[N1].known_states() == []
