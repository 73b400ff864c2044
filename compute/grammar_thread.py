"""The thread that compiles the grammars of requests, so that neither streams nor beats wait."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from compute.grammar import Grammars
from compute.worker import Submit


class GrammarThread:
    """Gives requests their matchers, one after the other.

    Args:
        make: the grammars of the loaded model; called at the first request that has a constraint,
            on this thread, since it takes a second.
    """

    def __init__(self, make: Callable[[], Grammars]) -> None:
        self._make = make
        self._grammars: Grammars | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def compile(self, request: Submit) -> Future[Submit]:
        """The request with its matcher. Fails with BadConstraint or GrammarFailed."""
        return self._pool.submit(self._compiled, request)

    def close(self) -> None:
        """Forget what waits; what runs runs to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, request: Submit) -> Submit:
        if request.constraint is None:
            return request
        if self._grammars is None:
            self._grammars = self._make()
        matcher = self._grammars.matcher(request.constraint, request.generated_ids)
        return replace(request, matcher=matcher)
