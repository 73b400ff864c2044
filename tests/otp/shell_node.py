"""A node as operators see it, without models: home, module ``phalanx``, shells and a small tree."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control import supervisor
from control.spec import ChildSpec, ChildType, SupSpec
from ops import erlang_shell
from ops.config import Tls
from ops.home import Home, RunInfo, open_home
from ops.tls_files import prepare
from tests.ops import ctl_node
from tests.otp.stock import free_tcp_port

NAME = "n@127.0.0.1"
WORDS = "heard 2 grüß \x1b[2Jdich"  # what `generate` of the node answers to "hi"


class Cluster(ctl_node.Cluster):
    """Answers from tables, but shows the tree that there is."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "leader":
                return (Atom("ok"), self.me.node.name)
            case "tree":
                return await gen_server.call(self.me, Atom("root_sup"), Atom("tree"))
            case ("generate", _, prompt, dict(options)) if Atom("stream_to") not in options:
                self.note(f"asked {prompt!r} {options!r}")
                return (Atom("ok"), WORDS, {})
        return await super().handle_call(request, from_)


class Scheduler(GenServer):
    def format_state(self) -> Term:
        return {Atom("instances"): ["lama-1"]}


@dataclass(frozen=True, slots=True)
class ShellNode:
    node: Node
    home: Home
    epmd_port: int

    @property
    def cookie(self) -> str:
        return self.home.cookie()

    def ctl(self, *args: str) -> list[str]:
        """The command line of a ``ctl`` command for this node."""
        return [sys.executable, "-m", "ops.ctl", *args, "--home", str(self.home.root)]

    def seen(self) -> str:
        """What ``cluster`` noted."""
        return (self.home.root / "seen").read_text()


@contextlib.asynccontextmanager
async def shell_node(root: Path, *, tls: bool = False) -> AsyncIterator[ShellNode]:
    """A node that runs in this process until the block ends."""
    home = open_home(root)
    files = prepare(Tls() if tls else None, home, "127.0.0.1")
    node = Node(NAME, home.cookie(), tls=files.contexts() if files else None)
    erlang_shell.install(node)
    epmd = Epmd("127.0.0.1", free_tcp_port())
    await node.start(listen=("127.0.0.1", 0), epmd=epmd)
    try:
        with node.open_process(label="test") as me:
            me.trap_exit = True
            await supervisor.start_link(me, _tree(root), name="root_sup")
            assert node.address is not None
            home.write_run(
                RunInfo(
                    node=NAME,
                    url="",
                    dist_port=node.address[1],
                    epmd_port=epmd.tcp_port,
                    tls=asdict(files) if files else None,
                )
            )
            yield ShellNode(node, home, epmd.tcp_port)
    finally:
        await node.stop()


def _tree(root: Path) -> SupSpec:
    below = SupSpec(intensity=9, period_s=1, children=(_child("scheduler", Scheduler()),))

    async def start(me: Process) -> Pid:
        return await supervisor.start_link(me, below, name="cluster_sup")

    sup = ChildSpec(id=Atom("cluster_sup"), start=start, type=ChildType.SUPERVISOR)
    return SupSpec(children=(sup, _child("cluster", Cluster(root))))


def _child(name: str, server: GenServer) -> ChildSpec:
    async def start(me: Process) -> Pid:
        return await gen_server.start_link(me, server, name=name)

    return ChildSpec(id=Atom(name), start=start)


def plain_env() -> dict[str, str]:
    """For a ``ctl`` command: nothing in it leads to the node but ``--home``."""
    left_out = ("ERL_EPMD_PORT", "PHALANX_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"LC_ALL": "C.UTF-8", "PROMPT_TOOLKIT_NO_CPR": "1"}
