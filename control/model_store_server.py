"""The registered process ``model_store``: the store as a gen_server.

Asked by this node and by others, as ``{model_store, Node}``:

=========================== =====================================================================
call                        reply
=========================== =====================================================================
``list``                    list of maps ``id, name, family, state, size_bytes, context_tokens,
                            aliases``
``fetches``                 list of maps ``model, phase, source, done_bytes, total_bytes`` of what
                            is being fetched
``{locate, Ref}``           ``{ok, #{id, path, whole, size_bytes, here_bytes}}`` without network;
                            ``path`` is ``undefined`` where nothing of it is here
``{pull, Ref}``             ``ok`` at once, or ``{error, Kind, Text}``; from other nodes that have
                            it, else from outside
``{progress, Ref}``         ``{ok, #{phase, source, done_bytes, total_bytes}}``; ``phase`` is
                            ``done`` for a model that is here; ``{error, Kind, Text}`` of the last
                            failure, or ``not_pulling``
``{ensure, Ref}``           ``{ok, Path}`` once it is here, from outside, or ``{error, Kind, Text}``
``{ensure, Ref, Options}``  the same from the nodes ``from => [Node]``, best first, and others of
                            the cluster that have some of it, never from outside; ``part`` is what
                            is needed of it, see ``peer_files.part``
``{remove, Ref}``           ``ok`` or ``{error, Kind, Text}``
``{offer, Ref, Tokens}``    ``{ok, Offer}``, see ``peer_files.offer``
``{digests, Ref, File,      ``{ok, Digests}``: 32 bytes for each of the chunks
First, Count}``
=========================== =====================================================================

Each fetch is told to all nodes as the event ``model``: ``#{id, state, source}``, where state is
``pulling``, ``local``, ``partial`` or ``failed``.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.show import show
from bridge.term import Atom, Term
from bridge.text import text_of
from control import events
from control.catalogue import Entry, ModelRef
from control.errors import ControlError, DownloadFailed, NotAModel, StoreUnusable
from control.model_store import ModelStore
from control.peer_files.asking import NodePeers, who_has
from control.peer_files.desk import Desk
from control.peer_files.part import WHOLE, Part, part_of
from control.peer_files.part_copy import PartCopy
from control.store_jobs import OnProgress, Progress

log = logging.getLogger("control.model_store")

IN_USE_S: Final = 5.0
_OK: Final = Atom("ok")
T = TypeVar("T")
Fetch = Callable[[OnProgress], Awaitable[Path]]


class ModelStoreServer(GenServer):
    """Answers at once; what takes long runs in linked processes, which end with it.

    Args:
        hosts: addresses of this node that others reach; None takes the one it listens on.
    """

    def __init__(
        self, store: ModelStore, *, hosts: Callable[[], Sequence[str]] | None = None
    ) -> None:
        super().__init__()
        self.store = store
        self._desk = Desk(store.shelf, hosts or self._own_hosts)
        self._failed: dict[str, ControlError] = {}  # model id -> why its last pull failed
        self._pulling: set[str] = set()

    def format_state(self) -> Term:
        return {
            Atom("pulling"): sorted(self._pulling),
            Atom("failed"): sorted(self._failed),
            Atom("door_open"): self._desk.is_open,
        }

    async def init(self, me: Process) -> None:
        loop = asyncio.get_running_loop()

        def in_use() -> set[str]:
            """In a thread that fetches; where nobody can say, everything counts as used."""
            asked = asyncio.run_coroutine_threadsafe(self._running(), loop)
            return asked.result(2 * IN_USE_S)

        self.store.in_use = in_use

    async def terminate(self, reason: Term) -> None:
        self._desk.close()

    async def handle_call(self, request: Term, from_: Term) -> Term:
        store = self.store
        try:
            match request:
                case "list":
                    under_way = {now.model: now for now in store.fetches()}
                    return [
                        _entry_term(e, under_way.get(e.id))
                        for e in await asyncio.to_thread(store.list)
                    ]
                case "fetches":
                    return [
                        {Atom("model"): now.model, **_progress_term(now)} for now in store.fetches()
                    ]
                case ("locate", ref):
                    return self._answer(
                        from_, lambda: asyncio.to_thread(self._locate, text_of(ref))
                    )
                case ("pull", ref):
                    found = store.resolve_anywhere(text_of(ref))
                    self._fetch(found, None, lambda note: self._from_anywhere(found, note))
                    return _OK
                case ("ensure", ref):
                    found = store.resolve(text_of(ref))
                    self._fetch(found, from_, lambda note: store.ensure(found, note))
                    return NOREPLY
                case ("ensure", ref, dict(options)):
                    found = store.resolve_anywhere(text_of(ref))
                    names, part = _options(found.id, options)
                    self._fetch(
                        found, from_, lambda note: self._from_peers(found, part, names, note)
                    )
                    return NOREPLY
                case ("progress", ref):
                    return self._progress(store.resolve_anywhere(text_of(ref)))
                case ("remove", ref):
                    removed = await asyncio.to_thread(store.remove, text_of(ref))
                    return _OK if removed else _error("not_found", "it is not in the store")
                case ("offer", ref, int(count)):
                    found = store.resolve(text_of(ref))
                    return self._answer(from_, lambda: self._desk.offer(found, count))
                case ("digests", ref, file_name, int(first), int(count)):
                    found, file = store.resolve(text_of(ref)), text_of(file_name)
                    return self._answer(
                        from_, lambda: self._desk.digests(found, file, first, count)
                    )
                case _:
                    return await super().handle_call(request, from_)
        except ControlError as exc:
            return _error(exc.kind, str(exc))

    # -- fetching --------------------------------------------------------------------------

    async def _from_peers(
        self, ref: ModelRef, part: Part, names: Sequence[str], note: OnProgress
    ) -> Path:
        others = [name for name in names if name != self.me.node.name]
        if not others and self.store.path_of(ref) is None:
            raise DownloadFailed(ref.id, "no other node was named that has it", "Name one")
        copies: list[PartCopy] = []

        def started(copy: PartCopy) -> None:
            copies.append(copy)
            self._desk.grows(copy)

        try:
            return await self.store.ensure_from(
                ref,
                part,
                others,
                NodePeers(self.me.node, ref.id),
                begin=zlib.crc32(self.me.node.name.encode()) / 2**32,
                started=started,
                on_progress=note,
            )
        finally:
            for copy in copies:
                self._desk.rests(copy)

    async def _from_anywhere(self, ref: ModelRef, note: OnProgress) -> Path:
        """From the nodes that have all of it, those that keep files for others first."""
        if self.store.path_of(ref) is None:
            found = await who_has(self.me.node, ref.id, await self._others())
            whole = [name for name, id_, is_whole in found if is_whole]
            if whole:
                if not ref.sources:  # a path of theirs: under the name they have for it
                    ref = ModelRef(next(id_ for _, id_, is_whole in found if is_whole), ())
                try:
                    return await self._from_peers(ref, WHOLE, whole, note)
                except DownloadFailed as exc:
                    if not ref.sources:
                        raise
                    log.warning("%s; it is fetched from outside", exc)
            elif not ref.sources:
                raise NotAModel(ref.id, "neither this machine nor another has such a file")
        return await self.store.ensure(ref, note)

    async def _others(self) -> list[str]:
        """Nodes that are up, those with the role of storage first."""
        connected = [str(name) for name in self.me.node.nodes()]
        try:
            rows = await gen_server.node_call(
                self.me.node, Atom("membership"), Atom("nodes"), timeout_s=IN_USE_S
            )
        except gen_server.CallError:
            return connected
        keepers = {
            str(row["name"])
            for row in rows
            if "storage" in row["roles"] and "coordinator" not in row["roles"]
        }
        return sorted(connected, key=lambda name: (name not in keepers, name))

    async def _running(self) -> set[str]:
        """Models of all instances."""
        rows = await gen_server.node_call(
            self.me.node, Atom("scheduler"), Atom("instances"), timeout_s=IN_USE_S
        )
        return {text_of(row["model"]) for _, row in rows}

    def _fetch(self, ref: ModelRef, from_: Any, fetch: Fetch) -> None:
        self._pulling.add(ref.id)

        async def run(me: Process) -> None:
            was_here, source = self.store.is_local(ref), ""

            def tell(state: str) -> None:
                data: dict[Any, Term] = {Atom("id"): ref.id, Atom("state"): Atom(state)}
                events.publish(me, "model", {**data, Atom("source"): source})

            def note(progress: Progress) -> None:
                nonlocal source
                if progress.source and progress.source != source:
                    source = progress.source
                    tell("pulling")

            try:
                path = await self._unbroken(fetch(note))
            except ControlError as exc:
                log.warning("%s", exc)
                self._failed[ref.id] = exc
                answer: Term = _error(exc.kind, str(exc))
                tell("failed")
            else:
                self._failed.pop(ref.id, None)
                answer = (_OK, str(path))
                if not was_here:
                    tell("local" if self.store.is_local(ref) else "partial")
            self._pulling.discard(ref.id)
            if from_ is not None:
                gen_server.reply(me, from_, answer)

        self.me.spawn(run, link=True, label=f"pull {ref.id}")

    # -- answers ---------------------------------------------------------------------------

    def _own_hosts(self) -> Sequence[str]:
        address = self.me.node.address
        return (address[0],) if address else ()

    def _answer(self, from_: Term, work: Callable[[], Awaitable[Term]]) -> Any:
        """Reply with what ``work`` returns, from a process of its own."""

        async def run(me: Process) -> None:
            try:
                answer = await self._unbroken(work())
            except ControlError as exc:
                answer = _error(exc.kind, str(exc))
            gen_server.reply(me, from_, answer)

        self.me.spawn(run, link=True, label="shares files")
        return NOREPLY

    async def _unbroken(self, work: Awaitable[T]) -> T:
        """What ``work`` gives, its own faults as errors: ranks that run must not end by them."""
        try:
            return await work
        except ControlError:
            raise
        except Exception as exc:
            log.exception("a job of the model store failed")
            raise StoreUnusable(str(self.store.shelf.root), f"{type(exc).__name__}: {exc}") from exc

    def _locate(self, name: str) -> Term:
        place = self.store.locate(self.store.resolve_anywhere(name))
        return (
            _OK,
            {
                Atom("id"): place.id,
                Atom("path"): Atom("undefined") if place.path is None else str(place.path),
                Atom("whole"): place.whole,
                Atom("size_bytes"): place.size_bytes,
                Atom("here_bytes"): place.here_bytes,
            },
        )

    def _progress(self, ref: ModelRef) -> Term:
        progress = self.store.progress(ref)
        if progress is None:
            if self.store.is_local(ref):
                size_bytes = self.store.locate(ref).size_bytes
                progress = Progress(
                    model=ref.id, phase="done", done_bytes=size_bytes, total_bytes=size_bytes
                )
            elif ref.id in self._pulling:
                progress = Progress(model=ref.id, phase="waiting")
            elif ref.id in self._failed:
                exc = self._failed[ref.id]
                return _error(exc.kind, str(exc))
            else:
                return _error("not_pulling", f"{ref.id} is not being fetched")
        return (Atom("ok"), _progress_term(progress))


def _progress_term(progress: Progress) -> dict[Any, Term]:
    return {
        Atom("phase"): Atom(progress.phase),
        Atom("source"): progress.source,
        Atom("done_bytes"): progress.done_bytes,
        Atom("total_bytes"): progress.total_bytes,
    }


def _entry_term(entry: Entry, progress: Progress | None) -> Term:
    far: dict[Any, Term] = {}
    if progress is not None:
        far = {Atom("done_bytes"): progress.done_bytes, Atom("total_bytes"): progress.total_bytes}
    return {
        Atom("id"): entry.id,
        Atom("name"): entry.name,
        Atom("family"): entry.family,
        Atom("state"): Atom(entry.state),
        Atom("size_bytes"): entry.size_bytes,
        Atom("context_tokens"): entry.context_tokens,
        Atom("aliases"): list(entry.aliases),
        **far,
    }


def _options(model: str, options: dict[Any, Term]) -> tuple[list[str], Part]:
    """``from`` and ``part``. Raises NotAModel for what is not understood."""
    names = options.get(Atom("from"))
    unknown = sorted(str(key) for key in options if key not in ("from", "part"))
    if unknown or not isinstance(names, list) or not names:
        what = f"unknown options {', '.join(unknown)}" if unknown else "from => [Node] is missing"
        raise NotAModel(model, what)
    if not all(isinstance(name, str | bytes) for name in names):
        raise NotAModel(model, f"not nodes: {show(names, 80)}")
    try:
        part = part_of(options.get(Atom("part"), Atom("whole")))
    except ValueError as exc:
        raise NotAModel(model, str(exc)) from exc
    return [text_of(name) for name in names if isinstance(name, str | bytes)], part


def _error(kind: str, text: str) -> Term:
    return (Atom("error"), Atom(kind), text)
