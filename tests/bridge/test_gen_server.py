"""gen_server on one node: start, call, cast, replies, ends, system messages."""

from __future__ import annotations

import asyncio
import logging

import pytest

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer, Stop
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import (
    CallError,
    CallExit,
    CallTimeout,
    Exit,
    NoProc,
    StartError,
)
from bridge.term import Atom, ImproperList, Term

A = Atom
WAIT_S = 5.0


class Server(GenServer):
    """Does what its messages say, and keeps a diary."""

    def __init__(self) -> None:
        self.diary: list[Term] = []
        self.pending: Term = None

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        self.continue_with = "hello"

    async def handle_continue(self, what: Term) -> None:
        self.diary.append(("continue", what))

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "diary":
                return self.diary
            case "later":
                self.pending = from_
                return NOREPLY
            case "crash":
                raise ValueError("as asked")
            case ("exit", reason):
                raise Exit(reason)
            case ("stop", reason):
                raise Stop(reason)
            case ("stop", reason, reply):
                raise Stop(reason, reply)
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        if message == "answer":
            gen_server.reply(self.me, self.pending, "late")
        self.diary.append(("cast", message))

    async def handle_info(self, message: Term) -> None:
        self.diary.append(("info", message))

    async def terminate(self, reason: Term) -> None:
        self.diary.append(("terminate", reason))


class FailsToStart(GenServer):
    def __init__(self, error: Exception) -> None:
        self._error = error

    async def init(self, me: Process) -> None:
        raise self._error


def node() -> Node:
    return Node("here@127.0.0.1", "cookie")


async def test_call_cast_info_and_continue_in_order() -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server(), name="server")
        assert here.whereis("server") == pid
        gen_server.cast(me, "server", 1)
        me.send(pid, "plain")
        me.send(pid, (A("$gen_cast"), 2))
        for dest in (pid, "server", ("server", "here@127.0.0.1")):
            assert await gen_server.call(me, dest, "diary") == [
                ("continue", "hello"),
                ("cast", 1),
                ("info", "plain"),
                ("cast", 2),
            ]
        assert await gen_server.node_call(here, pid, "diary")
    await here.stop()


async def test_an_unknown_call_gets_an_error_and_does_no_harm() -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server())
        answer = await gen_server.call(me, pid, A("what"))
        assert answer[:2] == (A("error"), A("unknown_call"))
        assert isinstance(answer[2], bytes)
        assert await gen_server.call(me, pid, "diary")
    await here.stop()


async def test_a_late_reply_vanishes() -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server())
        with pytest.raises(CallTimeout) as caught:
            await gen_server.call(me, pid, "later", timeout_s=0.01)
        assert caught.value.reason == (
            A("timeout"),
            (A("gen_server"), A("call"), [pid, "later", 10]),
        )
        gen_server.cast(me, pid, "answer")
        assert await gen_server.call(me, pid, "diary")  # so the answer has been sent
        assert me.mailbox_length == 0
        asking = asyncio.create_task(gen_server.call(me, pid, "later"))
        await asyncio.sleep(0)
        with here.open_process() as other:
            gen_server.cast(other, pid, "answer")
        assert await asking == "late"
    await here.stop()


async def test_calls_of_what_is_not_there() -> None:
    here = node()
    with here.open_process(name="caller") as me:
        with pytest.raises(NoProc) as caught:
            await gen_server.call(me, "nobody", 1)
        assert caught.value.reason[0] == A("noproc")
        with pytest.raises(gen_server.NodeDown) as down:
            await gen_server.call(me, ("x", "there@127.0.0.1"), 1)
        assert down.value.reason[0] == (A("nodedown"), A("there@127.0.0.1"))
        for own in (me.pid, "caller"):
            with pytest.raises(CallError, match="calling_self"):
                await gen_server.call(me, own, 1)
        assert me.mailbox_length == 0


@pytest.mark.parametrize(
    ("request_", "reason", "reported"),
    [
        (("stop", A("normal")), A("normal"), False),
        (("stop", (A("shutdown"), 1)), (A("shutdown"), 1), False),
        (("exit", A("own")), A("own"), True),
        ("crash", None, True),
    ],
)
async def test_a_server_that_ends_in_a_call(
    request_: Term, reason: Term, reported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    here = node()
    with here.open_process() as me:
        server = Server()
        pid = await gen_server.start(here, server, name="ends")
        with pytest.raises(CallExit) as caught:
            await gen_server.call(me, pid, request_)
        if reason is not None:
            assert caught.value.why == reason
        assert [entry[1] for entry in server.diary if entry[0] == "terminate"] == [caught.value.why]
        reports = [r.message for r in caplog.records if r.levelno == logging.ERROR]
        assert len(reports) == reported
        assert all("ends" in text and "diary" in text for text in reports)


async def test_stop_with_a_reply_answers_after_the_clean_up() -> None:
    here = node()
    with here.open_process() as me:
        server = Server()
        pid = await gen_server.start(here, server)
        ref = me.monitor(pid)
        assert await gen_server.call(me, pid, ("stop", A("normal"), "bye")) == "bye"
        assert server.diary[-1] == ("terminate", A("normal"))
        want = (A("DOWN"), ref, A("process"), pid, A("normal"))
        assert await me.receive(timeout_s=WAIT_S) == want


async def test_a_server_ends_with_its_parent() -> None:
    here = node()
    server = Server()
    with here.open_process() as watcher:
        with here.open_process() as me:
            pid = await gen_server.start_link(me, server)
            with here.open_process() as stranger:  # only the parent's end is a reason to end
                stranger.exit(pid, A("go"))
                assert await gen_server.call(stranger, pid, "diary") == [
                    ("continue", "hello"),
                    ("info", (A("EXIT"), stranger.pid, A("go"))),
                ]
            ref = watcher.monitor(pid)
            me.exit(me.pid, A("shutdown"))
        down = await watcher.receive(timeout_s=WAIT_S)
        assert down == (A("DOWN"), ref, A("process"), pid, A("shutdown"))
        assert server.diary[-1] == ("terminate", A("shutdown"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [(Stop(A("bad_luck")), A("bad_luck")), (Exit(A("own")), A("own")), (OSError("disk"), None)],
)
async def test_a_failed_start(error: Exception, reason: Term) -> None:
    here = node()
    with here.open_process() as me:
        me.trap_exit = True
        with pytest.raises(StartError) as caught:
            await gen_server.start_link(me, FailsToStart(error), name="server")
        if reason is None:
            assert caught.value.reason[:2] == (A("OSError"), b"disk")
        else:
            assert caught.value.reason == reason
        assert me.mailbox_length == 0  # the starter got it already
        assert here.whereis("server") is None
        with pytest.raises(StartError):
            await gen_server.start(here, FailsToStart(error))
        me.trap_exit = False
        with pytest.raises(StartError):
            await gen_server.start_link(me, FailsToStart(error))
        assert not me.alive  # as in OTP: the link does its work


async def test_a_taken_name_and_a_slow_start() -> None:
    class Slow(GenServer):
        async def init(self, me: Process) -> None:
            await me.receive()

    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server(), name="server")
        with pytest.raises(StartError) as taken:
            await gen_server.start_link(me, Server(), name="server")
        assert taken.value.reason == (A("already_started"), pid)
        with pytest.raises(StartError) as slow:
            await gen_server.start_link(me, Slow(), name="slow", timeout_s=0.01)
        assert slow.value.reason == A("timeout")
        assert here.whereis("slow") is None
        assert me.alive
    await here.stop()


async def system(me: Process, dest: Term, request: Term) -> Term:
    ref = me.make_ref()
    me.send(dest, (A("system"), (me.pid, ref), request))
    return (await me.receive(lambda m: m if m[0] == ref else None, timeout_s=WAIT_S))[1]


async def test_system_messages() -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server(), name="server", label="diary keeper")
        ok, state = await system(me, pid, A("get_state"))
        assert ok == A("ok")
        assert state[A("diary")] == b"[('continue', 'hello')]"
        status, who, module, (dictionary, mode, parent, debug, misc) = await system(
            me, "server", A("get_status")
        )
        assert (status, who, mode, parent, debug) == (A("status"), pid, A("running"), me.pid, [])
        assert module == (A("module"), A("tests.bridge.test_gen_server.Server"))
        assert (A("$ancestors"), [me.pid]) in dictionary
        assert (A("$process_label"), b"diary keeper") in dictionary
        assert misc[2] == (A("data"), [([*b"State"], state)])
        for request in (A("resume"), (A("debug"), A("no_debug"))):
            assert await system(me, pid, request) == A("ok")
        refused: list[Term]
        refused = [(A("replace_state"), 1), (A("change_code"), 1, 2, 3), A("nonsense"), 7]
        for request in refused:
            assert (await system(me, pid, request))[0] == A("error")
    await here.stop()


async def test_a_suspended_server_answers_only_system_messages() -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start_link(me, Server())
        assert await system(me, pid, A("suspend")) == A("ok")
        gen_server.cast(me, pid, 1)
        with pytest.raises(CallTimeout):
            await gen_server.call(me, pid, "diary", timeout_s=0.01)
        assert (await system(me, pid, A("get_status")))[3][1] == A("suspended")
        gen_server.cast(me, pid, 2)
        assert await system(me, pid, A("resume")) == A("ok")
        diary = await gen_server.call(me, pid, "diary")
        assert diary == [("continue", "hello"), ("cast", 1), ("cast", 2)]
        me.unlink(pid)
        ref = me.monitor(pid)
        await system(me, pid, A("suspend"))
        assert await system(me, pid, (A("terminate"), A("enough"))) == A("ok")
        down = await me.receive(timeout_s=WAIT_S)
        assert down == (A("DOWN"), ref, A("process"), pid, A("enough"))


@pytest.mark.parametrize("nested", [False, True])
async def test_replies_go_where_the_tag_says_and_give_it_back(nested: bool) -> None:
    here = node()
    with here.open_process() as me:
        pid = await gen_server.start(here, Server())
        alias = me.alias("reply")
        tag: Term = ImproperList((A("alias"),), alias)
        if nested:
            tag = ImproperList((tag,), me.make_ref())
        for _ in range(2):  # the second reply finds no alias
            me.send(pid, (A("$gen_call"), (me.pid, tag), "diary"))
        answer = await me.receive(timeout_s=WAIT_S)
        await gen_server.call(me, pid, "diary")
        assert me.mailbox_length == 0
        if nested:
            assert answer[0] == tag
        assert answer == (tag, [("continue", "hello")])
        plain = (A("any"), 1.0, [1])
        me.send(pid, (A("$gen_call"), (me.pid, plain), "diary"))
        assert (await me.receive(timeout_s=WAIT_S))[0] == plain
    await here.stop()
