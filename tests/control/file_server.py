"""A real HTTP server for download tests: ranges, entity tags, and the ways servers fail."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


@dataclass
class Served:
    """One address of the server.

    Attributes:
        drops: bytes after which the first, second, ... answer breaks off.
        statuses: answered instead, one a request, before the content.
        gate: waited for in the middle of the content.
    """

    data: bytes
    content_type: str = "application/octet-stream"
    etag: bool = True
    ranges: bool = True
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    gate: threading.Event | None = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


class FileServer:
    """Serves ``files`` (path -> Served) on a free port, of loopback; notes every request."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range header
        self.missing_headers: dict[str, str] = {}  # sent with each 404
        self.reached_gate = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                outer.answer(self, with_body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = _Server((host, 0), Handler)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        self.url = f"http://{host}:{self._http.server_port}"

    def add(self, path: str, data: bytes, **more: object) -> str:
        """Serve ``data`` at ``path``; the whole URL."""
        self.files[path] = Served(data, **more)  # type: ignore[arg-type]
        return self.url + path

    def close(self) -> None:
        for served in self.files.values():
            if served.gate:
                served.gate.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)

    def __enter__(self) -> FileServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = urlsplit(request.path).path
        wanted = request.headers.get("Range", "")
        self.requests.append((request.command, path, wanted))
        served = self.files.get(path)
        if served is None:
            self._status(request, 404)
            return
        if served.statuses:
            self._status(request, served.statuses.pop(0))
            return
        data, start, status = served.data, 0, 200
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        same = request.headers.get("If-Range", etag) == etag
        if served.ranges and wanted.startswith("bytes=") and same:
            start = int(wanted[6:].partition("-")[0])
            if start >= len(data):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(data)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            status = 206
        request.send_response(status)
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if served.etag and "ETag" not in served.headers:
            request.send_header("ETag", etag)
        for name, value in served.headers.items():
            request.send_header(name, value)
        request.send_header("Content-Type", served.content_type)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        if with_body:
            self._body(request, served, data[start:])

    def _body(self, request: BaseHTTPRequestHandler, served: Served, data: bytes) -> None:
        if served.drops:
            request.wfile.write(data[: served.drops.pop(0)])
            request.close_connection = True
        elif served.gate is not None:
            request.wfile.write(data[: len(data) // 2])
            request.wfile.flush()
            self.reached_gate.set()
            served.gate.wait(30)
            try:
                request.wfile.write(data[len(data) // 2 :])
            except OSError:
                request.close_connection = True
        else:
            try:
                request.wfile.write(data)
            except OSError:  # the client left
                request.close_connection = True

    def _status(self, request: BaseHTTPRequestHandler, status: int) -> None:
        request.send_response(status)
        for name, value in self.missing_headers.items() if status == 404 else ():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()


@contextmanager
def closed_port() -> Iterator[Callable[[str], str]]:
    """Makes URLs of a port where nobody listens."""
    server = FileServer()
    base = server.url
    server.close()
    yield lambda path: base + path
