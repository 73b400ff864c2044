"""One instance with ranks on two machines: real control processes and ports, killed with -9.

A third node, the test's own, is where requests come from: it hears of the instance as `scheduler`
and gets tokens straight from a port of another node.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control.instance_spec import InstanceSpec, RankSpec, spec_term
from control.load_options import MeshShape
from control.os_process import OsIdentity
from tests.cluster.live_node import free_tcp_port
from tests.control.far_control import COOKIE, FarControl
from tests.models.tiny import llama_tensors, write_gguf
from tests.waiting import wait_until_async

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

A = Atom
WAIT_S = 60.0
LONG = 300  # tokens: more than a stream has when something is killed
PROMPT = [1, 2, 3, 4, 5]


@dataclass
class Announced:
    """What a coordinator said last."""

    state: str
    coordinator: Pid
    epoch: int


class Lab:
    """Machines `head` and `far`, and a node of our own."""

    def __init__(self, node: Node, me: Process, head: FarControl, far: FarControl) -> None:
        self.node, self.me, self.head, self.far = node, me, head, far

    async def connect(self) -> None:
        for control in (self.head, self.far):
            assert await self.node.connect(control.name, timeout_s=10)

    def spec(self, model: Path, shape: MeshShape, nodes: list[str], **more: Any) -> InstanceSpec:
        """The machines have addresses of their own, so their ranks share no memory."""
        ranks = tuple(
            RankSpec(
                node=node,
                path=model,
                device="cpu",
                pool="memory",
                threads=1,
                memory_bytes=0,
                limit_bytes=0,
            )
            for node in nodes
        )
        addresses = ((self.head.name, "127.0.0.1"), (self.far.name, "127.0.0.2"))
        return InstanceSpec(
            id="m-1",
            model="m",
            context_tokens=1024,
            num_slots=2,
            shape=shape,
            ranks=ranks,
            **({"addresses": addresses} | more),
        )

    async def start(self, spec: InstanceSpec) -> None:
        answer = await self._groups(spec.head_node, (A("start"), spec_term(spec)))
        assert answer == "ok", answer

    async def stop(self, spec: InstanceSpec) -> None:
        assert await self._groups(spec.head_node, (A("stop"), spec.id)) == "ok"

    async def _groups(self, node: str, request: Term) -> Term:
        return await gen_server.call(self.me, (A("groups"), A(node)), request, timeout_s=WAIT_S)

    async def ready(self, epoch: int) -> Announced:
        """Wait for the instance to be ready in ``epoch``."""

        def match(message: Term) -> Announced | None:
            match message:
                case ("instance", id_, state, Pid() as pid, int(found), text, {"model": model}):
                    assert (text_of(id_), text_of(model)) == ("m-1", "m")
                    assert state != "failed", text
                    if state == "ready" and found == epoch:
                        return Announced(str(state), pid, found)
            return None

        return await self.me.receive(match, timeout_s=WAIT_S)

    async def tokens(
        self,
        coordinator: Pid,
        generated: list[int],
        up_to: int,
        midway: Callable[[], object] = lambda: None,
    ) -> list[int]:
        """Greedy tokens after ``generated``, until there are ``up_to`` or the server is lost.

        ``midway`` is called once some tokens have come.
        """
        me, ref = self.me, self.me.make_ref()
        options = {
            A("prompt"): PROMPT,
            A("generated"): generated,
            A("max_tokens"): up_to,
            A("temperature"): 0.0,
        }
        monitor = me.monitor(coordinator)
        submit = (A("submit"), ref, options)
        answer = await gen_server.call(me, coordinator, submit, timeout_s=20)
        assert answer[0] == "ok", answer
        lost = {monitor, me.monitor(answer[2])}  # the port: its link to us is up already
        found = list(generated)
        while True:
            message = await me.receive(
                lambda m: m if (m[0] == "DOWN" and m[1] in lost) or m[1] == ref else None,
                timeout_s=WAIT_S,
            )
            match message:
                case ("token", _, int(index), int(token), _, _):
                    assert index == len(found)
                    found.append(token)
                    if len(found) == len(generated) + 5:
                        midway()
                case ("done", _, reason, text, *_):
                    assert reason == "length", text
                    return found
                case ("DOWN", _, _, _, _):
                    return found

    async def port(self, id_: str, rank: int, node: str) -> tuple[Pid, OsIdentity]:
        """The port of a rank, and its OS process."""
        dest = (A(f"{id_}_rank{rank}"), A(node))
        await gen_server.call(self.me, dest, A("port"), timeout_s=WAIT_S)
        known = await gen_server.call(self.me, dest, A("describe"))
        identity = OsIdentity.of(known["os_pid"])
        assert identity is not None
        return known["port"], identity


@asynccontextmanager
async def lab(folder: Path, spares: int = 1) -> AsyncIterator[Lab]:
    epmd_port = free_tcp_port()
    node = Node("gate@127.0.0.1", COOKIE)
    await node.start(listen=("127.0.0.1", 0), epmd=Epmd(tcp_port=epmd_port))
    head = FarControl("head@127.0.0.1", folder / "head", epmd_port, spares)
    far = FarControl("far@127.0.0.1", folder / "far", epmd_port, spares)
    try:
        await asyncio.gather(asyncio.to_thread(head.start), asyncio.to_thread(far.start))
        with node.open_process(label="test") as me:
            node.register("scheduler", me.pid)
            made = Lab(node, me, head, far)
            await made.connect()
            yield made
    finally:
        await asyncio.gather(asyncio.to_thread(head.stop), asyncio.to_thread(far.stop))
        await node.stop()
        for control in (head, far):
            await no_ports_of(control)


async def no_ports_of(control: FarControl) -> None:
    """Every port that it ever started is gone."""
    started = {p.stem.removeprefix("port-") for p in control.folder.glob("port-*.log")}
    assert started

    def left() -> list[int]:
        return [
            p.pid
            for p in psutil.process_iter(["cmdline"])
            if (p.info["cmdline"] or [])[-2:] == ["-m", "compute.port"]
            and _log_of(p) in {control.folder / f"port-{name}.log" for name in started}
        ]

    await wait_until_async(lambda: not left(), 15, "ports are left")


def _log_of(process: psutil.Process) -> Path | None:
    try:
        return Path(f"/proc/{process.pid}/fd/2").resolve()
    except OSError:
        return None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_gguf(folder / "tiny.gguf", llama_tensors(), metadata={"context_length": 1024})


def run(folder: Path, body: Callable[[Lab], Awaitable[None]], spares: int = 1) -> None:
    async def main() -> None:
        async with lab(folder, spares) as made:
            await body(made)

    asyncio.run(main())


def test_ranks_of_two_machines_give_the_tokens_of_one_and_survive_kills(
    tmp_path: Path, model: Path
) -> None:
    async def body(lab: Lab) -> None:
        one = lab.spec(model, MeshShape.even(1, 1), [lab.head.name])
        await lab.start(one)
        alone = await lab.tokens((await lab.ready(1)).coordinator, [], LONG)
        assert len(alone) == LONG
        await lab.stop(one)

        both = [lab.head.name, lab.far.name]
        tensor = lab.spec(model, MeshShape.even(2, 1), both, first_epoch=1)
        await lab.start(tensor)
        server = (await lab.ready(2)).coordinator
        assert await lab.tokens(server, [], 60) == alone[:60]
        described = await gen_server.call(lab.me, server, A("describe"))
        assert [rank["node"] for rank in described["ranks"]] == both

        # A port of the other machine dies under a request: the next epoch goes on with it.
        _, remote = await lab.port("m-1", 1, lab.head.name)
        so_far = await lab.tokens(server, [], LONG, remote.kill_group)
        assert 5 <= len(so_far) < LONG
        server = (await lab.ready(3)).coordinator
        more = len(so_far) + 30
        assert await lab.tokens(server, so_far, more) == alone[:more]
        await lab.stop(tensor)

        # The head of a pipeline is its last stage: here the other machine's.
        pipeline = lab.spec(model, MeshShape.even(1, 2), both, first_epoch=3)
        assert pipeline.head_node == lab.far.name
        await lab.start(pipeline)
        server = (await lab.ready(4)).coordinator
        assert server.node == lab.far.name
        assert await lab.tokens(server, [], 60) == alone[:60]
        await lab.stop(pipeline)

    run(tmp_path, body)


def test_ports_outlive_the_control_process_of_either_machine(tmp_path: Path, model: Path) -> None:
    async def body(lab: Lab) -> None:
        nodes = [lab.head.name, lab.far.name]
        where: Any = {"addresses": [(node, "127.0.0.1") for node in nodes]}
        spec = lab.spec(model, MeshShape.even(2, 1), nodes, **where)
        await lab.start(spec)
        server = (await lab.ready(1)).coordinator
        alone = await lab.tokens(server, [], LONG)
        before = [await lab.port("m-1", rank, lab.head.name) for rank in (0, 1)]

        # The other machine's control process: nobody notices, and the next one has the port.
        lab.far.kill()
        assert await lab.tokens(server, [], LONG) == alone
        await asyncio.to_thread(lab.far.start)
        await lab.connect()
        await held_again(lab, lab.far)
        assert await lab.tokens(server, [], LONG) == alone
        assert [await lab.port("m-1", rank, lab.head.name) for rank in (0, 1)] == before

        # The head's: the coordinator is gone; the next one takes over ranks that hold the weights.
        monitor = lab.me.monitor(server)
        so_far = await lab.tokens(server, [], LONG, lab.head.kill)
        assert 5 <= len(so_far) < LONG
        await lab.me.receive(lambda m: m if m[:2] == ("DOWN", monitor) else None, timeout_s=5)
        await asyncio.to_thread(lab.head.start)
        await lab.connect()
        await lab.start(lab.spec(model, spec.shape, nodes, first_epoch=1, **where))
        server = (await lab.ready(2)).coordinator
        assert [await lab.port("m-1", rank, lab.head.name) for rank in (0, 1)] == before
        more = len(so_far) + 30
        assert await lab.tokens(server, so_far, more) == alone[:more]

    run(tmp_path, body)


async def held_again(lab: Lab, control: FarControl) -> None:
    """Wait until the new ``ports`` of ``control`` has its port back, and somebody holds it."""
    async with asyncio.timeout(WAIT_S):
        while True:
            rows = await gen_server.call(lab.me, (A("ports"), A(control.name)), A("ports"))
            mine = [r for r in rows if r["adopted"] and r["connected"]]
            if mine and mine[0]["holder"] != "undefined":
                return
            await asyncio.sleep(0.02)
