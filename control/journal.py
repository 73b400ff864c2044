"""Every request in flight at this node: prompt, tokens so far, and who serves it now.

The entry lives where the client is connected, so it survives the rank, the machine and
the leader that serve it: whoever serves next is given prompt plus tokens so far. It is
kept in memory only, since a client's connection does not outlive this process either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from control.backend import GenerateRequest, TokenEvent

MAX_ATTEMPTS_WITHOUT_TOKEN = 4  # a request that kills every rank it meets ends here


@dataclass(slots=True)
class Entry:
    """One request in flight."""

    request: GenerateRequest
    tokens: list[int] = field(default_factory=list)
    attempts: int = 0  # submissions so far
    attempts_without_token: int = 0

    def begin_attempt(self) -> bool:
        """Count one more submission; False when the request has used up its chances."""
        if self.attempts_without_token >= MAX_ATTEMPTS_WITHOUT_TOKEN:
            return False
        self.attempts += 1
        return True

    def suspect(self) -> None:
        """A rank is about to run the request: if it dies now, the request may be why.

        One that waits for a server or in its queue is never to blame.
        """
        self.attempts_without_token += 1

    def accept(self, event: TokenEvent) -> bool:
        """Record a token; False for one that is known already (the index makes it idempotent).

        Raises:
            LostToken: tokens are missing between the last one and this one.
        """
        if event.index < len(self.tokens):
            return False
        if event.index > len(self.tokens):
            raise LostToken(len(self.tokens), event.index)
        self.tokens.append(event.token_id)
        self.attempts_without_token = 0
        return True


class LostToken(Exception):
    """A token arrived before its predecessor: the submission must be made again."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found

    def __str__(self) -> str:
        return f"token {self.found} arrived where token {self.expected} was due"


class Journal:
    """The table of entries."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._next_id = 0

    def open(self, request: GenerateRequest) -> tuple[int, Entry]:
        """Write a new entry; ``close`` must be called with the id given back."""
        self._next_id += 1
        entry = Entry(request)
        self._entries[self._next_id] = entry
        return self._next_id, entry

    def close(self, entry_id: int) -> None:
        self._entries.pop(entry_id, None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)
