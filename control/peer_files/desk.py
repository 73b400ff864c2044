"""What this node tells other nodes of its models, and the door it opens for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from bridge.term import Atom, Term
from control.catalogue import ModelRef, Shelf
from control.errors import NotAModel, NotReady, StoreUnusable
from control.peer_files.door import Door
from control.peer_files.offer import offer_term
from control.peer_files.part_copy import PartCopy
from control.peer_files.serving import Shared, SharedPart, share

MAX_SHARED: Final = 16  # models that are kept in mind
MAX_TOKENS: Final = 8
MAX_DIGESTS: Final = 64


class Desk:
    """Answers on the event loop; threads read the files."""

    def __init__(self, shelf: Shelf, hosts: Callable[[], Sequence[str]]) -> None:
        """``hosts``: addresses of this node that peers reach."""
        self._shelf = shelf
        self._growing: dict[str, PartCopy] = {}  # what peers give us just now
        self._shared: dict[str, Shared] = {}
        self._lock = threading.Lock()
        self._door = Door(hosts)

    @property
    def is_open(self) -> bool:
        """Whether somebody may be fetching."""
        return self._door.is_open

    def close(self) -> None:
        """Cut off who fetches."""
        self._door.close()

    def grows(self, copy: PartCopy) -> None:
        """A copy is being added to, and can be passed on meanwhile. Any thread may call."""
        with self._lock:
            self._shared.pop(copy.offer.id, None)
            self._growing[copy.offer.id] = copy

    def rests(self, copy: PartCopy) -> None:
        """No longer."""
        with self._lock:
            if self._growing.get(copy.offer.id) is copy:
                del self._growing[copy.offer.id]
            self._shared.pop(copy.offer.id, None)

    async def offer(self, ref: ModelRef, num_tokens: int) -> Term:
        """``{ok, Offer}``; the door opens if tokens are wanted.

        Raises:
            NotAModel, NotReady, StoreUnusable.
        """
        shared = await asyncio.to_thread(self._look, ref)
        if num_tokens <= 0:
            return (Atom("ok"), offer_term(replace(shared.offer, id=ref.id)))
        try:
            doors, tokens = self._door.admit(shared, min(num_tokens, MAX_TOKENS))
        except OSError as exc:
            raise StoreUnusable("the file door", str(exc)) from exc
        offer = replace(shared.offer, id=ref.id, doors=doors, tokens=tokens)
        return (Atom("ok"), offer_term(offer))

    async def digests(self, ref: ModelRef, name: str, first: int, count: int) -> Term:
        """``{ok, Digests}``, 32 bytes a chunk. Raises NotAModel, NotReady."""
        if count > MAX_DIGESTS:
            raise NotAModel(ref.id, f"{count} digests at once")
        shared = self._shared.get(ref.id)
        if shared is None:
            shared = await asyncio.to_thread(self._look, ref)
        try:
            return (Atom("ok"), await asyncio.to_thread(shared.digests, name, first, count))
        except (OSError, ValueError) as exc:
            raise NotAModel(ref.id, str(exc)) from exc

    def _look(self, ref: ModelRef) -> Shared:
        path = self._shelf.path_of(ref)
        shared: Shared
        if path is not None:
            shared = share(ref.id, path, self._shelf.notes(ref.id))
        else:
            copy = self._growing.get(ref.id) or PartCopy.opened(self._shelf.parts(ref.id))
            if copy is None:
                raise NotReady(ref.id, "none of it is on this machine", kind="not_here")
            shared = SharedPart(copy)
        with self._lock:
            while len(self._shared) >= MAX_SHARED and ref.id not in self._shared:
                del self._shared[next(iter(self._shared))]
            self._shared[ref.id] = shared
        return shared
