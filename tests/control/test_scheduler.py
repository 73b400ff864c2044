"""The scheduler among stand-ins for its neighbours: what is loaded, refused, placed and found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.books import Books, Record
from control.desired import Desired, Wanted, read_desired
from control.errors import UnknownModel
from control.instance import History
from control.instance_spec import InstanceSpec, RankSpec
from control.instances import Terms
from control.load_options import LoadOptions, MeshShape
from control.lookup import Lookup, Resolved
from control.machine import Device, Machine
from control.placement_request import Defaults
from control.rank import RankLimits
from control.reconcile import reconcile
from control.scheduler import Scheduler
from models.card import load_cards
from tests.models.tiny import llama_tensors, write_gguf

A = Atom
MACHINE = Machine(
    total_bytes=8 * 10**9,
    available_bytes=8 * 10**9,
    limit_bytes=4 * 10**9,
    cores=4,
    devices=(Device("cpu", "Testchip", 8 * 10**9),),
)
CARD = load_cards()["llama-3.2-1b-instruct"]


class Store(GenServer):
    """``model_store``: everything is here; a model named ``slow`` never comes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    async def handle_call(self, request: Term, from_: Term) -> Term:
        slow = text_of(request[1]) == "slow"
        return NOREPLY if slow else (A("ok"), str(self.path))


class Groups(GenServer):
    """``instance_sup``: starts nothing, remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: list[str] = []

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "which_children":
                return []
            case ("start_child", spec):
                self.specs.append(str(spec.id))
                return (A("ok"), self.me.spawn(_wait, label="group"))
            case _:
                return A("ok")


async def _wait(me: Process) -> None:
    await me.receive()


def run(folder: Path, body: Callable[[Process, Node], Awaitable[None]]) -> None:
    path = write_gguf(folder / "tiny.gguf", llama_tensors())

    def resolve(ref: str) -> Resolved:
        if ref == "far":
            return Resolved(CARD.id, ref, None, CARD)
        if ref in ("tiny", "slow"):
            return Resolved(ref, ref, path)
        if ref == "hf:org/repo":
            return Resolved(ref, ref, None)
        raise UnknownModel(ref)

    async def main() -> None:
        node = Node("n@127.0.0.1", "c")
        scheduler = Scheduler(
            Lookup(resolve=resolve, card_of=lambda name: resolve(name).id),
            desired_path=folder / "desired.json",
            terms=Terms(
                defaults=Defaults(context_tokens=128),
                limits=RankLimits(),
                machine=lambda: MACHINE,
            ),
            autoload=False,
        )
        await gen_server.start(node, Store(path), name="model_store")
        await gen_server.start(node, GenServer(), name="ports")
        await gen_server.start(node, Groups(), name="instance_sup")
        await gen_server.start(node, scheduler, name="scheduler")
        try:
            with node.open_process(label="test") as me:
                await asyncio.wait_for(body(me, node), 20)
        finally:
            await node.stop()

    asyncio.run(main())


async def ask(me: Process, *request: Any) -> Any:
    term = tuple(A(request[0]) if n == 0 else part for n, part in enumerate(request))
    return await gen_server.call(me, A("scheduler"), term, timeout_s=10)


async def instances(me: Process) -> list[Any]:
    found = await gen_server.call(me, A("scheduler"), A("instances"))
    return [row for _, row in found]


def test_a_load_is_placed_before_it_is_answered(tmp_path: Path) -> None:
    async def body(me: Process, node: Node) -> None:
        options = {A("shares"): [2, 1], A("slots"): 2}
        assert await ask(me, "load", "tiny", options) == (A("ok"), "tiny-1")
        (row,) = await instances(me)
        assert (row["strategy"], row["tensor_size"], row["shares"]) == ("tensor", 2, [2.0, 1.0])
        assert (row["state"], row["context_tokens"], row["slots"]) == ("loading", 128, 2)
        (wanted,) = read_desired(tmp_path / "desired.json").wanted
        assert wanted.options == LoadOptions(shares=(2.0, 1.0), slots=2)

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"tensor": 5, "pipeline": 3}, "illegal_shares", ["4 attention heads", "2 layers"]),
        ({"shares": [1, 2, 3], "tensor": 2}, "bad_option", ["3 numbers"]),
        ({"context": 257}, "bad_option", ["beyond the 256 tokens"]),
        ({"engine": b"mlx"}, "bad_option", ["has no MLX"]),
    ],
)
def test_a_refused_load_leaves_nothing_behind(
    tmp_path: Path, options: dict[str, Any], kind: str, words: list[str]
) -> None:
    async def body(me: Process, node: Node) -> None:
        given = {A(name): value for name, value in options.items()}
        answer = await ask(me, "load", "tiny", given)
        assert answer[:2] == (A("error"), A(kind))
        for word in words:
            assert word in answer[2]
        assert await instances(me) == []
        assert read_desired(tmp_path / "desired.json").wanted == ()

    run(tmp_path, body)


def test_what_is_unloaded_while_it_comes_up_is_gone(tmp_path: Path) -> None:
    """Word of its helper that was under way must not bring it back."""

    async def body(me: Process, node: Node) -> None:
        for message in [
            (A("prepared"), "slow-1", spec("slow-1")),
            (A("failed"), "slow-1", A("x"), "x"),
        ]:
            load: Term = (A("load"), "slow", {})
            loading = asyncio.ensure_future(gen_server.node_call(node, A("scheduler"), load))
            rows: list[Any] = []
            while not rows:
                rows = await instances(me)
            unload: Term = (A("unload"), "slow-1")
            gone = asyncio.ensure_future(gen_server.node_call(node, A("scheduler"), unload))
            await asyncio.sleep(0)  # it is in the mailbox
            me.send(A("scheduler"), message)
            assert await gone == A("ok")
            assert await instances(me) == []
            assert (await loading)[:2] == (A("error"), A("unloaded"))
        assert read_desired(tmp_path / "desired.json").wanted == ()

    run(tmp_path, body)


def test_place_tells_and_changes_nothing(tmp_path: Path) -> None:
    async def body(me: Process, node: Node) -> None:
        ok, here = await ask(me, "place", "tiny", {A("tensor"): 2})
        assert ok == "ok"
        assert (here["state"], here["assumed"], here["node"]) == ("local", "", "n@127.0.0.1")
        assert [rank["kv_heads"] for rank in here["chosen"]["ranks"]] == [[0, 1], [1, 2]]
        assert {str(one["strategy"]) for one in here["rejected"]} >= {"single", "pipeline"}

        ok, far = await ask(me, "place", "far", {A("context"): 1024})
        assert (far["state"], far["assumed"]) == ("remote", "BF16")
        assert far["size_bytes"] == CARD.size_bytes
        assert far["chosen"]["ranks"][0]["weights_bytes"] == pytest.approx(CARD.size_bytes, rel=0.1)

        ok, none = await ask(me, "place", "far", {A("slots"): 1024})
        assert none["chosen"] == A("undefined")
        assert "lends 4.00 GB" in none["why"]

        answer = await ask(me, "place", "hf:org/repo", {})
        assert answer[:2] == (A("error"), A("not_downloaded"))
        assert (await ask(me, "place", "nonesuch", {}))[1] == "unknown_model"
        assert await instances(me) == []

    run(tmp_path, body)


def spec(id_: str, num_bytes: int = 0) -> InstanceSpec:
    rank = RankSpec(
        node="n@h",
        path=Path("m.gguf"),
        device="cpu",
        pool="memory",
        threads=1,
        memory_bytes=num_bytes,
        limit_bytes=0,
    )
    return InstanceSpec(
        id=id_,
        model="m",
        context_tokens=8,
        num_slots=1,
        shape=MeshShape.even(2, 1),
        ranks=(rank, rank),
    )


def test_other_instances_take_memory_of_the_machine() -> None:
    books = Books()
    for id_, state, num_bytes in [("a", "ready", 10), ("b", "failed", 100), ("c", "loading", 1)]:
        record = Record(id_, "m", Wanted(id_, "m"), state=state, spec=spec(id_, num_bytes))
        books.add(record)
    books.add(Record("d", "m", Wanted("d", "m")))
    assert books.memory_bytes("none") == 22
    assert books.memory_bytes("a") == 2


def test_an_instance_is_found_by_its_own_name() -> None:
    books, first, second = Books(), Pid(A("n@h"), 1, 0, 1), Pid(A("n@h"), 2, 0, 1)
    for id_, pid in (("m-1", first), ("m-2", second)):
        books.add(Record(id_, "m", Wanted(id_, "ref"), state="ready", coordinator=pid))
    assert books.route("m").coordinator == first  # type: ignore[union-attr]
    assert books.route("m-2").coordinator == second  # type: ignore[union-attr]
    assert [books.target_of(name) for name in ("m-2", "m", "ref", "x")] == ["m-2", "m", "m", None]


def test_reconcile_keeps_what_runs_and_starts_what_is_missing() -> None:
    desired = Desired().add(Wanted("a", "m")).add(Wanted("b", "m", LoadOptions(tensor=2)))
    group, history = Pid(A("n@h"), 1, 0, 1), History(epoch=3)
    kept, missing = reconcile([(spec("a"), group, history), (spec("x"), group, history)], desired)
    assert [(r.id, r.on_demand, r.state, g) for r, g in kept] == [
        ("a", False, "recovering", group),
        ("x", True, "recovering", group),
    ]
    assert all(record.history is history for record, _ in kept)
    assert [(r.id, r.wanted.options.tensor) for r in missing] == [("b", 2)]
