"""The registered process ``gateway``: opens the HTTP endpoint and closes it in good order."""

from __future__ import annotations

from bridge.gen_server import GenServer, Stop
from bridge.process import Process
from bridge.term import Atom, Term
from control.cluster_api import ClusterApi
from control.gateway.app import create_app
from control.gateway.server import AddressUnavailable, HttpServer
from control.gateway.settings import GatewaySettings


class GatewayServer(GenServer):
    """Serves HTTP while it lives.

    Args:
        address: host and port wanted; once bound, the port is kept over restarts.
        drain_s: how long running requests may take when it ends.
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
        settings = GatewaySettings(
            max_body_bytes=max_body_bytes,
            open_timeout_s=open_timeout_s,
            write_timeout_s=write_timeout_s,
        )
        app = create_app(api, settings=settings, control=api)
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
        me.spawn(self._watch, link=True, label="http server")

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "url":
                return self.address.url
            case _:
                return await super().handle_call(request, from_)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("EXIT", _, reason):
                raise Stop((Atom("http_server_ended"), reason))
            case _:
                await super().handle_info(message)

    async def _watch(self, me: Process) -> None:
        """Die with the server, and take it along when this process is killed."""
        try:
            await self._server.wait()
        finally:
            self._server.abort()

    async def terminate(self, reason: Term) -> None:
        await self._server.stop(self._drain_s)


class BoundAddress:
    """Where the endpoint is wanted and, once it was open, where it is."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
