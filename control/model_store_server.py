"""The registered process ``model_store``: the store as a gen_server.

==================  ==============================================================
call                reply
==================  ==============================================================
``list``            list of maps ``id, name, family, state, size_bytes, context_tokens, aliases``
``{pull, Ref}``     ``ok`` at once, or ``{error, Kind, Text}``
``{progress, Ref}`` ``{ok, #{phase, source, done_bytes, total_bytes}}``; ``phase`` is ``done`` for
                    a model that is here; ``{error, Kind, Text}`` of the last failure, or
                    ``not_pulling``
``{ensure, Ref}``   ``{ok, Path}`` once it is here, or ``{error, Kind, Text}``
``{remove, Ref}``   ``ok`` or ``{error, Kind, Text}``
==================  ==============================================================
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from bridge import gen_server
from bridge.gen_server import NOREPLY, GenServer
from bridge.process import Process
from bridge.term import Atom, Term
from bridge.text import text_of
from control.catalogue import Entry, ModelRef
from control.errors import ControlError
from control.model_store import ModelStore, Progress

log = logging.getLogger("control.model_store")


class ModelStoreServer(GenServer):
    """Answers at once; what takes long runs in linked processes, which end with it."""

    def __init__(self, store: ModelStore) -> None:
        super().__init__()
        self.store = store
        self._failed: dict[str, ControlError] = {}  # model id -> why its last pull failed
        self._pulling: set[str] = set()

    def format_state(self) -> Term:
        return {Atom("pulling"): sorted(self._pulling), Atom("failed"): sorted(self._failed)}

    async def handle_call(self, request: Term, from_: Term) -> Term:
        try:
            match request:
                case "list":
                    return [_entry_term(e) for e in await asyncio.to_thread(self.store.list)]
                case ("pull", ref):
                    self._pull(self.store.resolve(text_of(ref)), None)
                    return Atom("ok")
                case ("ensure", ref):
                    self._pull(self.store.resolve(text_of(ref)), from_)
                    return NOREPLY
                case ("progress", ref):
                    return self._progress(self.store.resolve(text_of(ref)))
                case ("remove", ref):
                    removed = await asyncio.to_thread(self.store.remove, text_of(ref))
                    return Atom("ok") if removed else _error("not_found", "it is not in the store")
                case _:
                    return await super().handle_call(request, from_)
        except ControlError as exc:
            return _error(exc.kind, str(exc))

    def _pull(self, ref: ModelRef, from_: Any) -> None:
        self._pulling.add(ref.id)

        async def run(me: Process) -> None:
            try:
                path = await self.store.ensure(ref)
            except ControlError as exc:
                log.warning("%s", exc)
                self._failed[ref.id] = exc
                answer: Term = _error(exc.kind, str(exc))
            else:
                self._failed.pop(ref.id, None)
                answer = (Atom("ok"), str(path))
            self._pulling.discard(ref.id)
            if from_ is not None:
                gen_server.reply(me, from_, answer)

        self.me.spawn(run, link=True, label=f"pull {ref.id}")

    def _progress(self, ref: ModelRef) -> Term:
        progress = self.store.progress(ref)
        if progress is None:
            if self.store.is_local(ref):
                size_bytes = ref.card.size_bytes if ref.card else 0
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
        return (
            Atom("ok"),
            {
                Atom("phase"): Atom(progress.phase),
                Atom("source"): progress.source,
                Atom("done_bytes"): progress.done_bytes,
                Atom("total_bytes"): progress.total_bytes,
            },
        )


def _entry_term(entry: Entry) -> Term:
    return {
        Atom("id"): entry.id,
        Atom("name"): entry.name,
        Atom("family"): entry.family,
        Atom("state"): Atom(entry.state),
        Atom("size_bytes"): entry.size_bytes,
        Atom("context_tokens"): entry.context_tokens,
        Atom("aliases"): list(entry.aliases),
    }


def _error(kind: str, text: str) -> Term:
    return (Atom("error"), Atom(kind), text)
