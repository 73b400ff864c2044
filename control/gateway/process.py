"""The registered process ``gateway``: opens the HTTP endpoint and closes it in good order."""

from __future__ import annotations

from functools import partial

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer, Stop
from bridge.process import Process
from bridge.term import Atom, Pid, Term
from control.cluster_api import ClusterApi
from control.gateway.app import create_app
from control.gateway.server import AddressUnavailable, HttpServer
from control.gateway.settings import GatewaySettings

LAST_WORDS_S = 0.5


class GatewayServer(GenServer):
    """Serves HTTP while it lives.

    Args:
        address: host and port wanted; once bound, the port is kept over restarts.
        drain_s: how long running requests may take after the call ``drain``, with which a node
            stops in good order. A restart by the supervisor does not wait for them: what they
            need is gone.
    """

    def __init__(
        self,
        api: ClusterApi,
        address: BoundAddress,
        *,
        drain_s: float,
        max_body_bytes: int,
        open_timeout_s: float,
        write_timeout_s: float,
    ) -> None:
        super().__init__()
        self.address = address
        self._drain_s = drain_s
        self._draining = False
        self._watcher: Pid | None = None
        settings = GatewaySettings(
            max_body_bytes=max_body_bytes,
            open_timeout_s=open_timeout_s,
            write_timeout_s=write_timeout_s,
        )
        app = create_app(api, settings=settings, control=api)
        api.url = lambda: address.url
        api.on_recovery = app.state.gateway.metrics.recovery_pause.observe
        self._server = HttpServer(app, host=address.host, port=address.port)

    def format_state(self) -> Term:
        return {Atom("url"): self.address.url}

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        try:
            self.address.host, self.address.port = await self._server.start()
        except AddressUnavailable as exc:
            raise Stop((Atom(exc.kind), str(exc))) from exc
        self._watcher = me.spawn(self._watch, link=True, label="http server")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "url":
                return self.address.url
            case "drain":
                self._draining = True
                self.me.spawn(partial(self._drain, from_), link=True, label="drain")
                return NOREPLY
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("EXIT", pid, reason) if pid == self._watcher and not self._draining:
                raise Stop((Atom("http_server_ended"), reason))
            case ("EXIT", _, _):
                pass  # a drain that ended
            case _:
                await super().handle_info(message)

    async def _watch(self, me: Process) -> None:
        """Die with the server, and take it along when this process is killed."""
        try:
            await self._server.wait()
        finally:
            self._server.abort()

    async def _drain(self, from_: Term, me: Process) -> None:
        """Let running requests finish; the process ends with its server."""
        await self._server.stop(self._drain_s)
        gen_server.reply(me, from_, Atom("ok"))

    async def terminate(self, reason: Term) -> None:
        await self._server.stop(LAST_WORDS_S)


class BoundAddress:
    """Where the endpoint is wanted and, once it was open, where it is."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
