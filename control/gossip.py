"""What happened in the cluster, on every node, without holes. Pure.

Every event has an origin (the node it happened on), the incarnation of that node's book, and
a number that grows by one. The origin sends each event once to every node that is up. Whoever
finds a hole (a number too high, or a digest that knows more) asks for what is missing, of any
node that has it. Each book keeps the last events of each origin; what is older is gone, and a hole
that nobody can fill any more is skipped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from bridge.term import Atom, Term
from bridge.text import text_of

MAX_KEPT: Final = 200  # events of one origin
MAX_ORIGINS: Final = 1024
MAX_AHEAD: Final = 200  # events of one origin that wait for a hole to be filled


class Event(NamedTuple):
    """Attributes: ``at_s``: seconds since 1970, by the origin's clock."""

    origin: str
    incarnation: int
    number: int
    at_s: float
    kind: str
    data: dict[Any, Term]


class Want(NamedTuple):
    """Events ``first`` to ``last`` (included) of an origin that are missing."""

    origin: str
    incarnation: int
    first: int
    last: int


class Given(NamedTuple):
    """Answer to a Want: what there still is; nothing below ``oldest`` will ever come."""

    origin: str
    incarnation: int
    oldest: int
    events: tuple[Event, ...]


Digest = dict[str, tuple[int, int]]  # origin -> incarnation, highest number without a hole


@dataclass(slots=True)
class _Page:
    """One origin: all events up to ``number`` were seen; ``ahead`` came too early."""

    incarnation: int
    number: int = 0
    kept: deque[Event] = field(default_factory=lambda: deque(maxlen=MAX_KEPT))
    ahead: dict[int, Event] = field(default_factory=dict)


class Book:
    """The events that one node knows.

    Args:
        node: whose book this is.
        incarnation: larger at each start of the node.
    """

    def __init__(self, node: str, incarnation: int) -> None:
        self.node = node
        self._pages: dict[str, _Page] = {node: _Page(incarnation)}

    def write(self, kind: str, data: dict[Any, Term], at_s: float) -> Event:
        """An event of our own: to be told to everybody."""
        page = self._pages[self.node]
        page.number += 1
        event = Event(self.node, page.incarnation, page.number, at_s, kind, data)
        page.kept.append(event)
        return event

    def take(self, event: Event) -> tuple[list[Event], Want | None]:
        """An event that was told: what is news now, in order, and what is missing before it."""
        page = self._page_for(event.origin, event.incarnation)
        if page is None or event.number <= page.number:
            return [], None
        page.ahead[event.number] = event
        news = self._advance(page)
        if not page.ahead:
            return news, None
        while len(page.ahead) > MAX_AHEAD:  # a hole that is not filled must not hoard
            page.number = min(page.ahead) - 1
            news += self._advance(page)
        if not page.ahead:
            return news, None
        first, last = page.number + 1, min(page.ahead) - 1
        return news, Want(event.origin, page.incarnation, first, last)

    def take_given(self, given: Given) -> list[Event]:
        """The answer to a Want: what is news now, in order."""
        page = self._page_for(given.origin, given.incarnation)
        if page is None:
            return []
        page.number = max(page.number, given.oldest - 1)
        for event in given.events:
            if event.number > page.number:
                page.ahead[event.number] = event
        return self._advance(page)

    def digest(self) -> Digest:
        """How far this book goes."""
        return {origin: (page.incarnation, page.number) for origin, page in self._pages.items()}

    def lacks(self, digest: Digest) -> list[Want]:
        """What the owner of ``digest`` has and this book has not."""
        wants = []
        for origin, (incarnation, number) in digest.items():
            page = self._page_for(origin, incarnation)
            if page is not None and number > page.number:
                wants.append(Want(origin, incarnation, page.number + 1, number))
        return wants

    def give(self, want: Want) -> Given | None:
        """What there is of it; None where nothing is known of that origin's incarnation."""
        page = self._pages.get(want.origin)
        if page is None or page.incarnation != want.incarnation:
            return None
        events = tuple(e for e in page.kept if want.first <= e.number <= want.last)
        oldest = page.kept[0].number if page.kept else page.number + 1
        return Given(want.origin, want.incarnation, max(oldest, want.first), events)

    def recent(self, count: int) -> list[Event]:
        """The last events of all origins by their time."""
        known = [event for page in self._pages.values() for event in page.kept]
        return sorted(known, key=lambda e: (e.at_s, e.origin, e.number))[-count:]

    def _page_for(self, origin: str, incarnation: int) -> _Page | None:
        """The page to write to; None for what is ours or of an older life."""
        if origin == self.node:
            return None
        page = self._pages.get(origin)
        if page is not None and page.incarnation >= incarnation:
            return page if page.incarnation == incarnation else None
        if page is None and len(self._pages) >= MAX_ORIGINS:
            self._drop_oldest()
        page = self._pages[origin] = _Page(incarnation)
        return page

    def _advance(self, page: _Page) -> list[Event]:
        news = []
        for number in [n for n in page.ahead if n <= page.number]:
            del page.ahead[number]
        while (event := page.ahead.pop(page.number + 1, None)) is not None:
            page.number += 1
            page.kept.append(event)
            news.append(event)
        return news

    def _drop_oldest(self) -> None:
        def last_s(origin: str) -> float:
            kept = self._pages[origin].kept
            return kept[-1].at_s if kept else 0.0

        others = (origin for origin in self._pages if origin != self.node)
        del self._pages[min(others, key=last_s)]


# -- as terms ------------------------------------------------------------------------------


def event_term(event: Event) -> Term:
    """``event`` as a term; ``event_of`` reads it."""
    return (
        Atom(event.origin),
        event.incarnation,
        event.number,
        event.at_s,
        Atom(event.kind),
        event.data,
    )


def event_of(term: Any) -> Event:
    """Read ``event_term``'s answer. Raises ValueError."""
    match term:
        case (str(origin), int(incarnation), int(number), float(at_s), kind, dict(data)):
            return Event(str(origin), incarnation, number, at_s, text_of(kind), data)
    raise ValueError(f"not an event: {term!r}")


def events_of(terms: Iterable[Any]) -> tuple[Event, ...]:
    """Several of them. Raises ValueError."""
    return tuple(map(event_of, terms))


def digest_of(term: Any) -> Digest:
    """Read a digest that came as a map. Raises ValueError."""
    try:
        return {str(origin): (int(i), int(n)) for origin, (i, n) in term.items()}
    except (AttributeError, TypeError, ValueError) as exc:
        raise ValueError(f"not a digest: {term!r}") from exc
