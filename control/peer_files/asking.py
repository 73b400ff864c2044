"""Asks peers' ``model_store`` over the distribution link, for the threads that fetch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Coroutine, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from concurrent.futures import Future
from typing import Any, Final

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Term
from bridge.text import text_of
from control.discovery.addresses import fastest_first, read_interfaces
from control.discovery.candidates import Address
from control.errors import DownloadFailed
from control.peer_files.board import Run
from control.peer_files.chunks import DIGEST_BYTES
from control.peer_files.offer import Offer, offer_of

NAME: Final = "model_store"
OFFER_S: Final = 60.0  # headers of a model that nobody has opened yet
DIGEST_S: Final = 60.0
LOCATE_S: Final = 2.0
LOOK_S: Final = 5.0
MAX_ASKED: Final = 8
SLACK_S: Final = 5.0
TOKENS: Final = 2


class NodePeers:
    """``source.Peers`` of one model."""

    def __init__(self, node: Node, ref: str) -> None:
        """On the event loop. ``ref``: how peers know the model."""
        self._node, self._ref = node, ref
        self._loop = asyncio.get_running_loop()

    def offer(self, peer: str) -> Offer:
        """See ``Peers``; doors come best first."""
        answer = self._wait(self._call(peer, (Atom("offer"), self._ref, TOKENS), OFFER_S), OFFER_S)
        try:
            offer = offer_of(answer)
        except ValueError as exc:
            raise DownloadFailed(self._ref, f"{peer} answers with {exc}") from exc
        doors = fastest_first(read_interfaces(), (Address(h, p) for h, p in offer.doors))
        return Offer(
            id=offer.id,
            main=offer.main,
            files=offer.files,
            fingerprint=offer.fingerprint,
            header=offer.header,
            have=offer.have,
            doors=tuple((door.host, door.port) for door in doors),
            tokens=offer.tokens,
        )

    def look(self, peer: str) -> Offer:
        """See ``Peers``."""
        answer = self._wait(self._call(peer, (Atom("offer"), self._ref, 0), LOOK_S), LOOK_S)
        try:
            return offer_of(answer)
        except ValueError as exc:
            raise DownloadFailed(self._ref, f"{peer} answers with {exc}") from exc

    def fellows(self, known: Collection[str]) -> Sequence[str]:
        """See ``Peers``; a few nodes are asked, others each time."""
        here = {str(self._node.name), *known}
        others = [str(name) for name in self._node.nodes() if str(name) not in here]
        some = random.sample(others, min(MAX_ASKED, len(others)))
        try:
            found = self._wait(who_has(self._node, self._ref, some), LOCATE_S)
        except DownloadFailed:
            return []
        return [name for name, _, _ in found]

    def digests(self, peers: Sequence[str], run: Run) -> Future[bytes]:
        """See ``Peers``."""
        return self._run(self._digests(peers, run))

    async def _digests(self, peers: Sequence[str], run: Run) -> bytes:
        request: Term = (Atom("digests"), self._ref, run.name, run.first, run.count)
        why = "no peer has it"
        for peer in peers:
            try:
                answer = await self._call(peer, request, DIGEST_S)
            except DownloadFailed as exc:
                why = exc.why
                continue
            if isinstance(answer, bytes) and len(answer) == run.count * DIGEST_BYTES:
                return answer
            why = f"{peer} gives no digests"
        raise DownloadFailed(self._ref, why)

    async def _call(self, peer: str, request: Term, timeout_s: float) -> Term:
        try:
            answer = await gen_server.node_call(
                self._node, (NAME, peer), request, timeout_s=timeout_s
            )
        except gen_server.CallError as exc:
            raise DownloadFailed(self._ref, f"{peer} does not answer: {exc}") from exc
        match answer:
            case ("ok", found):
                return found
            case ("error", _, text):
                raise DownloadFailed(self._ref, text_of(text))
            case _:
                raise DownloadFailed(self._ref, f"{peer} does not know how to share files")

    def _wait(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """Its result, in a thread. Raises DownloadFailed, its own included."""
        try:
            return self._run(work).result(timeout_s + SLACK_S)
        except (TimeoutError, FutureCancelled) as exc:
            raise DownloadFailed(self._ref, "this node is stopping, or far too busy") from exc

    def _run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as exc:  # the loop was closed
            work.close()
            raise DownloadFailed(self._ref, "this node is stopping") from exc


async def who_has(node: Node, ref: str, names: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Which of ``names`` have something of a model, its id there, and whether all of it is.

    In the order of ``names``.
    """

    async def ask(name: str) -> tuple[str, str, bool] | None:
        try:
            answer = await gen_server.node_call(
                node, (NAME, name), (Atom("locate"), ref), timeout_s=LOCATE_S
            )
        except gen_server.CallError:
            return None
        match answer:
            case ("ok", {"id": bytes() | str() as id_, "whole": bool(whole), "path": path}) if (
                path != "undefined"
            ):
                return name, text_of(id_), whole
            case _:
                return None

    found = await asyncio.gather(*(ask(name) for name in names))
    return [one for one in found if one is not None]
