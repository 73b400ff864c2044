"""Brings missing chunks from several peers at once, each chunk checked before it is kept."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from control.errors import ChecksumMismatch, ControlError, DownloadFailed
from control.fetch import Cancelled, disk_errors
from control.peer_files.board import Board, Run
from control.peer_files.chunks import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    MAX_RUN_CHUNKS,
    digest_of,
    rows_of,
    span,
)
from control.peer_files.line import Line, LineLost
from control.peer_files.part_copy import PartCopy
from control.peer_files.source import Peers, Source, chunks_of, source_of

log = logging.getLogger("control.peer_files")

LINES_A_PEER: Final = 2
MAX_LINES: Final = 8
AHEAD: Final = 2  # requests on their way in one line
MAX_BAD_RUNS: Final = 3  # from one peer, which is then left alone
MAX_ATTEMPTS: Final = 5  # connections in a row without one new chunk
LOOK_S: Final = 1.0  # between two looks at who has what
GRACE_S: Final = 1.5  # with nothing to do, before it is given up where peers fetch themselves
RETRY_S: Final = 0.25
DIGEST_S: Final = 60.0
WAIT_S: Final = 0.2


class Pull:
    """One go at everything that is missing.

    Nodes that have a part of it give that too, and more as they get it: a model that several
    machines fetch at a time goes over the link of the first about once.
    """

    def __init__(
        self,
        copy: PartCopy,
        missing: Mapping[str, Sequence[int]],
        sources: Sequence[Source],
        peers: Peers,
        *,
        begin: float,
        on_bytes: Callable[[int], None],
        cancelled: threading.Event,
    ) -> None:
        """
        Args:
            begin: see ``Board``.
            on_bytes: told of every run's bytes once they are kept, by any thread.
        """
        self._copy, self._sources, self._peers = copy, list(sources[:MAX_LINES]), peers
        self._on_bytes, self._cancelled = on_bytes, cancelled
        self._board = Board(missing, begin=begin)
        self._threads: list[threading.Thread] = []
        self._numbers = {name: n for n, (name, _) in enumerate(copy.offer.files)}
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._stop = threading.Event()

    def run(self) -> None:
        """Fetch it all.

        Raises:
            DownloadFailed: no peer is left that has what is missing; what came is kept.
            ChecksumMismatch: the same, and a peer's files were not what the digests say.
            DiskFull, StoreUnusable, Cancelled.
        """
        lines = max(1, min(LINES_A_PEER, MAX_LINES // len(self._sources)))
        for source in self._sources:
            self._open_lines(source, lines)
        threading.Thread(target=self._look_around, name="looks for peers", daemon=True).start()
        busy_s = time.monotonic()
        while not self._board.is_empty() and time.monotonic() - busy_s <= self._grace_s():
            if self._cancelled.is_set() or self._failure is not None:
                break
            self._board.wait(WAIT_S)
            if self._num_busy():
                busy_s = time.monotonic()
        self._stop.set()
        self._board.wake()
        if self._board.is_empty():
            return
        if self._cancelled.is_set():
            raise Cancelled
        if self._failure is not None:
            raise self._failure
        reasons = "; ".join(f"{s.peer}: {s.why or 'has no more of it'}" for s in self._sources)
        if any(source.bad_runs for source in self._sources):
            what = f"{self._copy.offer.id} from its peers"
            raise ChecksumMismatch(what, "chunks of the digests told before", reasons)
        advice = "What came is kept: try again once they are back"
        raise DownloadFailed(self._copy.offer.id, reasons, advice)

    def _open_lines(self, source: Source, count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(
                target=self._run_line, args=(source,), name=f"from {source.peer}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _num_busy(self) -> int:
        alive = sum(thread.is_alive() for thread in self._threads)
        return alive - sum(source.idle for source in self._sources)

    def _grace_s(self) -> float:
        growing = any(source.have is not None and not source.why for source in self._sources)
        return GRACE_S if growing else WAIT_S

    def _look_around(self) -> None:
        """Again and again: what peers that fetch have got meanwhile, and who else does."""
        while not self._stop.wait(LOOK_S):
            for source in list(self._sources):
                if source.have is not None and not source.why:
                    with suppress(ControlError):
                        offer = self._peers.look(source.peer)
                        if offer.is_same_model(self._copy.offer):
                            source.have = chunks_of(offer)
            for peer in self._peers.fellows([source.peer for source in self._sources]):
                if len(self._threads) >= MAX_LINES or self._stop.is_set():
                    break
                with suppress(ControlError):
                    offer = self._peers.offer(peer)
                    if offer.is_same_model(self._copy.offer):
                        source = source_of(peer, offer)
                        self._sources.append(source)
                        self._open_lines(source, 1)
            self._board.wake()

    def _rest(self, source: Source) -> None:
        """Nothing is left that this peer can give; it may get more."""
        with self._lock:
            source.idle += 1
        while not self._stop.is_set() and self._board.is_hopeless(source.peer, source.has):
            if source.why:
                break
            self._board.wait(WAIT_S)
        with self._lock:
            source.idle -= 1

    def _run_line(self, source: Source) -> None:
        """One connection after another, until there is no more to do for it."""
        attempts = 0
        while not self._stop.is_set() and not source.why:
            before = source.kept
            try:
                if self._board.is_hopeless(source.peer, source.has):
                    self._rest(source)
                else:
                    self._fetch_some(source)
            except (LineLost, DownloadFailed) as exc:
                attempts = 1 if source.kept > before else attempts + 1
                log.info("a transfer from %s broke off: %s", source.peer, exc)
                if attempts >= MAX_ATTEMPTS:
                    source.why = source.why or str(exc)
                elif self._stop.wait(RETRY_S * 2**attempts):
                    break
            except Exception as exc:  # noqa: BLE001 - a thread's edge: goes to whoever waits
                self._failure = exc  # our own disk, or our own fault
                break
        self._board.wake()

    def _fetch_some(self, source: Source) -> None:
        """Over one connection, until nothing is left that this peer can give."""
        token = self._token(source)
        buffer = memoryview(bytearray(MAX_RUN_CHUNKS * CHUNK_BYTES))
        ahead: deque[tuple[Run, Future[bytes]]] = deque()
        with Line(source.offer.doors, token) as line:
            try:
                while not self._stop.is_set() and not source.why:
                    while len(ahead) < AHEAD:
                        run = self._board.take(source.peer, source.has, source.run_chunks)
                        if run is None:
                            break
                        start, stop = self._span(run)
                        ahead.append((run, self._digests(run)))
                        line.ask(self._numbers[run.name], start, stop - start)
                    if ahead:
                        begin_s = time.monotonic()
                        self._receive(line, source, *ahead[0], buffer)
                        source.pace(ahead[0][0], time.monotonic() - begin_s)
                        ahead.popleft()
                    elif self._board.is_empty() or self._board.is_hopeless(source.peer, source.has):
                        return
                    else:
                        self._board.wait(WAIT_S)
            finally:
                for run, digests in ahead:
                    digests.cancel()
                    self._board.give_back(run, source.peer)

    def _receive(
        self, line: Line, source: Source, run: Run, promised: Future[bytes], buffer: memoryview
    ) -> None:
        start, stop = self._span(run)
        found: list[bytes] = []
        line.ready()
        for at in range(0, stop - start, CHUNK_BYTES):
            part = buffer[at : min(at + CHUNK_BYTES, stop - start)]
            line.read(part)
            found.append(digest_of(part))
        try:
            expected = promised.result(DIGEST_S)
        except (TimeoutError, FutureCancelled) as exc:  # cancelled: this node is stopping
            raise LineLost(f"no digests within {DIGEST_S:.0f} s") from exc
        bad = [
            run.first + n
            for n, digest in enumerate(found)
            if digest != expected[n * DIGEST_BYTES : (n + 1) * DIGEST_BYTES]
        ]
        if not self._board.needs(run):
            return  # another peer was quicker
        good = sorted(set(run.chunks) - set(bad))
        path, size = self._copy.files / run.name, self._copy.sizes[run.name]
        with disk_errors(path), path.open("r+b", buffering=0) as file:
            for row in rows_of(good):
                first, last = span(row.start, len(row), size)
                file.seek(first)
                file.write(buffer[first - start : last - start])
                at = row.start - run.first
                self._copy.add(run.name, row.start, b"".join(found[at : at + len(row)]))
        self._board.done(run, source.peer, bad)
        self._on_bytes(sum(span(n, 1, size)[1] - span(n, 1, size)[0] for n in good))
        if bad:
            source.bad_runs += 1
            log.warning(
                "%s: %d chunks of %s are not what their digests say; they were thrown away",
                source.peer,
                len(bad),
                run.name,
            )
            if source.bad_runs >= MAX_BAD_RUNS:
                source.why = f"{source.bad_runs} times it sent what its digests do not allow"
        if good:
            source.kept += 1

    def _span(self, run: Run) -> tuple[int, int]:
        return span(run.first, run.count, self._copy.sizes[run.name])

    def _digests(self, run: Run) -> Future[bytes]:
        able = [
            s.peer
            for s in self._sources
            if not s.why and all(s.has(run.name, chunk) for chunk in run.chunks)
        ]
        return self._peers.digests(able, run)

    def _token(self, source: Source) -> bytes:
        with self._lock:
            if source.tokens:
                return source.tokens.pop()
        offer = self._peers.offer(source.peer)
        if not offer.is_same_model(self._copy.offer) or not offer.tokens:
            source.why = "it no longer has this model"
            raise DownloadFailed(self._copy.offer.id, source.why)
        source.offer = offer
        return offer.tokens[0]
