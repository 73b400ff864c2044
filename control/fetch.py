"""One file from one URL onto the disk: resumed, checked, and there only when it is whole.

Blocking code for a thread of its own; ``control.model_store`` is its asyncio side. The file
grows as ``<name>.part`` beside its target, with ``<name>.part.json`` saying of which content it
is a part; both outlive a lost connection and a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

import certifi
import httpx

from control.errors import ChecksumMismatch, DiskFull, DownloadFailed, StoreUnusable

CHUNK_BYTES = 1 << 20
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

OnBytes = Callable[[int, int], None]  # bytes so far, bytes in all (0: unknown)


class Cancelled(Exception):
    """The caller no longer wants the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """How patient a download is.

    Attributes:
        read_timeout_s: silence after which a connection counts as lost.
        max_attempts: tries in a row without one new byte.
        retry_delay_s: pause before the second of them; doubles up to ``max_delay_s``.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    max_attempts: int = 5
    retry_delay_s: float = 0.5
    max_delay_s: float = 10.0

    def client(self) -> httpx.Client:
        """Follows redirects; trusts the system's, certifi's and pip's certificates."""
        timeout = httpx.Timeout(self.read_timeout_s, connect=self.connect_timeout_s)
        return httpx.Client(
            timeout=timeout,
            follow_redirects=True,
            verify=tls_context(),
            headers={"User-Agent": "phalanx", "Accept-Encoding": "identity"},
        )


def tls_context() -> ssl.SSLContext:
    """Certificates as pip would trust them, so that one setting serves both."""
    variables = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return _tls_context(tuple(os.environ.get(name, "") for name in variables))


@functools.lru_cache(maxsize=4)  # reading the files takes longer than a small download
def _tls_context(files: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    for path in files:
        if os.path.isfile(path):
            context.load_verify_locations(path)
    return context


def shown_url(url: str) -> str:
    """``url`` without user name, password and query, fit for logs and errors."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


@contextlib.contextmanager
def disk_errors(folder: Path, need_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's word for a full or closed disk into ours."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:  # a library's own error, not the system's
            raise
        if exc.errno in FULL:
            raise DiskFull(str(folder), need_bytes, free_bytes(folder)) from exc
        raise StoreUnusable(exc.filename or str(folder), exc.strerror or str(exc)) from exc


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below ``folder``; 0 where nobody can say."""
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(path).free
    return 0


def need_space(folder: Path, need_bytes: int) -> None:
    """Raise DiskFull before the first byte rather than after the last that fits."""
    free = free_bytes(folder)
    if need_bytes > free:
        raise DiskFull(str(folder), need_bytes, free)


def check_sha256(path: Path, expected: str, what: str, cancelled: threading.Event) -> None:
    """Raise ChecksumMismatch, and remove the file, unless it has the digest ``expected``."""
    with disk_errors(path.parent), path.open("rb") as file:
        found = _hash_of(file, cancelled).hexdigest()
    if found != expected.lower():
        path.unlink(missing_ok=True)
        raise ChecksumMismatch(what, f"sha256 {expected}", found)


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    size_bytes: int | None = None,
    on_bytes: OnBytes,
    cancelled: threading.Event,
    settings: HttpSettings,
) -> None:
    """Make ``target`` hold what is at ``url`` (http, https, file); a target that exists is kept.

    Raises:
        DownloadFailed: unreachable, refused, or it kept breaking off; the part is kept.
        ChecksumMismatch: wrong digest or size; nothing is kept.
        DiskFull: nothing is kept.
        Cancelled: ``cancelled`` was set; the part is kept.
    """
    if target.exists():
        return
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise DownloadFailed(url, str(exc), "Correct the address") from exc
    part = _Part(url, target, sha256, size_bytes, on_bytes, cancelled)
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    resumed = part.size() > 0
    while True:
        try:
            if parts.scheme == "file":
                part.copy(Path(unquote(parts.path)))
            else:
                with settings.client() as client:
                    _with_retries(part, client, settings)
            part.finish()
            return
        except ChecksumMismatch:
            part.remove()
            if not resumed:
                raise
            resumed = False  # the part may have been the bad half: once more from the start
        except DiskFull:
            part.remove()
            raise


def _with_retries(part: _Part, client: httpx.Client, settings: HttpSettings) -> None:
    failures = 0
    while True:
        before = part.size()
        delay_s = min(settings.retry_delay_s * 2**failures, settings.max_delay_s)
        try:
            part.transfer(client)
            return
        except _Again as exc:
            failures = 1 if part.size() > before else failures + 1
            if failures >= settings.max_attempts:
                raise DownloadFailed(shown_url(part.url), str(exc)) from exc
            delay_s = min(exc.retry_after_s or delay_s, settings.max_delay_s)
        if part.cancelled.wait(delay_s):
            raise Cancelled


class _Again(Exception):
    """This attempt failed in a way that the next one may not."""

    def __init__(self, why: str, retry_after_s: float = 0.0) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class _Part:
    """The growing file, and of which content it is a part."""

    def __init__(
        self,
        url: str,
        target: Path,
        sha256: str | None,
        size_bytes: int | None,
        on_bytes: OnBytes,
        cancelled: threading.Event,
    ) -> None:
        self.url, self.target, self.cancelled = url, target, cancelled
        self._sha256, self._size_bytes, self._on_bytes = sha256, size_bytes, on_bytes
        self.path = target.with_name(target.name + ".part")
        self._note = target.with_name(target.name + ".part.json")

    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self) -> None:
        """Check the digest, make it durable, and give it its name."""
        if self._sha256 is not None:
            check_sha256(self.path, self._sha256, shown_url(self.url), self.cancelled)
        with disk_errors(self.path.parent):
            self.path.replace(self.target)
            self._note.unlink(missing_ok=True)

    def copy(self, source: Path) -> None:
        try:
            reader = source.open("rb")
        except OSError as exc:
            raise DownloadFailed(str(source), exc.strerror or str(exc), "Check the path") from exc
        with reader:
            total = os.fstat(reader.fileno()).st_size
            self._check_total(total)
            self._write(iter(lambda: reader.read(CHUNK_BYTES), b""), 0, total)

    def transfer(self, client: httpx.Client) -> None:
        """One request, from where the part ends. Raises _Again if another may go further."""
        start, etag = self.size(), self._etag()
        headers = {}
        if start and (etag or self._sha256):  # without either, nothing proves that parts fit
            headers["Range"] = f"bytes={start}-"
            if etag:
                headers["If-Range"] = etag
        else:
            start = 0
        try:
            with client.stream("GET", self.url, headers=headers) as answer:
                self._receive(answer, start)
        except httpx.InvalidURL as exc:
            raise DownloadFailed(shown_url(self.url), str(exc), "Correct the address") from exc
        except httpx.HTTPError as exc:
            why = str(exc) or type(exc).__name__
            raise _Again(f"{why} ({shown_url(self.url)})") from exc

    def _receive(self, answer: httpx.Response, start: int) -> None:
        status = answer.status_code
        if status == 416:  # the part is as long as the file, or longer
            if answer.headers.get("Content-Range", "") == f"bytes */{start}":
                return
            self.remove()
            raise _Again("the file has changed at its source")
        if status in RETRIED:
            wait = answer.headers.get("Retry-After", "")
            raise _Again(f"the server answered {status}", float(wait) if wait.isdigit() else 0.0)
        if status not in (200, 206):
            advice = {401: "Log in to that index or hub", 403: "Ask for access to it"}
            why = f"the server answered {status} {answer.reason_phrase}"
            raise DownloadFailed(
                shown_url(self.url), why, advice.get(status, "Check the name and the version")
            )
        total = int(length) if (length := answer.headers.get("Content-Length", "")).isdigit() else 0
        if status == 206:
            began, _, whole = answer.headers.get("Content-Range", "").partition("/")
            if began.partition("-")[0].strip() != f"bytes {start}" or not whole.isdigit():
                self.remove()
                raise _Again("the server answered with another range than the one asked for")
            total = int(whole)
        else:
            start = 0
        self._check_total(total)
        etag = answer.headers.get("ETag", "")
        with disk_errors(self.path.parent):
            self._note.write_text(json.dumps({"url": self.url, "etag": etag}))
        self._write(answer.iter_bytes(), start, total)
        if total and self.size() != total:
            raise _Again(f"the connection ended after {self.size()} of {total} bytes")

    def _write(self, chunks: Iterator[bytes], start: int, total: int) -> None:
        need_space(self.path.parent, total - start)
        with disk_errors(self.path.parent, total - start):
            file = self.path.open("r+b" if start else "wb")
        # Closing writes too: a disk that is full says so once more, under the same name.
        with disk_errors(self.path.parent, total - start), file:
            file.seek(start)
            file.truncate()
            done = start
            for chunk in chunks:
                if self.cancelled.is_set():
                    raise Cancelled
                with disk_errors(self.path.parent, total - done):
                    file.write(chunk)
                done += len(chunk)
                if total and done > total:
                    raise ChecksumMismatch(shown_url(self.url), f"{total} bytes", "more")
                self._on_bytes(done, total)
            with disk_errors(self.path.parent, total - done):
                file.flush()
                os.fsync(file.fileno())

    def _check_total(self, total: int) -> None:
        if self._size_bytes is not None and total and total != self._size_bytes:
            raise ChecksumMismatch(
                shown_url(self.url), f"{self._size_bytes} bytes", f"{total} bytes"
            )

    def _etag(self) -> str:
        """The strong validator of what the part belongs to; empty if unknown or of another URL."""
        try:
            note = json.loads(self._note.read_text())
            etag = str(note["etag"])
            return etag if note["url"] == self.url and etag.startswith('"') else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def _hash_of(file: BinaryIO, cancelled: threading.Event) -> hashlib._Hash:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        if cancelled.is_set():
            raise Cancelled
        digest.update(chunk)
    return digest


def throttled(on_bytes: OnBytes, period_s: float = 0.1) -> OnBytes:
    """Pass on at most one call a period, and the last one (all bytes there)."""
    last_s = 0.0

    def call(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= period_s or done == total:
            last_s = now_s
            on_bytes(done, total)

    return call
