"""Processes of one node: receive, links, monitors, aliases, exits, crashes."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import Exit, NameRegistered, ReceiveTimeout
from bridge.term import Atom, Pid, Term

A = Atom
WAIT_S = 5.0


def node() -> Node:
    return Node("here@127.0.0.1", "cookie")


async def until_exit(me: Process) -> None:
    """A body that takes no message of its own."""
    await me.receive(lambda m: m if m == "stop" else None)


async def trapping(me: Process) -> None:
    me.trap_exit = True
    owner = await me.receive()
    me.send(owner, me.pid)
    while True:
        me.send(owner, await me.receive())


async def reason_of(me: Process, pid: Pid) -> Term:
    """Wait for the end of ``pid``; why it ended."""
    ref = me.monitor(pid)
    down = await me.receive(lambda m: m if m[1] == ref else None, timeout_s=WAIT_S)
    return down[4]


async def test_a_timed_out_receive_leaves_every_message_in_order() -> None:
    with node().open_process() as me:
        for number in (1, 2, 3):
            me.send(me.pid, number)
        for timeout_s in (0, 0.01):
            with pytest.raises(ReceiveTimeout):
                await me.receive(lambda m: m if m == 9 else None, timeout_s=timeout_s)
        assert await me.receive(lambda m: m if m == 2 else None, timeout_s=0) == 2
        assert [await me.receive(), await me.receive()] == [1, 3]
        me.send(me.pid, None)  # a term like any other
        assert await me.receive(timeout_s=0) is None


async def test_a_cancelled_receive_loses_nothing() -> None:
    here = node()
    with here.open_process() as me:
        waiting = asyncio.create_task(me.receive())
        await asyncio.sleep(0)
        me.send(me.pid, "kept")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await me.receive(timeout_s=0) == "kept"


async def test_messages_of_one_sender_arrive_in_order() -> None:
    here = node()
    with here.open_process() as me:

        async def burst(worker: Process) -> None:
            for number in range(1000):
                worker.send(me.pid, number)

        here.spawn(burst)
        assert [await me.receive(timeout_s=WAIT_S) for _ in range(1000)] == list(range(1000))


async def test_a_full_mailbox_does_not_keep_others_from_running() -> None:
    here = node()
    with here.open_process() as me:

        async def echo_to_itself(worker: Process) -> None:
            worker.send(worker.pid, "again")
            while await worker.receive():
                worker.send(worker.pid, "again")

        pid = here.spawn(echo_to_itself)
        async with asyncio.timeout(WAIT_S):
            await asyncio.sleep(0.01)
        me.exit(pid, A("kill"))


@pytest.mark.parametrize(
    ("signal", "trapped", "reason"),
    [
        (A("normal"), False, None),
        (A("normal"), True, None),
        (A("boom"), False, A("boom")),
        (A("boom"), True, None),
        (A("kill"), False, A("killed")),
        (A("kill"), True, A("killed")),
        ((A("shutdown"), 1), False, (A("shutdown"), 1)),
    ],
)
async def test_exit_signals(signal: Term, trapped: bool, reason: Term) -> None:
    here = node()
    with here.open_process() as me:
        pid = here.spawn(trapping if trapped else until_exit)
        if trapped:
            me.send(pid, me.pid)
            assert await me.receive(timeout_s=WAIT_S) == pid
        ref = me.monitor(pid)
        me.exit(pid, signal)
        if reason is None:
            assert here.process(pid) is not None
            if trapped:
                assert await me.receive(timeout_s=WAIT_S) == (A("EXIT"), me.pid, signal)
        else:  # at once, not when its task has noticed
            assert here.process(pid) is None
            want = (A("DOWN"), ref, A("process"), pid, reason)
            assert await me.receive(timeout_s=0) == want


async def test_normal_to_oneself_ends_and_to_others_does_not() -> None:
    here = node()
    with here.open_process() as me:

        async def suicidal(worker: Process) -> None:
            worker.exit(worker.pid, A("normal"))
            await worker.receive()

        assert await reason_of(me, here.spawn(suicidal)) == A("normal")


async def test_links_end_both_sides_and_trapping_turns_them_into_messages() -> None:
    here = node()
    with here.open_process() as me:
        me.trap_exit = True

        async def fails(worker: Process) -> None:
            await worker.receive()
            raise Exit(A("oops"))

        first = me.spawn(fails, link=True)

        async def hangs_on(worker: Process) -> None:
            worker.link(first)
            me.send(me.pid, "linked")
            await worker.receive()

        second = here.spawn(hangs_on)
        assert await me.receive(timeout_s=WAIT_S) == "linked"
        ref = me.monitor(second)
        me.send(first, "go")
        got = [await me.receive(timeout_s=WAIT_S) for _ in range(2)]
        assert (A("EXIT"), first, A("oops")) in got
        assert (A("DOWN"), ref, A("process"), second, A("oops")) in got


async def test_a_normal_end_does_not_end_linked_processes() -> None:
    here = node()
    with here.open_process() as me:

        async def short(worker: Process) -> None:
            pass

        pid = me.spawn(short, link=True)
        assert await reason_of(me, pid) in (A("normal"), A("noproc"))
        assert me.alive


async def test_kill_as_an_own_reason_reaches_links_as_a_trappable_kill() -> None:
    here = node()
    with here.open_process() as me:
        me.trap_exit = True

        async def body(worker: Process) -> None:
            raise Exit(A("kill"))

        pid = me.spawn(body, link=True)
        assert await me.receive(timeout_s=WAIT_S) == (A("EXIT"), pid, A("kill"))


async def test_unlink_and_link_to_the_dead() -> None:
    here = node()
    with here.open_process() as me:
        pid = me.spawn(until_exit, link=True)
        me.unlink(pid)
        me.exit(pid, A("boom"))
        assert me.alive
        me.trap_exit = True
        me.link(pid)
        assert await me.receive(timeout_s=0) == (A("EXIT"), pid, A("noproc"))
        me.trap_exit = False
        me.link(pid)
        with pytest.raises(Exit) as caught:
            await me.receive()
        assert caught.value.reason == A("noproc")


async def test_monitors_by_pid_and_name() -> None:
    here = node()
    with here.open_process() as me:
        pid = here.spawn(until_exit, name="server")
        by_name = me.monitor("server")
        by_node = me.monitor(("server", "here@127.0.0.1"))
        gone = me.monitor(pid)
        me.demonitor(gone)
        me.exit(pid, A("boom"))
        name = (A("server"), here.name)
        for ref in (by_name, by_node):
            want = (A("DOWN"), ref, A("process"), name, A("boom"))
            assert await me.receive(timeout_s=0) == want
        ref = me.monitor("server")
        assert await me.receive(timeout_s=0) == (A("DOWN"), ref, A("process"), name, A("noproc"))
        ref = me.monitor(pid)
        me.demonitor(ref)  # flushes what is there already
        assert me.mailbox_length == 0


async def test_without_a_network_other_nodes_are_unreachable() -> None:
    here = node()
    there = Pid("there@127.0.0.1", 1, 0, 1)
    with here.open_process() as me:
        me.trap_exit = True
        me.send(there, "lost")
        me.send(("x", "there@127.0.0.1"), "lost")
        ref = me.monitor(there)
        want = (A("DOWN"), ref, A("process"), there, A("noconnection"))
        assert await me.receive(timeout_s=0) == want
        me.link(there)
        assert await me.receive(timeout_s=0) == (A("EXIT"), there, A("noconnection"))
        me.monitor_node("there@127.0.0.1")
        assert await me.receive(timeout_s=0) == (A("nodedown"), A("there@127.0.0.1"))


async def test_aliases_end_as_their_mode_says() -> None:
    here = node()
    with here.open_process() as me:
        alias = me.alias()
        me.send(alias, 1)
        me.send(alias, 2)
        assert me.unalias(alias)
        assert not me.unalias(alias)
        me.send(alias, 3)
        once = me.alias("reply")
        me.send(once, 4)
        me.send(once, 5)
        pid = here.spawn(until_exit)
        watching = me.monitor(pid, alias="reply_demonitor")
        me.send(watching, 6)
        me.send(watching, 7)
        me.exit(pid, A("boom"))  # no DOWN: the reply ended the monitor
        pid = here.spawn(until_exit)
        watching = me.monitor(pid, alias="demonitor")
        me.send(watching, 8)
        me.demonitor(watching)
        me.send(watching, 9)
        assert [await me.receive() for _ in range(me.mailbox_length)] == [1, 2, 4, 6, 8]


async def test_names() -> None:
    here = node()
    with here.open_process(name="me") as me:
        assert here.whereis("me") == me.pid
        assert here.registered() == [A("me")]
        with pytest.raises(NameRegistered, match="'me'"):
            here.spawn(until_exit, name="me")
        pid = here.spawn(until_exit, name="server")
        me.send("server", "stop")
        assert await reason_of(me, pid) == A("normal")
        assert here.whereis("server") is None
        me.send("server", "nobody is there")
        with pytest.raises(Exit):
            here.register("server", pid)


async def test_a_pid_of_an_earlier_life_is_dead() -> None:
    here = node()
    with here.open_process() as me:
        old = Pid(here.name, me.pid.id, me.pid.serial, here.creation ^ 1)
        me.send(old, "lost")
        ref = me.monitor(old)
        want = (A("DOWN"), ref, A("process"), old, A("noproc"))
        assert await me.receive(timeout_s=0) == want
    assert node().creation != node().creation


async def test_a_crash_is_reported_and_takes_nothing_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = node()
    with here.open_process() as me:

        async def broken(worker: Process) -> None:
            raise ValueError("of no use")

        pid = here.spawn(broken, name="broken_one")
        kind, text, stack = await reason_of(me, pid)
        assert (kind, text) == (A("ValueError"), b"of no use")
        assert stack[0][1] == A("broken")
        (record,) = [r for r in caplog.records if r.name == "bridge.process"]
        assert "broken_one" in record.message
        assert "of no use" in record.message
        assert record.levelno == logging.ERROR


@pytest.mark.parametrize("reason", [A("normal"), A("shutdown"), (A("shutdown"), 1)])
async def test_orderly_ends_are_not_reported(
    reason: Term, caplog: pytest.LogCaptureFixture
) -> None:
    here = node()
    with here.open_process() as me:

        async def leaves(worker: Process) -> None:
            raise Exit(reason)

        assert await reason_of(me, here.spawn(leaves)) == reason
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_body_that_swallows_its_end_is_told_again() -> None:
    here = node()
    done = asyncio.Event()

    async def stubborn(worker: Process) -> None:
        for _ in range(3):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue
        done.set()

    with here.open_process() as me:
        pid = here.spawn(stubborn)
        await asyncio.sleep(0)
        ref = me.monitor(pid)
        me.exit(pid, A("kill"))
        assert (await me.receive(timeout_s=0))[1] == ref  # dead for all others already
        async with asyncio.timeout(WAIT_S):
            await done.wait()


async def test_a_process_without_a_task_learns_its_end_at_its_receive() -> None:
    here = node()
    with here.open_process() as me:
        waiting = asyncio.create_task(me.receive())
        await asyncio.sleep(0)
        here.exit(me.pid, me.pid, A("kill"))
        with pytest.raises(Exit) as caught:
            await waiting
        assert caught.value.reason == A("killed")
    assert here.processes() == []


async def test_a_long_chain_of_links_is_no_recursion() -> None:
    here = node()
    with here.open_process() as me:
        pids = [here.spawn(until_exit) for _ in range(3000)]
        for left, right in itertools.pairwise(pids):
            process = here.process(left)
            assert process is not None
            process.link(right)
        ref = me.monitor(pids[-1])
        me.exit(pids[0], A("boom"))
        assert (await me.receive(timeout_s=0))[1:] == (ref, A("process"), pids[-1], A("boom"))
        assert len(here.processes()) == 1
    await here.stop()


async def test_the_list_of_processes() -> None:
    here = node()
    with here.open_process(label="boss", name="boss") as me:
        pid = me.spawn(until_exit, link=True, label="hand")
        me.send(pid, 1)
        me.send(pid, 2)
        boss, hand = here.processes()
        assert (boss.name, boss.label, boss.links, boss.parent) == (A("boss"), "boss", (pid,), None)
        assert (hand.label, hand.mailbox_length, hand.parent) == ("hand", 2, me.pid)
        process = here.process(pid)
        assert process is not None
        assert process.ancestors == [A("boss")]
    await here.stop()
    assert here.processes() == []


async def test_send_after_and_its_cancellation() -> None:
    with node().open_process() as me:
        me.send_after(0.001, me.pid, "cancelled").cancel()
        me.send_after(0.002, me.pid, "sent")
        assert await me.receive(timeout_s=WAIT_S) == "sent"
