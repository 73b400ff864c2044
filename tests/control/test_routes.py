"""Who serves what, by what coordinators say."""

from __future__ import annotations

from typing import Any

from bridge.local_node import LocalNode
from bridge.process import Process
from bridge.term import Atom, Pid
from control.routes import Route, Routes
from tests.control.in_loop import in_loop


def picked(routes: Routes, target: str) -> Pid | None:
    route = routes.pick(target)
    return route.pid if route else None


class Some:
    """Routes of a process, and coordinators beside it."""

    def __init__(self) -> None:
        self.node = LocalNode("n@h", creation=1)
        self.me = self.node.open_process()
        self.routes = Routes(self.me)

    def coordinator(self) -> Process:
        return self.node.open_process()

    def hear(self, id_: str, state: str, pid: Pid, epoch: int = 1) -> bool:
        return self.routes.hear(id_, "m", state, pid, epoch, 128)

    async def ended(self) -> list[Route | None]:
        """What becomes of the monitors that have fired."""
        found = []
        while self.me.mailbox_length:
            message: Any = await self.me.receive()
            found.append(self.routes.down(message[1]))
        return found


@in_loop
async def test_ready_instances_of_a_model_take_turns() -> None:
    some = Some()
    pids = [some.coordinator().pid for _ in range(3)]
    for n, pid in enumerate(pids):
        some.hear(f"m-{n}", "ready", pid)
    some.hear("m-3", "loading", some.coordinator().pid)
    seen = [picked(some.routes, "m") for _ in range(9)]
    assert {seen.count(pid) for pid in pids} == {3}
    assert picked(some.routes, "m-1") == pids[1]
    assert picked(some.routes, "m-3") is None
    assert [some.routes.target_of(name) for name in ("m-3", "m", "x")] == ["m-3", "m", None]


@in_loop
async def test_the_newest_epoch_speaks_for_an_instance() -> None:
    some = Some()
    old, new = some.coordinator(), some.coordinator()
    assert some.hear("a", "ready", new.pid, epoch=2)
    assert not some.hear("a", "ready", old.pid, epoch=1)
    assert some.hear("a", "draining", new.pid, epoch=2)
    assert picked(some.routes, "a") is None
    old.node.exit(old.pid, old.pid, Atom("kill"))
    assert some.me.mailbox_length == 0  # it was never watched


@in_loop
async def test_a_route_ends_with_its_coordinator_alone() -> None:
    some = Some()
    first, second = some.coordinator(), some.coordinator()
    some.hear("a", "ready", first.pid, epoch=1)
    some.hear("a", "ready", second.pid, epoch=2)
    with first:
        pass
    assert await some.ended() == []
    assert picked(some.routes, "a") == second.pid
    with second:
        pass
    assert [route.id for route in await some.ended() if route] == ["a"]
    assert picked(some.routes, "a") is None
    assert some.hear("a", "ready", some.coordinator().pid, epoch=1)


@in_loop
async def test_one_that_is_gone_already_is_dropped_by_its_monitor() -> None:
    some = Some()
    dead = some.coordinator()
    with dead:
        pass
    assert some.hear("a", "ready", dead.pid)
    assert [route.id for route in await some.ended() if route] == ["a"]
    assert list(some.routes) == []


@in_loop
async def test_a_place_that_drains_makes_way_for_another_whatever_its_epoch() -> None:
    some = Some()
    surplus, kept = some.coordinator(), some.coordinator()
    assert some.hear("m-1", "ready", surplus.pid, 7)
    assert not some.hear("m-1", "ready", kept.pid, 4)
    assert some.hear("m-1", "draining", surplus.pid, 7)
    assert picked(some.routes, "m") is None
    assert some.hear("m-1", "ready", kept.pid, 4)
    assert not some.hear("m-1", "draining", surplus.pid, 7)
    assert picked(some.routes, "m") == kept.pid
