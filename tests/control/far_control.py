"""A control process for tests of ranks on several machines: `ports`, `instance_sup`, and `groups`,
which starts what it is told. ``python -m tests.control.far_control``; settings by standard input.
It lives until its standard input closes, or until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.term import Atom, Term
from bridge.text import text_of
from control import supervisor
from control.instance import History, instance_child
from control.instance_spec import spec_of
from control.ports import Ports
from control.rank import RankLimits
from control.spec import Strategy, SupSpec
from ops.port_starter import PortStarter

COOKIE = "SECRETCOOKIE"


class Groups(GenServer):
    """call ``{start, Spec}`` and ``{stop, Id}``: groups of ``instance_sup``."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("start", term):
                spec = spec_of(term)
                child = instance_child(spec, History(epoch=spec.first_epoch), RankLimits())
                order: Term = (Atom("start_child"), child)
            case ("stop", id_):
                order = (Atom("terminate_child"), Atom(text_of(id_)))
            case _:
                return await super().handle_call(request, from_)
        answer = await gen_server.call(self.me, Atom("instance_sup"), order, timeout_s=60)
        return answer[0] if isinstance(answer, tuple) else answer


async def main() -> None:
    """Serve until the end of standard input."""
    settings = json.loads(sys.stdin.readline())
    folder, host = Path(settings["folder"]), settings["host"]
    node = Node(settings["name"], COOKIE)
    epmd = Epmd(tcp_port=settings["epmd_port"], serve_hosts=(host,))
    await node.start(listen=(host, 0), epmd=epmd)
    starter = PortStarter(
        control_node=settings["name"],
        cookie=COOKIE,
        epmd_port=settings["epmd_port"],
        logs_dir=folder,
        cache_dir=Path.home() / ".cache" / "phalanx-tests" / "kernels",
    )
    ports = Ports(
        starter,
        record_path=folder / "ports.json",
        num_spares=settings["spares"],
        name_prefix=f"{folder.name}_{settings['life']}",
    )
    with node.open_process(label="root") as root:
        root.trap_exit = True
        pid = await gen_server.start_link(root, ports, name="ports")
        groups = SupSpec(strategy=Strategy.ONE_FOR_ONE)
        instances = await supervisor.start_link(root, groups, name="instance_sup")
        await gen_server.start_link(root, Groups(), name="groups")
        print("up", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for ending in (instances, pid):
            monitor = root.monitor(ending)
            root.exit(ending, Atom("shutdown"))
            await root.receive(lambda m, r=monitor: m if m[:2] == ("DOWN", r) else None)  # type: ignore[misc]
    await node.stop()


@dataclass(slots=True)
class FarControl:
    """The process, as a test sees it; may be started again after it was killed."""

    name: str
    folder: Path
    epmd_port: int
    spares: int = 1
    prefix: tuple[str, ...] = ()
    lives: int = 0
    process: subprocess.Popen[str] | None = field(default=None)

    def start(self) -> FarControl:
        """Start it and wait until it serves."""
        self.folder.mkdir(exist_ok=True)
        self.lives += 1
        line = {
            "name": self.name,
            "host": self.name.partition("@")[2],
            "folder": str(self.folder),
            "epmd_port": self.epmd_port,
            "spares": self.spares,
            "life": self.lives,
        }
        with (self.folder / "control.log").open("a") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "tests.control.far_control"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "up\n", (self.folder / "control.log").read_text()
        return self

    def kill(self) -> None:
        """``kill -9``; its ports stay."""
        assert self.process is not None
        self.process.kill()
        self._close()

    def stop(self) -> None:
        """In order, with its ports."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._close()

    def _close(self) -> None:
        assert self.process is not None
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self.process = None

    def records(self) -> list[dict[str, Any]]:
        """Its ports, as it wrote them down."""
        rows: list[dict[str, Any]] = json.loads((self.folder / "ports.json").read_text())
        return rows


if __name__ == "__main__":
    asyncio.run(main())
