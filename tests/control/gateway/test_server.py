"""The listening socket: addresses, draining, and no claim on signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from typing import Any

import httpx
import pytest

from control.gateway.app import create_app
from control.gateway.server import AddressUnavailable, HttpServer
from control.gateway.settings import GatewaySettings
from tests.control.gateway.fake_backend import MODEL, FakeBackend
from tests.control.gateway.live import serve

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def test_starts_answers_and_stops_inside_a_running_loop() -> None:
    async def main() -> None:
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        server = HttpServer(create_app(FakeBackend()), port=0)
        host, port = await server.start()
        assert host == "127.0.0.1"
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            answer = await client.get("/health")
            assert answer.json() == {"status": "ok"}
            assert "server" not in answer.headers
        await server.stop(1.0)
        with pytest.raises(OSError):
            await asyncio.open_connection(host, port)

    asyncio.run(main())


def test_a_port_in_use_is_named_with_the_next_step() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = HttpServer(create_app(FakeBackend()), port=port)
            with pytest.raises(AddressUnavailable, match=f"127.0.0.1:{port}.*in use.*--http"):
                await server.start()
            await server.stop(1.0)

    asyncio.run(main())


def test_a_foreign_address_is_refused() -> None:
    async def main() -> None:
        server = HttpServer(create_app(FakeBackend()), host="192.0.2.1", port=0)
        with pytest.raises(AddressUnavailable, match=r"192\.0\.2\.1"):
            await server.start()

    asyncio.run(main())


def test_a_request_that_runs_is_finished_before_the_end() -> None:
    async def main() -> None:
        backend = FakeBackend()
        started, go_on = asyncio.Event(), asyncio.Event()
        said = backend.generate

        async def held(request: Any) -> Any:
            started.set()
            await go_on.wait()
            async for event in said(request):
                yield event

        backend.generate = held  # type: ignore[method-assign]
        server = HttpServer(create_app(backend), port=0)
        host, port = await server.start()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=ASK))
            await started.wait()
            stopping = asyncio.create_task(server.stop(10.0))
            go_on.set()
            answer = await asking
            assert answer.json()["choices"][0]["message"]["content"] == "Hello there"
        await stopping

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_outlasts_the_drain_is_cancelled(stream: bool) -> None:
    async def main() -> None:
        backend = FakeBackend(hold_at=2)
        server = HttpServer(create_app(backend), port=0)
        host, port = await server.start()
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            body = {**ASK, "stream": stream}
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await asyncio.to_thread(backend.held.get, True, 5)
            await server.stop(0.05)
            assert backend.active == 0
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_let_go() -> None:
    backend = FakeBackend(say="x" * 200)
    with serve(backend, settings=GatewaySettings(write_timeout_s=0.2)) as live:
        ask = {**ASK, "stream": True, "n": 64, "logprobs": True, "top_logprobs": 20}
        body = json.dumps(ask).encode()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((live.host, live.port))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
            deaf.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            for _ in range(64):
                backend.closed.get(timeout=20)
            assert backend.active == 0
            assert live.http.get("/health").status_code == 200
