"""Garbage from a peer that knows the cookie: no server of the node dies of it."""

from __future__ import annotations

import pytest

from bridge import gen_server
from bridge.process import Process
from bridge.process_errors import CallError
from bridge.term import Atom, ImproperList, MapPairs, Pid, Ref, Term
from tests.cluster.live_node import LiveNode
from tests.cluster.test_end_to_end import ask
from tests.cluster.test_supervision import on_node

pytestmark = pytest.mark.slow

NAMES = (
    "root_sup",
    "cluster_sup",
    "instance_sup",
    "surface_sup",
    "membership",
    "election",
    "scheduler",
    "model_store",
    "events",
    "ports",
    "cluster",
    "gateway",
    "net_kernel",
    "smollm2-135m-instruct-1_sup",
    "smollm2-135m-instruct-1",
    "smollm2-135m-instruct-1_rank0",
)


def garbage(me: Process) -> list[Term]:
    nested: Term = []
    for _ in range(200):
        nested = [nested]
    ref = me.make_ref()
    return [
        Atom("nonsense"),
        1 << 20000,
        -1.5,
        b"\xff" * 1000,
        "text",
        nested,
        (),
        (Atom("load"),),
        (Atom("load"), 1),
        (Atom("load"), (Atom("a"), Atom("b")), {}),
        (Atom("load"), b"x", {1: 2}),
        (Atom("load"), b"x", MapPairs((([1], 2),))),
        (Atom("unload"), {}),
        (Atom("find"), 1 << 20000),
        (Atom("lease"), b"x", -1),
        (Atom("release"), 5),
        (Atom("hello"), me.pid, {}),
        (Atom("generate"), b"default", 5, {}),
        (Atom("generate"), b"default", b"x", {Atom("max_tokens"): b"many"}),
        (Atom("submit"), ref, {Atom("prompt"): b"x"}),
        (Atom("tree"), b"x"),
        (Atom("start_child"), {Atom("id"): 1}),
        (Atom("terminate_child"), b"x"),
        (Atom("instance"), 1, 2, me.pid, 4, 5),
        (Atom("EXIT"), me.pid, Atom("boo")),
        (Atom("DOWN"), ref, Atom("process"), me.pid, Atom("boo")),
        (Atom("beat"), 1, 2, 3, 4),
        (Atom("token"), ref, 0, 0, 0, 0),
        (Atom("$gen_call"), Atom("foo"), Atom("status")),
        (Atom("$gen_call"), (1, 2), Atom("status")),
        (Atom("$gen_call"), (me.pid, [ImproperList((Atom("alias"),), 5)]), Atom("status")),
        (Atom("$gen_cast"), 1 << 20000),
        (Atom("system"), Atom("foo"), Atom("get_state")),
        (Atom("system"), (me.pid, 1), (Atom("debug"), 5)),
        (Atom("system"), (1, 2), Atom("get_state")),
    ]


async def throw(me: Process, node: str) -> dict[str, Pid | None]:
    """Send everything to everybody, as messages, casts and calls; pids afterwards."""
    before = {name: await pid_at(me, node, name) for name in NAMES}
    assert None not in before.values(), before
    for name in NAMES:
        for term in garbage(me):
            me.send((name, node), term)
            gen_server.cast(me, (name, node), term)
        for term in garbage(me)[:-7]:
            if isinstance(term, tuple) and term[:1] in ((Atom("terminate_child"),),):
                continue
            assert await survives(me, (name, node), term), (name, term)
    after = {name: await pid_at(me, node, name) for name in NAMES}
    assert after == before
    return after


async def survives(me: Process, server: tuple[str, str], request: Term) -> bool:
    """Whether the server answers ``request``, or at least does not end over it."""
    try:
        await gen_server.call(me, server, request, timeout_s=1)
    except gen_server.CallTimeout:  # some calls are answered later than we care to wait
        return True
    except CallError:
        return False
    return True


async def pid_at(me: Process, node: str, name: str) -> Pid | None:
    """The pid behind a name, from the answer of ``sys:get_status``."""
    try:
        status = await gen_server.sys_call(me, (name, node), Atom("get_status"), timeout_s=10)
    except CallError:
        return None
    pid = status[1]
    return pid if isinstance(pid, Pid) else None


def test_garbage_ends_no_server(shared_node: LiveNode) -> None:
    on_node(shared_node, throw)
    assert "Paris" in ask(shared_node)
    instance = shared_node.instance()
    assert (instance["epoch"], instance["state"]) == (1, "ready")


def test_a_ref_is_not_a_pid(shared_node: LiveNode) -> None:
    async def body(me: Process, node: str) -> Term:
        made = me.make_ref()
        assert isinstance(made, Ref)
        request = (Atom("subscribe"), made)
        return await gen_server.call(me, ("cluster", node), request)

    answer = on_node(shared_node, body)
    assert answer[:2] == ("error", "unknown_call")
