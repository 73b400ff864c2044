"""``erl -remsh`` of stock OTP 25 and 28 on our node."""

from __future__ import annotations

import pytest

from bridge import remote_shell
from bridge.erl_eval import Commands
from bridge.node import Node
from bridge.process import Process
from bridge.remote_shell import Printed
from bridge.term import Atom, Term
from tests.otp.cluster import COOKIE, WAIT_S, each_otp, python_node, stock_node
from tests.otp.stock import Otp
from tests.otp.terminal import Terminal
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.erlang, pytest.mark.slow]

A = Atom


async def status(me: Process) -> Term:
    return {A("node"): me.node.name, A("text"): "é".encode()}


async def tree(me: Process) -> Term:
    return Printed("root\n  branch\n")


async def fail(me: Process) -> Term:
    raise ValueError("of no use")


async def wait(me: Process) -> Term:
    return await me.receive()


async def leader(me: Process) -> Term:
    return A("ok"), me.node.name


COMMANDS: Commands = {
    ("status", 0): status,
    ("tree", 0): tree,
    ("fail", 0): fail,
    ("wait", 0): wait,
}


def install(node: Node) -> None:
    node.functions["phalanx", "leader", 0] = leader
    remote_shell.install(
        node, COMMANDS, help_text="status().  the status\n", version="Phalanx 0.1.0"
    )


def client(otp: Otp, port: int, name: str = "me@127.0.0.1") -> Terminal:
    return Terminal(otp, port, "-name", name, "-setcookie", COOKIE, "-remsh", "py@127.0.0.1")


@each_otp()
@pytest.mark.parametrize("name", ["me@127.0.0.1", "undefined@127.0.0.1"])
async def test_a_session(otp: Otp, name: str) -> None:
    async with python_node() as (node, port):
        install(node)
        async with client(otp, port, name) as screen:
            await screen.until("(py@127.0.0.1)1> ")
            for number, (typed, shown) in enumerate(
                [
                    ("node().", "'py@127.0.0.1'"),
                    ("status().", "#{node => 'py@127.0.0.1',text => <<\"é\"/utf8>>}"),
                    ("phalanx:leader().", "{ok,'py@127.0.0.1'}"),
                    ("tree().", "root\n  branch\nok"),
                    ("help().", "status().  the status\n"),
                    ("X = {a, [1]}.", "{a,[1]}"),
                    ("{X,\n X}.", "{{a,[1]},{a,[1]}}"),
                    ("foo().", "** exception error: undefined shell command foo/0"),
                    ('os:cmd("id").', "** exception error: undefined function os:cmd/1"),
                    ("fail().", "** exception error: {'ValueError',<<\"of no use\">>}"),
                    ("a b.", "* 1:3: syntax error before: b"),
                    ("self().", "<0."),
                ],
                start=2,
            ):
                screen.type(typed + "\n")
                assert shown in await screen.until(f"(py@127.0.0.1){number}> "), screen.seen
            screen.type("q().\n")
            assert await screen.ended() == 0
        await wait_until_async(lambda: not _shells(node), WAIT_S)


def _shells(node: Node) -> list[str]:
    return [p.label for p in node.processes() if "shell" in p.label]


@each_otp()
async def test_the_end_of_input_ends_the_client(otp: Otp) -> None:
    if otp.release < 26:
        pytest.skip("the client of OTP 25 asks for another job instead")
    async with python_node() as (node, port):
        install(node)
        async with client(otp, port) as screen:
            await screen.until("1> ")
            screen.type("\x04")
            assert await screen.ended() == 0
        await wait_until_async(lambda: not _shells(node), WAIT_S)


@each_otp()
async def test_a_client_that_vanishes_takes_its_shell_along(otp: Otp) -> None:
    async with python_node() as (node, port):
        install(node)
        async with client(otp, port) as screen:
            await screen.until("1> ")
            screen.type("wait().\n")
            await wait_until_async(lambda: len(_shells(node)) == 2, WAIT_S)
        await wait_until_async(lambda: not _shells(node), WAIT_S)


@each_otp()
async def test_a_command_can_be_interrupted(otp: Otp) -> None:
    if otp.release >= 26:
        pytest.skip("this wheel's terminal has no job control")
    async with python_node() as (node, port):
        install(node)
        async with client(otp, port) as screen:
            await screen.until("1> ")
            screen.type("wait().\n")
            await wait_until_async(lambda: len(_shells(node)) == 2, WAIT_S)
            screen.type("\x07")
            await screen.until("-->")
            screen.type("i 1\n")
            await screen.until("-->")
            screen.type("c 1\n")
            assert "** exception exit: interrupt" in await screen.until("2> ")
            screen.type("sta")
            await screen.until("sta")
            screen.type("\t")
            await screen.until("tus()")
            screen.type(".\n")
            await screen.until("3> ")


@each_otp()
async def test_what_a_client_asks_for_and_nothing_more(otp: Otp) -> None:
    async with python_node() as (node, port), stock_node(otp, port) as erl:
        install(node)

        async def call(text: str) -> Term:
            return await erl.eval(f"catch rpc:call('py@127.0.0.1', {text})")

        assert await call("code, ensure_loaded, [shell]") == (A("module"), A("shell"))
        assert (await call("code, ensure_loaded, [os]"))[0] == A("error")
        assert await call("net_kernel, get_net_ticktime, []") == 60
        assert await call("erlang, system_info, [otp_release]") == [*b"28"]
        assert (await call("erlang, system_info, [cookie]"))[0] == A("badrpc")
        assert await call('application, get_env, [stdlib, shell_slogan, "x"]') == [*b"x"]
        yes, added, groups = await call('edlin_expand, expand, [lists:reverse("tr"), []]')
        assert (yes, added, groups) == (A("yes"), [*b"ee()"], [])
        _, added, groups = await call('edlin_expand, expand, [lists:reverse("phalanx:"), []]')
        assert bytes(added) == b"leader()"
        no: Term = (A("no"), [], [])
        assert await call('edlin_expand, expand, [lists:reverse("xyz"), []]') == no
