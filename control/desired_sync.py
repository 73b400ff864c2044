"""How the desired state is kept the same on every node: pure, one small document.

The document has a stamp ``(epoch, version)``; the newer wins. Only the leader writes. Every node
keeps the document on disk before it says that it has; with a quorum of them (``quorum``) a write
is *committed* and outlives every minority. A new leader first asks: with the answers of a quorum,
none of which obeys an older leader any more (``fence``), the newest document among them holds all
that was committed. It states that one again under its own epoch, and is *ready* to write when a
quorum has it. A node that was away gets the document when it comes back: whole, so a gap of any
size is repaired by one message. Where nothing changes and nobody comes, nothing is sent.

What a leader says (``Read``, ``Put``) is to be taken from whom the node's own election follows, in
that epoch, alone; other such messages are dropped, and come again if they matter.

Source: Lamport 2001, Paxos made simple (one register instead of a log).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from bridge.term import Atom, Term
from control.quorum import Roster, has_quorum

Stamp = tuple[int, int]


class Document(NamedTuple):
    """``body`` is a term: what should run. The first document of all is empty."""

    stamp: Stamp = (0, 0)
    body: Term = ()


class Disk(NamedTuple):
    """What must be on disk: the document, and below which epoch this node obeys nobody."""

    fence: int = 0
    document: Document = Document()


# -- messages ------------------------------------------------------------------------------


class Read(NamedTuple):
    """I lead ``epoch``: which document have you?"""

    epoch: int


class Have(NamedTuple):
    """This one."""

    epoch: int
    document: Document


class Put(NamedTuple):
    """Keep this one."""

    epoch: int
    document: Document


class Stored(NamedTuple):
    """It is on my disk."""

    epoch: int
    stamp: Stamp


class Refused(NamedTuple):
    """I obey nobody below ``fence``."""

    epoch: int
    fence: int


Message = Read | Have | Put | Stored | Refused

# -- events and actions --------------------------------------------------------------------


class Heard(NamedTuple):
    """``sender`` says something."""

    sender: str
    message: Message


class Leads(NamedTuple):
    """This node has authority for ``epoch`` under ``roster``; again when the roster changes."""

    epoch: int
    roster: Roster


class Follows(NamedTuple):
    """This node leads no more."""


class NodeUp(NamedTuple):
    """Another node is there."""

    node: str


class NodeDown(NamedTuple):
    """Another node is gone."""

    node: str


class Tick(NamedTuple):
    """Time to send again what was not answered: about once a second."""


class Write(NamedTuple):
    """As the leader, which is ready: the document with the stamp ``base`` shall become ``body``.

    ``ref`` names the wish. It fails where another write came first: make it again from that one.
    """

    base: Stamp
    body: Term
    ref: Term


Event = Heard | Leads | Follows | NodeUp | NodeDown | Tick | Write


class Send(NamedTuple):
    """Give ``message`` to these nodes."""

    to: tuple[str, ...]
    message: Message


class Save(NamedTuple):
    """Have this on disk before anything that follows is done."""

    disk: Disk


class Adopted(NamedTuple):
    """This node's document is another now."""

    document: Document


class Ready(NamedTuple):
    """This leader knows what was committed before its epoch; it may write.

    Placing needs authority besides: a leader that was stopped for long may learn this too late.
    """

    document: Document


class Committed(NamedTuple):
    """The write ``ref`` outlives every minority."""

    document: Document
    ref: Term


class Safe(NamedTuple):
    """A quorum of the roster with this stamp has the document."""

    roster_stamp: Stamp


class Failed(NamedTuple):
    """The write ``ref`` came second, or this node leads no more: it may have happened or not."""

    ref: Term


Action = Send | Save | Adopted | Ready | Committed | Safe | Failed


@dataclass(frozen=True, slots=True)
class Leading:
    """A leader's part.

    Attributes:
        answers: while it asks, the documents it was told, by node.
        acks: nodes that have the document as it is now.
        ref: of the write under way; ``busy`` while there is one.
        waiting: writes to come.
    """

    epoch: int
    roster: Roster
    ready: bool = False
    answers: Mapping[str, Document] | None = None
    acks: frozenset[str] = frozenset()
    busy: bool = False
    ref: Term = None
    waiting: tuple[Write, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """What one node knows: its disk, who is up, and its part if it leads."""

    node: str
    disk: Disk = field(default_factory=Disk)
    up: frozenset[str] = frozenset()
    leading: Leading | None = None
    told_safe: Stamp = field(default=(-1, -1))


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """What ``event`` makes of ``state``, and what to do. No clock is needed."""
    turn = _Turn(state)
    turn.take(event)
    return turn.finish()


class _Turn:
    def __init__(self, state: State) -> None:
        self.node, self.disk, self.up = state.node, state.disk, state.up
        self.told_safe = state.told_safe
        self.actions: list[Action] = []
        part = state.leading
        self.epoch = part.epoch if part else 0
        if part:
            self.roster, self.ready, self.answers = part.roster, part.ready, part.answers
            self.acks, self.busy, self.ref = part.acks, part.busy, part.ref
            self.waiting = deque(part.waiting)

    def finish(self) -> tuple[State, tuple[Action, ...]]:
        part = None
        if self.epoch:
            part = Leading(
                self.epoch,
                self.roster,
                self.ready,
                self.answers,
                self.acks,
                self.busy,
                self.ref,
                tuple(self.waiting),
            )
        return State(self.node, self.disk, self.up, part, self.told_safe), tuple(self.actions)

    def take(self, event: Event) -> None:
        match event:
            case Heard(sender, message):
                _HANDLERS[type(message)](self, sender, message)
            case Leads(epoch, roster):
                self.leads(epoch, roster)
            case Follows():
                self.follows()
            case NodeUp(node):
                self.up |= {node}
                if self.epoch:
                    self.send_again((node,))
            case NodeDown(node):
                self.up -= {node}
                if self.epoch:
                    self.acks -= {node}
            case Tick():
                if self.epoch:
                    self.send_again(self.up)
            case Write():
                self.write(event)

    def send(self, to: Iterable[str], message: Message) -> None:
        nodes = tuple(to)
        if nodes:
            self.actions.append(Send(nodes, message))

    def save(self, fence: int, document: Document) -> None:
        disk = Disk(fence, document)
        if disk != self.disk:
            changed = document != self.disk.document
            self.disk = disk
            self.actions.append(Save(disk))
            if changed:
                self.actions.append(Adopted(document))

    # -- as leader -------------------------------------------------------------------------

    def leads(self, epoch: int, roster: Roster) -> None:
        if epoch == self.epoch:
            self.roster = roster
            self.progress()
            return
        self.follows()
        if epoch < self.disk.fence:
            return
        self.epoch, self.roster, self.ready = epoch, roster, False
        self.acks, self.busy, self.ref, self.waiting = frozenset(), False, None, deque()
        self.save(epoch, self.disk.document)
        self.answers = {self.node: self.disk.document}
        self.send(self.up, Read(epoch))
        self.progress()

    def follows(self) -> None:
        if not self.epoch:
            return
        if self.busy:
            self.actions.append(Failed(self.ref))
        self.actions.extend(Failed(write.ref) for write in self.waiting)
        self.epoch = 0

    def send_again(self, to: Iterable[str]) -> None:
        if self.answers is not None:
            self.send((n for n in to if n not in self.answers), Read(self.epoch))
        else:
            self.send((n for n in to if n not in self.acks), Put(self.epoch, self.disk.document))

    def write(self, wish: Write) -> None:
        if not self.epoch or not self.ready:
            self.actions.append(Failed(wish.ref))
            return
        self.waiting.append(wish)
        self.progress()

    def put(self, document: Document) -> None:
        self.save(self.epoch, document)
        self.acks = frozenset((self.node,))
        self.send(self.up, Put(self.epoch, document))

    def progress(self) -> None:
        """Go on as far as quorums allow."""
        if self.answers is not None:
            if not has_quorum(self.roster, self.answers.keys()):
                return
            newest = max(self.answers.values(), key=lambda d: d.stamp)
            self.answers = None
            self.put(Document((self.epoch, newest.stamp[1]), newest.body))
        while has_quorum(self.roster, self.acks):
            document = self.disk.document
            if self.told_safe != self.roster.stamp:
                self.told_safe = self.roster.stamp
                self.actions.append(Safe(self.roster.stamp))
            if not self.ready:
                self.ready = True
                self.actions.append(Ready(document))
            if self.busy:
                self.busy = False
                self.actions.append(Committed(document, self.ref))
            if not self.waiting:
                return
            wish = self.waiting.popleft()
            if wish.base != document.stamp:
                self.actions.append(Failed(wish.ref))
                continue
            self.busy, self.ref = True, wish.ref
            self.put(Document((self.epoch, document.stamp[1] + 1), wish.body))

    def on_have(self, sender: str, m: Have) -> None:
        if m.epoch == self.epoch and self.answers is not None:
            self.answers = {**self.answers, sender: m.document}
            self.progress()

    def on_stored(self, sender: str, m: Stored) -> None:
        if self.epoch and m.epoch == self.epoch and m.stamp == self.disk.document.stamp:
            self.acks |= {sender}
            self.progress()

    def on_refused(self, sender: str, m: Refused) -> None:
        if m.epoch == self.epoch:
            self.follows()

    # -- as one of all ---------------------------------------------------------------------

    def obeys(self, sender: str, epoch: int) -> bool:
        if epoch < self.disk.fence:
            self.send((sender,), Refused(epoch, self.disk.fence))
            return False
        if self.epoch and epoch > self.epoch:
            self.follows()
        return True

    def on_read(self, sender: str, m: Read) -> None:
        if self.obeys(sender, m.epoch):
            self.save(m.epoch, self.disk.document)
            self.send((sender,), Have(m.epoch, self.disk.document))

    def on_put(self, sender: str, m: Put) -> None:
        if self.obeys(sender, m.epoch):
            newer = m.document.stamp > self.disk.document.stamp
            self.save(m.epoch, m.document if newer else self.disk.document)
            self.send((sender,), Stored(m.epoch, self.disk.document.stamp))


_HANDLERS: Final[dict[type, Callable[[_Turn, str, Any], None]]] = {
    Read: _Turn.on_read,
    Have: _Turn.on_have,
    Put: _Turn.on_put,
    Stored: _Turn.on_stored,
    Refused: _Turn.on_refused,
}

_TYPES: Final[dict[str, type[Any]]] = {cls.__name__.lower(): cls for cls in _HANDLERS}


def message_term(message: Message) -> Term:
    """``message`` as a term; ``message_of`` reads it."""
    fields = (tuple(f) if isinstance(f, Document) else f for f in message)
    return (Atom(type(message).__name__.lower()), *fields)


def message_of(term: Any) -> Message:
    """Read ``message_term``'s answer. Raises ValueError."""
    match term:
        case ("read", int(epoch)):
            return Read(epoch)
        case ("have" | "put" as kind, int(epoch), ((int(e), int(v)), body)):
            made: Message = _TYPES[kind](epoch, Document((e, v), body))
            return made
        case ("stored", int(epoch), (int(e), int(v))):
            return Stored(epoch, (e, v))
        case ("refused", int(epoch), int(fence)):
            return Refused(epoch, fence)
    raise ValueError(f"not a message about the desired state: {term!r}")
