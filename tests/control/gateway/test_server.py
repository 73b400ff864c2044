"""The listening socket: addresses, draining, and no claim on signals."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from control.gateway.app import create_app
from control.gateway.server import AddressUnavailable, HttpServer, ServerTls, TlsUnusable
from control.gateway.settings import GatewaySettings
from tests.control.gateway.fake_backend import MODEL, FakeBackend
from tests.control.gateway.live import Live, serve

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


def raw(live: Live, data: bytes) -> tuple[int, str]:
    """Send bytes; the status and body of what comes until the connection is closed."""
    with socket.create_connection((live.host, live.port), timeout=10) as made:
        made.sendall(data)
        answer = b""
        while chunk := made.recv(65536):
            answer += chunk
    head, _, body = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), body


def test_what_is_no_http_and_heads_that_are_too_large_are_refused() -> None:
    with serve(FakeBackend()) as live:
        status, body = raw(live, b"this is not http\r\n\r\n")
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        large = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Fill: " + b"a" * 100_000
        status, body = raw(live, large)
        assert (status, json.loads(body)["error"]["code"]) == (431, "invalid_http")
        assert live.http.get("/health").status_code == 200


@pytest.mark.slow
def test_who_is_slow_to_ask_is_let_go() -> None:
    with serve(FakeBackend(), settings=GatewaySettings(receive_timeout_s=0.3)) as live:
        for begun in (b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
            assert raw(live, begun)[0] == 408  # a head
        asked = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection((live.host, live.port), timeout=10) as kept:
            for part, end in ((asked, b"}"), (b"GET /hea", b"}}")):  # a second request
                kept.sendall(part)
                answer = b""
                while not answer.endswith(end):
                    answer += kept.recv(65536)
            assert b" 408 " in answer
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        status, body = raw(live, head + b'Content-Length: 100\r\n\r\n{"model"')
        assert (status, json.loads(body)["error"]["code"]) == (408, "body_too_slow")
        held = live.http.post("/v1/chat/completions", json=ASK)  # answers may take longer than that
        assert held.status_code == 200
        assert live.http.get("/health").status_code == 200


@pytest.mark.slow
def test_an_answer_may_take_longer_than_asking() -> None:
    backend = FakeBackend(hold_at=1)
    settings = GatewaySettings(receive_timeout_s=0.2)
    with serve(backend, settings=settings) as live, httpx.Client(base_url=live.url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=ASK, timeout=0.8)
        assert backend.closed.get(timeout=10)


def test_tls_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    files = ServerTls(str(tmp_path / "none.pem"), str(tmp_path / "none.key"))
    server = HttpServer(create_app(FakeBackend()), port=0, tls=files)
    with pytest.raises(TlsUnusable, match=r"none\.pem.*http\.tls"):
        asyncio.run(server.start())
