"""Our node and stock nodes: calls, links, monitors, exits and lost links, both ways."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

import pytest

from bridge import gen_server, rpc
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.process_errors import CallTimeout, Exit, NodeDown, NoProc, ReceiveTimeout
from bridge.term import Atom, Pid, Term
from tests.otp.cluster import COOKIE, NEWEST, WAIT_S, each_otp, message, python_node, stock_node
from tests.otp.stock import ErlangError, Otp
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.erlang, pytest.mark.slow]

A = Atom
PY, ERL = A("py@127.0.0.1"), A("erl@127.0.0.1")

# Answers calls with what it got, also late; ends with what it is told.
ECHO = """
spawn(fun() -> register(echo, self()), (fun F() -> receive
  {'$gen_call', From, {later, Ms, X}} -> timer:sleep(Ms), gen_server:reply(From, X), F();
  {'$gen_call', From, X} -> gen_server:reply(From, X), F();
  {exit, R} -> exit(R);
  {To, X} -> To ! {self(), X}, F()
end end)() end)
"""


class Echo(GenServer):
    """Answers with the request; ``late`` only when told to."""

    def __init__(self) -> None:
        self.waiting: list[Term] = []
        self.infos: list[Term] = []

    async def handle_call(self, request: Term, from_: Term) -> Term:
        if request == "late":
            self.waiting.append(from_)
            return NOREPLY
        if isinstance(request, Atom):
            return await super().handle_call(request, from_)
        return request

    async def handle_cast(self, message: Term) -> None:
        for from_ in self.waiting:
            gen_server.reply(self.me, from_, message)

    async def handle_info(self, message: Term) -> None:
        self.infos.append(message)


async def raised(work: Awaitable[Term]) -> tuple[str, Term]:
    with pytest.raises(ErlangError) as caught:
        await work
    return caught.value.kind, caught.value.reason


@each_otp()
async def test_ping_names_and_calls_both_ways(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
        assert node.nodes() == [ERL]
        names = await erl.eval("{ok, All} = net_adm:names('127.0.0.1'), [X || {X, _} <- All]")
        assert sorted(map(bytes, names)) == [b"erl", b"py"]
        server = Echo()
        pid = await gen_server.start(node, server, name="server")
        assert await erl.eval("gen_server:call({server, N}, {a, [1]})") == (A("a"), [1])
        assert await erl.eval("gen_server:call(P, #{1 => x})", P=pid) == {1: A("x")}
        assert (await erl.eval("gen_server:call(P, what)"))[:2] == (A("error"), A("unknown_call"))
        kind, reason = await raised(erl.eval("gen_server:call({nobody, N}, x)"))
        assert (kind, reason[0]) == ("exit", A("noproc"))
        kind, reason = await raised(erl.eval("gen_server:call({server, N}, late, 10)"))
        assert (kind, reason[0]) == ("exit", A("timeout"))
        await erl.eval("gen_server:cast({server, N}, answer)")
        good, bad = await erl.eval("gen_server:multi_call([N, node()], server, {all})")
        assert (good, bad) == ([(PY, (A("all"),))], [ERL])
        ask = "R = gen_server:send_request({server, N}, {r}), gen_server:wait_response(R, 9000)"
        assert await erl.eval(ask) == (A("reply"), (A("r"),))
        assert await erl.eval("process_info(self(), messages)") == (A("messages"), [])

        await erl.eval(ECHO)
        with node.open_process() as me:
            for dest in (("echo", ERL), await erl.eval("whereis(echo)")):
                assert await gen_server.call(me, dest, (1, b"x"), timeout_s=WAIT_S) == (1, b"x")
            with pytest.raises(CallTimeout):
                await gen_server.call(me, ("echo", ERL), (A("later"), 50, 1), timeout_s=0.01)
            assert await gen_server.call(me, ("echo", ERL), 2, timeout_s=WAIT_S) == 2
            assert me.mailbox_length == 0
            with pytest.raises(NoProc):
                await gen_server.call(me, ("nobody", ERL), 1)
            with pytest.raises(NodeDown):
                await gen_server.call(me, ("x", "no_such_node@127.0.0.1"), 1)


@each_otp()
async def test_sys_of_our_servers(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        pid = await gen_server.start(node, Echo(), name="server")
        state = {A("waiting"): b"[]", A("infos"): b"[]"}
        got = await erl.eval("sys:get_state({server, N})", N=PY)
        assert got == (state if otp.release >= 27 else (A("ok"), state))
        status = await erl.eval("sys:get_status({server, N})")
        assert status[:2] == (A("status"), pid)
        asked = "catch gen_server:call({server, N}, {x}, 100)"
        assert await erl.eval("sys:suspend({server, N})") == A("ok")
        assert (await erl.eval(asked))[0] == A("EXIT")
        assert await erl.eval("sys:resume({server, N})") == A("ok")
        assert await erl.eval(asked) == (A("x"),)
        kind, _ = await raised(erl.eval("sys:replace_state({server, N}, fun(X) -> X end)"))
        assert kind == "error"
        refused = await erl.eval("sys:change_code({server, N}, module, old, extra)")
        assert refused[0] == A("error")
        assert await erl.eval(asked) == (A("x"),)


async def obeying(me: Process) -> None:
    """Ends with the reason it is sent; else repeats what it gets."""
    while True:
        match await me.receive():
            case ("exit", reason):
                raise Exit(reason, quiet=True)
            case ("trap", owner):
                me.trap_exit = True
                me.send(owner, A("trapping"))
            case ("link", Pid() as other):
                me.link(other)
                me.send(other, A("linked"))
            case ("unlink", Pid() as other):
                me.unlink(other)
                me.send(other, A("unlinked"))
            case ("report", owner):
                me.send(owner, [await me.receive() for _ in range(me.mailbox_length)])


@each_otp()
async def test_monitors_links_and_exits_from_erlang(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        await erl.eval("process_flag(trap_exit, true)", N=PY)

        async def fresh() -> Pid:
            pid = node.spawn(obeying, name="obeying")
            bound: dict[str, Any] = {f"P{pid.id}": pid}
            await erl.eval(f"put(p, P{pid.id})", **bound)
            return pid

        for watch, kill, reason in (
            (
                "monitor(process, get(p))",
                "get(p) ! {exit, {some, reason}}",
                (A("some"), A("reason")),
            ),
            ("monitor(process, get(p))", "exit(get(p), kill)", A("killed")),
            ("monitor(process, {obeying, N})", "exit(get(p), go)", A("go")),
        ):
            pid = await fresh()
            ref = await erl.eval(watch)
            await erl.eval(kill)
            seen = (A("obeying"), PY) if "obeying" in watch else pid
            assert await message(erl) == (A("DOWN"), ref, A("process"), seen, reason)
        for watch in ("get(p)", "{obeying, N}"):
            ref = await erl.eval(f"monitor(process, {watch})")
            down = await message(erl)
            assert (down[1], down[4]) == (ref, A("noproc"))

        pid = await fresh()
        await erl.eval("link(get(p)), get(p) ! {exit, bye}")
        assert await message(erl) == (A("EXIT"), pid, A("bye"))
        await erl.eval("link(get(p))")
        assert await message(erl) == (A("EXIT"), pid, A("noproc"))
        pid = await fresh()
        await erl.eval("get(p) ! {link, self()}")
        assert await message(erl) == A("linked")
        await erl.eval("exit(get(p), kill)")
        assert await message(erl) == (A("EXIT"), pid, A("killed"))

        # Links that were removed carry nothing, whoever removed them.
        pid = await fresh()
        await erl.eval("link(get(p)), unlink(get(p)), get(p) ! {link, self()}")
        assert await message(erl) == A("linked")
        await erl.eval("get(p) ! {unlink, self()}")
        assert await message(erl) == A("unlinked")
        ref = await erl.eval("M = monitor(process, get(p))")
        await erl.eval("exit(get(p), normal), get(p) ! {exit, now}")
        assert await message(erl) == (A("DOWN"), ref, A("process"), pid, A("now"))

        # A trapping process gets what a linked Erlang process ends with, or exit/2 says.
        pid = await fresh()
        await erl.eval("get(p) ! {trap, self()}")
        assert await message(erl) == A("trapping")
        other = await erl.eval("P = get(p), spawn(fun() -> link(P), exit(its_reason) end)")
        await erl.eval("exit(P, normal), timer:sleep(50), P ! {report, self()}")
        own = await erl.eval("self()")
        want = [(A("EXIT"), other, A("its_reason")), (A("EXIT"), own, A("normal"))]
        got = await message(erl)
        assert sorted(got, key=repr) == sorted(want, key=repr) or got == []
        await erl.eval("demonitor(monitor(process, P), [flush])")
        process = node.process(pid)
        assert process is not None
        await erl.eval("gen_server:call({net_kernel, N}, {is_auth, node()})")
        assert process.monitored_by == {}


@each_otp()
async def test_monitors_links_and_exits_from_python(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        with node.open_process() as me:
            me.trap_exit = True

            async def receive() -> Term:
                return await me.receive(timeout_s=WAIT_S)

            echo = await erl.eval(ECHO)
            me.link(echo)
            ref = me.monitor(echo)
            named = me.monitor(("echo", ERL))
            me.send(echo, (me.pid, 1))
            assert await receive() == (echo, 1)
            me.exit(echo, A("go"))
            got = {repr(await receive()) for _ in range(3)}
            assert got == {
                repr((A("EXIT"), echo, A("go"))),
                repr((A("DOWN"), ref, A("process"), echo, A("go"))),
                repr((A("DOWN"), named, A("process"), (A("echo"), ERL), A("go"))),
            }
            for dest in (echo, ("echo", ERL)):
                ref = me.monitor(dest)
                down = await receive()
                assert (down[1], down[4]) == (ref, A("noproc"))
            me.link(echo)
            assert await receive() == (A("EXIT"), echo, A("noproc"))

            echo = await erl.eval(ECHO)
            me.link(echo)
            me.unlink(echo)
            me.link(echo)
            me.unlink(echo)
            ref = me.monitor(echo)
            me.exit(echo, A("kill"))
            assert await receive() == (A("DOWN"), ref, A("process"), echo, A("killed"))
            with pytest.raises(ReceiveTimeout):
                await me.receive(timeout_s=0.05)
            assert me.links == {}  # the unlinks are confirmed

            alias = me.alias("reply")
            await erl.eval("A ! one, A ! two", A=alias)
            assert await receive() == A("one")
            theirs = await erl.eval("alias()")
            me.send(theirs, A("by_alias"))
            assert await message(erl) == A("by_alias")
            assert me.mailbox_length == 0


@each_otp()
async def test_a_lost_node_is_noconnection_and_its_next_life_another(otp: Otp) -> None:
    async with python_node() as (node, port):
        with node.open_process() as me:
            me.trap_exit = True
            async with stock_node(otp, port) as erl:
                echo = await erl.eval(ECHO)
                me.link(echo)
                ref = me.monitor(echo)
                named = me.monitor(("echo", ERL))
                me.monitor_node(ERL)
                me.send(echo, (me.pid, 1))
                assert await me.receive(timeout_s=WAIT_S) == (echo, 1)
                watched = node.spawn(obeying)
                await erl.eval("monitor(process, P), link(P), node(P)", P=watched)
                await erl.eval("gen_server:call({net_kernel, node(P)}, {is_auth, node()})")
                process = node.process(watched)
                assert process is not None
                assert len(process.monitored_by) == 1
            got = [repr(await me.receive(timeout_s=WAIT_S)) for _ in range(4)]
            assert sorted(got) == sorted(
                [
                    repr((A("EXIT"), echo, A("noconnection"))),
                    repr((A("DOWN"), ref, A("process"), echo, A("noconnection"))),
                    repr((A("DOWN"), named, A("process"), (A("echo"), ERL), A("noconnection"))),
                    repr((A("nodedown"), ERL)),
                ]
            )
            assert process.monitored_by == {}
            assert node.process(watched) is None  # its link broke
            with pytest.raises(NodeDown):
                await gen_server.call(me, echo, 1)
            async with stock_node(otp, port) as erl:
                new = await erl.eval(ECHO)
                assert await gen_server.call(me, new, 1, timeout_s=WAIT_S) == 1
                with pytest.raises(NoProc):  # the old pid is of another creation
                    await gen_server.call(me, echo, 1, timeout_s=WAIT_S)
                await erl.eval("process_flag(trap_exit, true), monitor_node(N, true)", N=PY)


@each_otp()
async def test_our_next_life_is_another_too(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        old = node.spawn(obeying, name="obeying")
        await erl.eval("monitor_node(N, true), M = monitor(process, P)", N=PY, P=old)
        assert await erl.eval("net_adm:ping(N)") == A("pong")
        await node.stop()
        got = [await message(erl), await message(erl)]
        assert (A("nodedown"), PY) in got
        assert A("noconnection") in [m[-1] for m in got]
        # The EPMD went with the node; the next one finds its port free.
        async with python_node(epmd_port=port) as (again, _):
            assert again.creation != node.creation
            new = again.spawn(obeying, name="obeying")
            assert await erl.eval("net_adm:ping(N)") == A("pong")
            kind, reason = await raised(erl.eval("gen_server:call(P, x)"))
            assert (kind, reason[0]) == ("exit", A("noproc"))
            assert (await erl.eval("{obeying, N} ! {link, self()}"))[0] == A("link")
            assert await message(erl) == A("linked")
            assert again.process(new) is not None


@each_otp()
@pytest.mark.parametrize("from_us", [True, False])
async def test_a_wrong_cookie_is_refused(
    otp: Otp, from_us: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with python_node() as (node, port), stock_node(otp, port, cookie="wrong") as erl:
        got: list[Term] = []

        async def body(me: Process) -> None:
            while True:
                got.append(await me.receive())

        node.spawn(body, name="server")
        if from_us:
            assert not await node.connect(ERL, timeout_s=WAIT_S)
        else:
            assert await erl.eval("net_adm:ping(N)", N=PY) == A("pang")
            await erl.eval("{server, N} ! stolen")
        assert node.nodes(hidden=True) == []
        assert got == []
        (text,) = {r.message for r in caplog.records if r.levelno == logging.WARNING} or {""}
        assert "cookie" in text
        assert COOKIE not in caplog.text


@each_otp()
async def test_big_messages_and_bursts(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        await gen_server.start(node, Echo(), name="server")
        await erl.eval("N", N=PY)
        for size in (65_536, 70_000, 3_000_000):
            check = (
                f"B = binary:copy(<<7>>, {size}), {{B}} =:= gen_server:call({{server, N}}, {{B}})"
            )
            assert await erl.eval(f"(fun() -> {check} end)()") is True
        echo = await erl.eval(ECHO)
        with node.open_process() as me:
            big = bytes(2_000_000)
            # Fragments of one and whole messages of another, on one link.
            asking = [
                asyncio.create_task(gen_server.node_call(node, echo, term, timeout_s=WAIT_S))
                for term in (big, 1, [big, 2], 3)
            ]
            assert await asyncio.gather(*asking) == [big, 1, [big, 2], 3]
            num = 100_000
            await erl.eval(f"[P ! X || X <- lists:seq(1, {num})], ok", P=me.pid)
            got = [await me.receive(timeout_s=WAIT_S) for _ in range(num)]
            assert got == list(range(1, num + 1))
            for number in range(num // 10):
                me.send(echo, (me.pid, number))
            for number in range(num // 10):
                assert (await me.receive(timeout_s=WAIT_S))[1] == number


@each_otp()
async def test_hidden_and_nameless_nodes(otp: Otp) -> None:
    async with python_node(hidden=True) as (node, port):
        async with stock_node(otp, port) as erl:
            assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
            assert await erl.eval("{nodes(), nodes(hidden)}") == ([], [PY])
        async with stock_node(otp, port, "-hidden") as erl:
            assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
            assert (node.nodes(), node.nodes(hidden=True)) == ([], [ERL])
        async with stock_node(otp, port, name="undefined@127.0.0.1") as erl:
            assert await erl.eval("net_kernel:connect_node(N)", N=PY) is True
            (name,) = node.nodes(hidden=True)
            assert await erl.eval("node()") == name
            own = await erl.eval("self()")
            assert own.node == name
            with node.open_process() as me:
                me.send(own, A("hello"))
            assert await message(erl) == A("hello")


@each_otp()
async def test_simultaneous_connects(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        await gen_server.start(node, Echo(), name="server")
        await erl.eval("N", N=PY)
        for _ in range(20):
            theirs = asyncio.create_task(erl.eval("net_kernel:connect_node(N)"))
            ours = asyncio.create_task(node.connect(ERL, timeout_s=WAIT_S))
            assert (await theirs, await ours) == (True, True)
            assert await erl.eval("gen_server:call({server, N}, {x})") == (A("x"),)
            assert await erl.eval("erlang:disconnect_node(N)") is True


@each_otp(NEWEST)
async def test_a_short_tick_time_and_a_silent_handshake(otp: Otp) -> None:
    async def silent(port: int) -> float:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\0")  # and no more
        assert await reader.read() == b""
        writer.close()
        return loop.time() - start_s

    async with (
        python_node() as (node, port),
        stock_node(otp, port, "-kernel", "net_ticktime", "4") as erl,
    ):
        assert node.address is not None
        silence = asyncio.create_task(silent(node.address[1]))
        await erl.eval("monitor_node(N, true)", N=PY)
        kept = "receive {nodedown, _} -> lost after 6000 -> kept end"
        assert await erl.eval(kept) == A("kept")
        assert 5 < await silence < 8


@each_otp()
async def test_rpc_reaches_the_table_and_nothing_else(otp: Otp) -> None:
    async def add(me: Process, left: Term, right: Term) -> Term:
        return left + right

    async def leave(me: Process, reason: Term) -> Term:
        raise Exit(reason)

    async with python_node() as (node, port), stock_node(otp, port) as erl:
        node.functions["phalanx", "add", 2] = add
        node.functions["phalanx", "leave", 1] = leave
        await erl.eval("N", N=PY)
        for module in ("rpc", "erpc"):
            assert await erl.eval(f"{module}:call(N, phalanx, add, [1, 2])") == 3
        undef: Term = (A("undef"), [(A("os"), A("cmd"), [[*b"ls"]], [])])
        refused = await erl.eval('rpc:call(N, os, cmd, ["ls"])')
        assert refused == (A("badrpc"), (A("EXIT"), undef))
        kind, reason = await raised(erl.eval('erpc:call(N, os, cmd, ["ls"])'))
        assert (kind, reason) == ("error", (A("exception"), *undef))
        kind, reason = await raised(erl.eval("erpc:call(N, phalanx, leave, [bye])"))
        assert (kind, reason) == ("exit", (A("exception"), A("bye")))
        kind, reason = await raised(erl.eval("erpc:call(N, phalanx, add, [a, 2])"))
        assert (kind, reason[0], reason[1][0]) == ("error", A("exception"), A("TypeError"))
        assert await erl.eval(
            "erpc:cast(N, phalanx, add, [1, 2]), erpc:cast(N, os, cmd, [1])"
        ) == A("ok")
        many = "[hd(erpc:multicall([N], phalanx, F, [1, 2])) || F <- [add, sub]]"
        good, bad = await erl.eval(many)
        assert (good, bad[1][:2]) == ((A("ok"), 3), (A("exception"), A("undef")))
        pid, ref = await erl.eval("spawn_monitor(N, os, cmd, [x])")
        down = await message(erl)
        assert down[:4] == (A("DOWN"), ref, A("process"), pid)
        assert down[4] == (A("undef"), [(A("os"), A("cmd"), [A("x")], [])])
        assert await erl.eval("spawn(N, phalanx, add, [1, 2]), net_adm:ping(N)") == A("pong")
        assert [p for p in node.processes() if "execute" in p.label] == []


@each_otp()
async def test_rpc_from_here(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port):
        with node.open_process() as me:
            assert await rpc.call(me, ERL, "lists", "sum", [[1, 2, 3]]) == 6
            with pytest.raises(rpc.ErlangError) as error:
                await rpc.call(me, ERL, "no_such_module", "f", [])
            assert error.value.reason == A("undef")
            with pytest.raises(Exit) as left:
                await rpc.call(me, ERL, "erlang", "exit", [A("bye")])
            assert left.value.reason == A("bye")
            with pytest.raises(rpc.Throw):
                await rpc.call(me, ERL, "erlang", "throw", [1])
            with pytest.raises(CallTimeout):
                await rpc.call(me, ERL, "timer", "sleep", [60_000], timeout_s=0.05)
            with pytest.raises(NodeDown):
                await rpc.call(me, "no_such_node@127.0.0.1", "m", "f", [])
            assert (me.mailbox_length, me.monitors) == (0, {})
    with node.open_process() as me, pytest.raises(NodeDown):
        await rpc.call(me, ERL, "m", "f", [])


@each_otp()
async def test_global_does_not_hang_and_keeps_nothing_here(
    otp: Otp, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        python_node() as (node, port),
        stock_node(otp, port) as erl,
        stock_node(otp, port, name="two@127.0.0.1") as two,
    ):
        assert await erl.eval("net_adm:ping(N)", N=PY) == A("pong")
        assert await erl.eval("global:sync()") == A("ok")
        assert await erl.eval("global:register_name(one, self())") == A("yes")
        assert await two.eval("net_adm:ping(E), net_adm:ping(N)", E=ERL, N=PY) == A("pong")
        assert await two.eval("global:sync()") == A("ok")
        assert await two.eval("node(global:whereis_name(one))") == ERL
        assert await two.eval("global:trans({lock, self()}, fun() -> done end)") == A("done")
        assert await two.eval("global:register_name(two, self())") == A("yes")
        await two.eval("erlang:disconnect_node(N)")
        assert await erl.eval("net_adm:ping(N)") == A("pong")
        assert ERL in node.nodes()
        await wait_until_async(lambda: "not obeyed" in caplog.text, WAIT_S)
        assert ERL in node.nodes()
