"""Loading a group of ranks: one secret for all, the first refusal counts, halves never mix."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.node import Node
from bridge.process_errors import Exit
from bridge.term import Atom, Pid, Term
from control.instance_spec import InstanceSpec, RankSpec
from control.load_options import MeshShape
from control.load_ranks import LoadFailed, choose_group, load_ranks

A = Atom


class Port(GenServer):
    """A compute port without an engine: keeps its order, answers as it is told to."""

    def __init__(self, *, holds: str = "", answer: Any = None) -> None:
        super().__init__()
        self.holds, self.answer = holds, answer
        self.order: dict[Any, Term] = {}

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("prepare", host):
                return (A("ok"), {A("holds"): self.holds, A("place"): (A("place"), host)})
            case ("load", dict(order)):
                self.order = order
                if isinstance(self.answer, Exception):
                    raise self.answer
                return (A("ok"), {A("rank"): order["rank"]}) if self.answer is None else self.answer
        return None


def spec(shape: MeshShape, devices: tuple[str, ...] = ()) -> InstanceSpec:
    names = devices or ("cpu",) * shape.num_ranks
    return InstanceSpec(
        id="m-1",
        model="m",
        context_tokens=64,
        num_slots=2,
        shape=shape,
        ranks=tuple(
            RankSpec(
                node="t@127.0.0.1",
                path=Path("/models/m.gguf"),
                device=name,
                pool="memory",
                threads=1,
                memory_bytes=5,
                limit_bytes=10 + rank,
            )
            for rank, name in enumerate(names)
        ),
    )


def load(ports: list[Port], made: InstanceSpec) -> list[dict[Any, Term]]:
    async def main() -> list[dict[Any, Term]]:
        node = Node("t@127.0.0.1", "c")
        pids: list[Pid] = [await gen_server.start(node, port) for port in ports]
        try:
            with node.open_process(label="load") as me:
                return await asyncio.wait_for(load_ranks(me, made, 3, pids), 5)
        finally:
            await node.stop()

    return asyncio.run(main())


def test_every_rank_gets_its_order_and_all_the_same_group() -> None:
    ports = [Port() for _ in range(4)]
    shape = MeshShape(2, 2, (2.0, 1.0, 2.0, 1.0))
    facts = load(ports, spec(shape, ("cuda:0", "cuda:1", "cuda:0", "cuda:1")))
    assert [fact["rank"] for fact in facts] == [0, 1, 2, 3]
    groups = {port.order["group"] for port in ports}
    assert len(groups) == 1
    assert len(groups.pop()) == 32
    for rank, port in enumerate(ports):
        order = port.order
        assert order["rank"] == rank
        assert (order["tensor"], order["pipeline"], order["epoch"]) == (2, 2, 3)
        assert order["shares"] == [2.0, 1.0, 2.0, 1.0]
        assert order["places"] == [(A("place"), "127.0.0.1")] * 4
        assert order["hosts"] == ["127.0.0.1"] * 4
        assert order["devices"] == ["cuda:0", "cuda:1"] * 2
        assert order["limit_bytes"] == 10 + rank


def test_ranks_of_one_generation_are_adopted() -> None:
    ports = [Port(holds="abc"), Port(holds="abc")]
    load(ports, spec(MeshShape.even(2, 1)))
    assert [port.order["group"] for port in ports] == ["abc", "abc"]


@pytest.mark.parametrize("held", [("abc", ""), ("", "abc"), ("abc", "def")])
def test_ranks_of_different_generations_start_anew(held: tuple[str, str]) -> None:
    ports = [Port(holds=group) for group in held]
    with pytest.raises(Exit, match="mixed_ranks"):
        load(ports, spec(MeshShape.even(2, 1)))
    assert not any(port.order for port in ports), "nobody is told to load"


def test_groups_are_secrets_of_their_own() -> None:
    assert choose_group(["", ""]) != choose_group(["", ""])
    assert choose_group(["x", "x"]) == "x"
    assert choose_group(["x", ""]) is None


def test_the_first_refusal_ends_the_wait() -> None:
    """The other rank never answers: it waits for a peer that will not come."""
    ports = [Port(answer=NOREPLY), Port(answer=(A("error"), A("no_room"), b"needs 9 of 8"))]
    with pytest.raises(LoadFailed, match="needs 9 of 8") as caught:
        load(ports, spec(MeshShape.even(2, 1)))
    assert caught.value.kind == "no_room"


@pytest.mark.parametrize("kind", ["peer_lost", "join_refused", "busy"])
def test_a_rank_that_lost_another_is_no_reason_to_give_up(kind: str) -> None:
    ports = [Port(answer=NOREPLY), Port(answer=(A("error"), A(kind), b"rank 0 is lost"))]
    with pytest.raises(Exit, match="rank 0 is lost"):
        load(ports, spec(MeshShape.even(2, 1)))


def test_a_held_group_that_does_not_take_the_order_starts_anew() -> None:
    ports = [Port(holds="abc", answer=(A("error"), A("bad_order"), b"no"))]
    with pytest.raises(Exit, match="load_interrupted"):
        load(ports, spec(MeshShape.even(1, 1)))


def test_a_lost_port_ends_the_load_and_tells_nobody_the_secret(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Ends(Port):
        async def handle_call(self, request: Term, from_: Term) -> Term:
            if request[0] == "load":
                self.order = request[1]
                raise gen_server.Stop(A("normal"))
            return await super().handle_call(request, from_)

    ports = [Ends(), Port(answer=NOREPLY)]
    with pytest.raises(Exit, match="port_lost") as caught:
        load(ports, spec(MeshShape.even(2, 1)))
    secret = str(ports[0].order["group"])
    assert secret
    assert secret not in str(caught.value.reason)
    assert secret not in caplog.text
    assert caught.value.__suppress_context__
