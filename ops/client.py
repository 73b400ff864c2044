"""How ``ctl`` reaches a node: as a hidden node over the distribution protocol, cookie in hand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from bridge import epmd, gen_server
from bridge.errors import BridgeError, EncodeError, EpmdError, TlsError
from bridge.flags import HIDDEN_NODE
from bridge.handshake import Initiator, Local
from bridge.handshake_io import perform
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from bridge.text import text_of
from bridge.tls import TlsFiles
from ops.errors import BadUsage, NoNode, Refused
from ops.home import Home, RunInfo
from ops.tls_files import files_for_client

T = TypeVar("T")

CONNECT_S: Final = 7.0
CALL_S: Final = 30.0  # the cluster itself waits up to this long for one of its parts
SERVER: Final = "cluster"

logging.getLogger("bridge").addHandler(logging.NullHandler())  # what matters is in our errors


@dataclass(frozen=True, slots=True)
class Target:
    """Which node to speak to.

    Attributes:
        home: has the cookie, and the run file of the local node.
        node: ``NAME@HOST``, found through EPMD; None: the one of the run file.
    """

    home: Home
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A node that should be there. ``run`` is known where it runs on the home.

    ``tls`` is there where the nodes of the home speak TLS, and so does whoever connects.
    """

    name: str
    address: tuple[str, int]
    run: RunInfo | None
    tls: TlsFiles | None = None


class ClusterClient:
    """A connection to one node. Use ``connect``."""

    def __init__(self, node: Node, found: Found) -> None:
        self.node = node
        self.name = found.name
        self.run = found.run

    @property
    def server(self) -> tuple[str, str]:
        """Who answers."""
        return SERVER, self.name

    async def call(self, request: Term, *, timeout_s: float = CALL_S) -> Term:
        """Ask ``cluster``: the value of ``{ok, Value}``, else the reply as it is.

        Raises:
            Refused: the reply is ``{error, Kind, Text}``, or there was none in time.
            NoNode: the node went away.
        """
        with self.node.open_process(label="ctl") as me:
            return await self.call_from(me, request, timeout_s=timeout_s)

    async def call_from(self, me: Process, request: Term, *, timeout_s: float) -> Term:
        """``call`` by an open process, which a later answer may be sent to."""
        try:
            reply = await gen_server.call(me, self.server, request, timeout_s=timeout_s)
        except EncodeError as exc:
            raise BadUsage(f"this cannot be sent: {exc}") from exc
        except gen_server.CallTimeout as exc:
            raise Refused(
                "timeout",
                f"node {self.name} is there but gave no answer within {timeout_s:g} s. "
                f"Look at its log, or ask again.",
            ) from exc
        except gen_server.NoProc as exc:
            raise NoNode(
                f"node {self.name} is there, but nothing in it answers for the cluster: it is "
                f"starting or stopping. Ask again in a moment."
            ) from exc
        except gen_server.CallError as exc:
            raise NoNode(f"lost node {self.name} while it worked on this: {exc.why!r}") from exc
        match reply:
            case ("ok", value):
                return value
            case ("error", kind, text):
                raise Refused(str(kind), text_of(text))
            case ("error", kind):
                raise Refused(str(kind), "")
            case _:
                return reply


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncIterator[ClusterClient]:
    """A client for as long as the block runs.

    Raises:
        NoNode: nobody to speak to; the text says what was tried.
        HomeError: the cookie is there but cannot be used.
    """
    cookie = _cookie(target.home)
    found = await find(target)
    contexts = _contexts(found.tls)
    node = Node(f"ctl_{secrets.token_hex(6)}@127.0.0.1", cookie, hidden=True, tls=contexts)
    await node.start(listen=None, epmd=None)
    try:
        if not await node.connect(found.name, address=found.address, timeout_s=CONNECT_S):
            raise NoNode(await _why_not(node.name, cookie, found, target.home))
        yield ClusterClient(node, found)
    finally:
        await node.stop()


def run(target: Target, body: Callable[[ClusterClient], Awaitable[T]]) -> T:
    """Connect, run ``body``, disconnect. Raises as ``connect`` and ``ClusterClient.call``."""

    async def connected() -> T:
        async with connect(target) as client:
            return await body(client)

    return asyncio.run(connected())


def ask(target: Target, request: Term, *, timeout_s: float = CALL_S) -> Term:
    """One call. Raises as ``run``."""
    return run(target, lambda client: client.call(request, timeout_s=timeout_s))


async def find(target: Target) -> Found:
    """Where the node listens: from the run file, else from EPMD. Raises NoNode, BadUsage."""
    home, info = target.home, target.home.read_run()
    tls = files_for_client(home, info)
    if info is not None and target.node in (None, info.node):
        return Found(info.node, (_host(info.node), info.dist_port), info, tls)
    if target.node is None:
        what = "is there, but its process is gone" if home.run_file.exists() else "is not there"
        raise NoNode(
            f"no node runs on the home {home.root}: its run file {home.run_file} {what}. "
            f"Start one with `ctl start --home {home.root}`, or name another with --home or --node."
        )
    short_name, _, host = target.node.partition("@")
    if not short_name or not host:
        raise BadUsage(f"--node {target.node!r} is no node name: write NAME@HOST")
    port = info.epmd_port if info else None
    try:
        entry = await epmd.lookup(short_name, host, port, timeout_s=CONNECT_S)
        known = [] if entry else [name for name, _ in await epmd.names(host, port)]
    except EpmdError as exc:
        raise NoNode(
            f"cannot find node {target.node}: {exc}. Start a node there, or check the host."
        ) from exc
    if entry is None:
        seen = ", ".join(f"{name}@{host}" for name in known) or "none"
        raise NoNode(f"no node {target.node}: EPMD of {host} knows these: {seen}.")
    return Found(target.node, (host, entry.tcp_port), None, tls)


def _cookie(home: Home) -> str:
    """The cookie that is there; a command that only asks makes none."""
    if home.cookie_file.exists():
        return home.cookie()
    why = "has no cookie" if home.root.is_dir() else "does not exist"
    raise NoNode(
        f"the home {home.root} {why}: no node was ever started on it. Start one with "
        f"`ctl start --home {home.root}`, or name its home with --home or PHALANX_HOME."
    )


def _contexts(tls: TlsFiles | None) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
    try:
        return tls.contexts() if tls is not None else None
    except TlsError as exc:
        raise NoNode(f"the node speaks TLS, and its files cannot be used: {exc}") from exc


def _host(node: str) -> str:
    return node.partition("@")[2]


async def _why_not(own_name: str, cookie: str, found: Found, home: Home) -> str:
    """Why ``found`` cannot be connected to, by one more try that looks at each step."""
    host, port = found.address
    where = f"node {found.name} at {host}:{port}"
    again = "" if found.run is None else f" Process {found.run.os_pid} still runs; see its log."
    contexts = _contexts(found.tls)
    client, length_bytes = (contexts[1], 4) if contexts else (None, 2)
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=client)
            try:
                local = Local(Atom(own_name), cookie, 4, HIDDEN_NODE, length_bytes)
                machine = Initiator(local, found.name)
                await perform(machine, reader, writer, timeout_s=CONNECT_S)
            finally:
                writer.close()
    except ssl.SSLError as exc:
        return f"{where} refuses the certificate of {home.root}, or speaks no TLS: {exc}.{again}"
    except TimeoutError:
        return f"{where} is silent for {CONNECT_S:g} s.{again}"
    except OSError as exc:
        return f"{where} cannot be reached: {exc}.{again}"
    except BridgeError as exc:
        text = str(exc)
        if "closed" in text or "cookies" in text or "lost" in text:
            return (
                f"{where} refuses the cookie in {home.cookie_file}. Copy the file `cookie` of that "
                f"node's home there, or name that home with --home. (Told: {text})"
            )
        return f"{where} refuses: {text}."
    return f"{where} did not take a connection within {CONNECT_S:g} s, then did. Ask again."
