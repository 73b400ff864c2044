"""Our supervisor as the control plane uses it; OTP judges its order and replies elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import GenServer, Stop
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import CallError, Exit, StartError
from bridge.term import Atom, ImproperList, MapPairs, Pid, Term
from control import supervisor
from control.spec import IGNORE, ChildSpec, ChildType, Ignore, Restart, Strategy, SupSpec
from tests.waiting import wait_until_async

A = Atom
Scene = Callable[[Node, Process], Awaitable[None]]


def play(scene: Scene) -> None:
    """Run ``scene`` in a trapping process of a fresh node, which must leave nothing behind."""

    async def main() -> None:
        node = Node("ours@127.0.0.1", "cookie")
        async with asyncio.timeout(10):
            with node.open_process(label="scene") as me:
                me.trap_exit = True
                await scene(node, me)
            await node.stop()

    asyncio.run(main())


class Echo(GenServer):
    """Answers ``ping``; ends with the reason it is cast."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        return A("pong") if request == "ping" else await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        raise Stop(message)


class Broken(GenServer):
    async def init(self, me: Process) -> None:
        raise Stop(A("broken"))


def echo(ident: str, **options: Any) -> ChildSpec:
    async def start(me: Process) -> Pid:
        return await gen_server.start_link(me, Echo(), name=ident)

    return ChildSpec(id=A(ident), start=start, **options)


def nested(ident: str, spec: SupSpec, **options: Any) -> ChildSpec:
    async def start(me: Process) -> Pid:
        return await supervisor.start_link(me, spec, name=ident)

    return ChildSpec(id=A(ident), start=start, type=ChildType.SUPERVISOR, **options)


async def ended(me: Process, pid: Pid) -> Term:
    """The exit reason of a linked process."""
    (reason,) = await me.receive(lambda m: (m[2],) if m[:2] == (A("EXIT"), pid) else None)
    return reason


async def crash(node: Node, me: Process, name: str, reason: str = "boom") -> None:
    """Have a named server end; returns when it has, and its supervisor's mailbox says so."""
    pid = await wait_until_async(lambda: node.whereis(name), 5)
    assert pid is not None
    watch = me.monitor(pid)
    gen_server.cast(me, name, A(reason))
    await me.receive(lambda m: True if m[:2] == (A("DOWN"), watch) else None)


def test_the_tree_shows_every_level_and_its_restarts() -> None:
    async def scene(node: Node, me: Process) -> None:
        inner = SupSpec(children=(echo("leaf"),), intensity=3)
        spec = SupSpec(
            strategy=Strategy.REST_FOR_ONE,
            children=(echo("first"), nested("inner", inner), echo("last")),
        )
        top = await supervisor.start_link(me, spec, name="top")
        await crash(node, me, "leaf")
        await supervisor.which_children(me, "inner")
        shown = await supervisor.tree(me, top)
        assert (shown[A("name")], shown[A("pid")]) == (A("top"), top)
        assert (shown[A("strategy")], shown[A("period_s")]) == (A("rest_for_one"), 5)
        first, middle, last = shown[A("children")]
        assert [c[A("restarts")] for c in (first, middle, last)] == [0, 0, 0]
        assert (middle[A("id")], middle[A("strategy")]) == (A("inner"), A("one_for_one"))
        [leaf] = middle[A("children")]
        assert leaf[A("restarts")] == 1
        assert leaf[A("state")] == A("running")
        assert leaf[A("pid")] == node.whereis("leaf")

        me.exit(middle[A("pid")], A("kill"))
        await supervisor.which_children(me, top)
        shown = await supervisor.tree(me, top)
        assert [c[A("restarts")] for c in shown[A("children")]] == [0, 1, 1]
        assert shown[A("restarts_in_period")] == 1

    play(scene)


def test_a_stopped_child_and_a_deaf_supervisor_are_shown_as_such() -> None:
    async def scene(node: Node, me: Process) -> None:
        async def deaf(parent: Process) -> Pid:
            async def body(own: Process) -> None:
                await own.receive(lambda m: None)

            return parent.spawn(body, link=True)

        spec = SupSpec(
            children=(
                echo("gone"),
                ChildSpec(id=A("deaf"), start=deaf, type=ChildType.SUPERVISOR),
            )
        )
        top = await supervisor.start_link(me, spec)
        await supervisor.terminate_child(me, top, A("gone"))
        limited = await gen_server.call(me, top, (A("tree"), 100))
        gone, silent = limited[A("children")]
        assert (gone[A("state")], gone[A("pid")]) == (A("stopped"), A("undefined"))
        assert silent[A("state")] == A("unresponsive")

    play(scene)


def test_a_failed_start_stops_what_was_started_and_tells_why() -> None:
    async def scene(node: Node, me: Process) -> None:
        async def broken(parent: Process) -> Pid:
            return await gen_server.start_link(parent, Broken())

        bad = ChildSpec(id=A("bad"), start=broken)
        with pytest.raises(StartError) as caught:
            await supervisor.start_link(me, SupSpec(children=(echo("fine"), bad, echo("never"))))
        why = (A("failed_to_start_child"), A("bad"), A("broken"))
        assert caught.value.reason == (A("shutdown"), why)
        assert node.registered() == []

    play(scene)


@pytest.mark.parametrize("error", [Exit(Atom("bad")), ValueError("no"), StartError(Atom("busy"))])
def test_whatever_a_start_function_raises_is_a_failed_start(error: Exception) -> None:
    async def scene(node: Node, me: Process) -> None:
        async def start(parent: Process) -> Pid:
            raise error

        top = await supervisor.start_link(me, SupSpec())
        kind, (what, child) = await supervisor.start_child(
            me, top, ChildSpec(id=1, start=start, mfa=("m", "f", []))
        )
        assert kind == A("error")
        match error:
            case StartError():
                assert what == A("busy")
            case Exit():
                assert what == (A("EXIT"), A("bad"))
            case _:
                assert what[0] == A("EXIT")
                assert what[1][:2] == (A("ValueError"), b"no")
        assert child[:4] == (A("child"), A("undefined"), 1, (A("m"), A("f"), []))
        assert await supervisor.count_children(me, top) == {
            "specs": 0,
            "active": 0,
            "supervisors": 0,
            "workers": 0,
        }

    play(scene)


def test_escalation_goes_up_one_level_at_a_time() -> None:
    async def scene(node: Node, me: Process) -> None:
        inner = SupSpec(children=(echo("leaf"),), intensity=1)
        spec = SupSpec(children=(nested("inner", inner), echo("other")), intensity=1)
        top = await supervisor.start_link(me, spec)
        first_inner, other = node.whereis("inner"), node.whereis("other")
        await crash(node, me, "leaf")
        await crash(node, me, "leaf")  # one too many for inner
        await wait_until_async(lambda: node.whereis("inner") not in (None, first_inner), 5)
        await wait_until_async(lambda: node.whereis("leaf"), 5)
        assert node.whereis("other") == other
        await crash(node, me, "leaf")
        await crash(node, me, "leaf")  # and inner's second end is one too many for top
        assert await ended(me, top) == A("shutdown")
        assert node.registered() == []

    play(scene)


def test_a_killed_supervisor_takes_its_children_along() -> None:
    async def scene(node: Node, me: Process) -> None:
        top = await supervisor.start_link(me, SupSpec(children=(echo("a"), echo("b"))))
        me.exit(top, A("kill"))
        assert await ended(me, top) == A("killed")
        assert node.registered() == []

    play(scene)


def test_a_supervisor_killed_while_it_starts_a_child_ends() -> None:
    async def scene(node: Node, me: Process) -> None:
        starting = asyncio.Event()

        async def slow(parent: Process) -> Pid:
            starting.set()
            await asyncio.Event().wait()
            raise AssertionError("cancelled before")

        task = asyncio.ensure_future(
            supervisor.start_link(me, SupSpec(children=(ChildSpec(id=1, start=slow),)), name="top")
        )
        await starting.wait()
        top = node.whereis("top")
        assert top is not None
        me.exit(top, A("kill"))
        with pytest.raises(StartError, match="killed"):
            await task

    play(scene)


def test_a_child_that_ignores_shutdown_is_killed_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene(node: Node, me: Process) -> None:
        async def stubborn(parent: Process) -> Pid:
            trapping = asyncio.Event()

            async def body(own: Process) -> None:
                own.trap_exit = True
                trapping.set()
                while True:
                    await own.receive()

            pid = parent.spawn(body, link=True)
            await trapping.wait()
            return pid

        spec = ChildSpec(id=A("stubborn"), start=stubborn, shutdown_s=0.01)
        top = await supervisor.start_link(me, SupSpec(children=(spec,)), name="top")
        assert await supervisor.terminate_child(me, top, A("stubborn")) == A("ok")

    with caplog.at_level(logging.ERROR, "control.supervisor"):
        play(scene)
    [record] = caplog.records
    fields = vars(record)
    assert fields["supervisor"] == (A("local"), A("top"))
    assert (fields["errorContext"], fields["reason"]) == ("shutdown_error", A("killed"))
    assert dict(fields["offender"])[A("id")] == A("stubborn")


def test_an_ignored_start_keeps_the_spec_unless_temporary() -> None:
    async def scene(node: Node, me: Process) -> None:
        async def nothing(parent: Process) -> Ignore:
            return IGNORE

        def spec(ident: int, restart: Restart) -> ChildSpec:
            return ChildSpec(id=ident, start=nothing, restart=restart)

        children = (spec(1, Restart.PERMANENT), spec(2, Restart.TEMPORARY))
        top = await supervisor.start_link(me, SupSpec(children=children))
        [(ident, pid, _, _)] = await supervisor.which_children(me, top)
        assert (ident, pid) == (1, A("undefined"))
        started = await supervisor.start_child(me, top, spec(3, Restart.TRANSIENT))
        assert started == (A("ok"), A("undefined"))

    play(scene)


def test_simple_children_share_a_template_and_stop_together() -> None:
    async def scene(node: Node, me: Process) -> None:
        async def start(parent: Process, name: str, *_: Term) -> Pid:
            return await gen_server.start_link(parent, Echo(), name=name)

        spec = SupSpec(
            strategy=Strategy.SIMPLE_ONE_FOR_ONE,
            intensity=2,
            children=(ChildSpec(id=A("any"), start=start, restart=Restart.TRANSIENT),),
        )
        top = await supervisor.start_link(me, spec)
        names = [A(f"e{n}") for n in range(40)]
        for name in names:
            assert (await supervisor.start_simple_child(me, top, [name]))[0] == A("ok")
        assert (await supervisor.count_children(me, top))["active"] == 40
        await crash(node, me, "e0")
        await crash(node, me, "e1", "normal")
        assert (await supervisor.count_children(me, top))["active"] == 39
        assert node.whereis("e0") is not None  # with its own arguments again
        shown = await supervisor.tree(me, top)
        assert sum(child[A("restarts")] for child in shown[A("children")]) == 1
        me.exit(top, A("shutdown"))
        assert await ended(me, top) == A("shutdown")
        assert node.registered() == []

    play(scene)


@pytest.mark.parametrize("strategy", ["one_for_one", "simple_one_for_one"])
def test_no_message_ends_it(strategy: str, caplog: pytest.LogCaptureFixture) -> None:
    odd: list[Term] = [1, A("x"), [], {}, (), MapPairs(((1, 2),)), ImproperList((1,), 2), [[[{}]]]]

    async def scene(node: Node, me: Process) -> None:
        spec = SupSpec(strategy=Strategy(strategy), children=(echo("only"),))
        top = await supervisor.start_link(me, spec)
        calls = [A(f"{name}_child") for name in ("start", "terminate", "restart", "delete")]
        calls += [A("get_childspec"), A("which_child"), A("tree")]
        for term in odd:
            for name in calls:
                answer = await gen_server.call(me, top, (name, term))
                if (name, term) == ("tree", 1):
                    assert answer[A("pid")] == top
                elif not (strategy == "simple_one_for_one" and (name, term) == ("start_child", [])):
                    assert answer[0] == A("error")
            me.send(top, term)
            me.send(top, (A("EXIT"), term, term))
            gen_server.cast(me, top, term)
            gen_server.cast(me, top, (A("try_again_restart"), term, term))
        assert (await supervisor.count_children(me, top))["specs"] == 1

    with caplog.at_level(logging.CRITICAL):
        play(scene)


def test_calls_name_a_supervisor_that_is_gone() -> None:
    async def scene(node: Node, me: Process) -> None:
        with pytest.raises(CallError, match="noproc"):
            await supervisor.which_children(me, "nobody")

    play(scene)
