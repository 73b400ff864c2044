"""The registered process ``gateway``: opens the HTTP endpoint and closes it in good order."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

from prometheus_client import CollectorRegistry

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer, Stop
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom, Pid, Term
from control.cluster_api import ClusterApi
from control.discovery.addresses import is_loopback
from control.gateway.app import create_app
from control.gateway.key_ring import KeyRing
from control.gateway.server import AddressUnavailable, HttpServer, ServerTls, TlsUnusable
from control.gateway.settings import GatewaySettings
from control.keys import key_of

LAST_WORDS_S = 0.5
KEYS_S = 2.0  # that the scheduler takes to say which keys there are


class GatewayServer(GenServer):
    """Serves HTTP while it lives.

    Args:
        address: host and port wanted; once bound, the port is kept over restarts.
        insecure: let everybody in where no key is left; see ``KeyRing``.
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
        settings: GatewaySettings,
        insecure: bool = False,
    ) -> None:
        super().__init__()
        self.address = address
        self._drain_s = drain_s
        self._draining = False
        self._watcher: Pid | None = None
        self._ring = KeyRing(
            known=False,
            exposed=not is_loopback(address.host),
            insecure=insecure,
            now_s=settings.now_s,
            monotonic_s=settings.monotonic_s,
        )
        # A registry of its own: that of a gateway before this one has its metrics already.
        settings = replace(settings, registry=CollectorRegistry())
        app = create_app(api, settings=settings, control=api, ring=self._ring)
        api.url = lambda: address.url
        api.on_recovery = app.state.gateway.metrics.recovery_pause.observe
        self._server = HttpServer(app, host=address.host, port=address.port, tls=address.tls)

    def format_state(self) -> Term:
        return {Atom("url"): self.address.url}

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        self._ask_for_keys()
        with contextlib.suppress(ReceiveTimeout):  # else closed until they are known
            self._take_keys(await me.receive(_keys_in, timeout_s=KEYS_S))
        try:
            self.address.host, self.address.port = await self._server.start()
        except (AddressUnavailable, TlsUnusable) as exc:
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
            case ("keys", _, _):
                self._take_keys(message)
            case "ask_for_keys":
                if not self._ring.known:
                    self._ask_for_keys()
            case ("EXIT", pid, reason) if pid == self._watcher and not self._draining:
                raise Stop((Atom("http_server_ended"), reason))
            case ("EXIT", _, _):
                pass  # a drain that ended
            case _:
                await super().handle_info(message)

    def _ask_for_keys(self) -> None:
        """The scheduler tells them, now and whenever they change; unless it is being restarted."""
        me = self.me
        gen_server.cast(me, Atom("scheduler"), (Atom("tell_keys"), me.pid))
        me.send_after(KEYS_S, me.pid, Atom("ask_for_keys"))

    def _take_keys(self, message: Term) -> None:
        _, records, revoked = message
        self._ring.update(map(key_of, records), revoked=bool(revoked))

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

    def __init__(self, host: str, port: int, tls: ServerTls | None = None) -> None:
        self.host, self.port, self.tls = host, port, tls

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


def _keys_in(message: Term) -> Term | None:
    return message if isinstance(message, tuple) and message[:1] == ("keys",) else None
