"""A real gateway on a loopback port, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import anthropic
import httpx
import ollama
import openai

from control.backend import ClusterControl
from control.gateway.app import create_app
from control.gateway.key_ring import KeyRing
from control.gateway.server import HttpServer
from control.gateway.settings import GatewaySettings
from tests.control.gateway.fake_backend import FakeBackend

T = TypeVar("T")
WAIT_S = 10.0


@dataclass(frozen=True)
class Live:
    """One running gateway, and clients that speak to it."""

    backend: FakeBackend
    loop: asyncio.AbstractEventLoop
    server: HttpServer
    host: str
    port: int
    http: httpx.Client
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    ollama: ollama.Client

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one Prometheus sample now; 0 where it is not there yet."""
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        sample = f"{name}{{{shown}}}" if shown else name
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(sample + " "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextlib.contextmanager
def serve(
    backend: FakeBackend,
    *,
    control: ClusterControl | None = None,
    settings: GatewaySettings | None = None,
    ring: KeyRing | None = None,
) -> Iterator[Live]:
    """Start a gateway, and stop it at the end of the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    app = create_app(backend, settings=settings, control=control, ring=ring)
    server = HttpServer(app, port=0)
    try:
        start = asyncio.run_coroutine_threadsafe(server.start(), loop)
        host, port = start.result(WAIT_S)
        url = f"http://{host}:{port}"
        with (
            httpx.Client(base_url=url, timeout=WAIT_S) as http,
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S
            ) as client,
            anthropic.Anthropic(
                base_url=url, api_key="none", max_retries=0, timeout=WAIT_S
            ) as other,
            ollama.Client(host=url, timeout=WAIT_S) as third,
        ):
            yield Live(backend, loop, server, host, port, http, client, other, third)
        asyncio.run_coroutine_threadsafe(server.stop(0.5), loop).result(WAIT_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()
