"""The registered process ``discovery``: dials the nodes that its strategies see.

=================================  ===============================================================
call ``seen``                      list of maps: node, addresses, source, state, why, version
cast ``{member, Node, Addresses}`` a node of our cluster is reached there; dialled again if lost
cast ``{refused, Node, Why}``      connected, but not one of ours: not dialled for a while
=================================  ===============================================================

Every strategy runs in a process of its own, and so does every attempt: nothing here waits. Nodes
that were members once are dialled until they are back or forgotten, whatever strategies say.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bridge.gen_server import GenServer, Stop
from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom, Term
from bridge.text import text_of
from control.discovery.addresses import Interface, fastest_first
from control.discovery.candidates import REFUSED_RETRY_S, Address, Candidate, retry_s
from control.discovery.strategy import Strategy

_log: Final = logging.getLogger("control.discovery")

TICK_S: Final = 0.25
CONNECT_S: Final = 8.0  # longer than an attempt of the node takes: one is over before the next
POLITE_S: Final = 0.5
FORGET_S: Final = 86400.0
LOOK_AGAIN_S: Final = 5.0  # after a strategy failed


@dataclass(slots=True)
class _Target:
    """A node to be dialled."""

    candidate: Candidate
    seen_s: float
    num_failed: int = 0
    next_s: float = 0.0
    dialling: bool = False
    why: str = ""
    refused_until_s: float = 0.0


class Discovery(GenServer):
    """Keeps whom the strategies see, and connects to those that may be joined.

    Args:
        strategies: what to look with; none: this node stays alone unless others come.
        interfaces: reads the machine's addresses, to choose the fastest way.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        *,
        interfaces: Callable[[], Sequence[Interface]],
        rng: random.Random | None = None,
    ) -> None:
        super().__init__()
        self._strategies, self._interfaces = tuple(strategies), interfaces
        self._rng = rng or random.Random()
        self._found: dict[str, Sequence[Candidate]] = {}
        self._targets: dict[str, _Target] = {}
        self._named: set[tuple[str, str]] = set()

    def format_state(self) -> Term:
        return {
            Atom("strategies"): [one.name.encode() for one in self._strategies],
            Atom("seen"): self._seen(),
        }

    async def init(self, me: Process) -> None:
        me.trap_exit = True
        for strategy in self._strategies:
            me.spawn(self._looker(strategy), link=True, label=f"discovery {strategy.name}")
        if self._strategies:
            me.send_after(TICK_S, me.pid, (Atom("tick"),))

    async def terminate(self, reason: Term) -> None:
        await asyncio.gather(*(one.stop() for one in self._strategies))

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case "seen":
                return self._seen()
            case _:
                return await super().handle_call(request, from_)

    async def handle_cast(self, message: Term) -> None:
        match message:
            case ("member", str(node), [*addresses]) if self._strategies:
                ways = tuple(Address(text_of(host), int(port)) for host, port in addresses)
                self._see(Candidate(node=str(node), addresses=ways, source="member"))
            case ("member", _, _):
                pass  # alone by configuration: whoever came will come again
            case ("refused", str(node), why):
                target = self._targets.get(node)
                if target is not None:
                    target.why = text_of(why)
                    target.refused_until_s = self._now_s() + REFUSED_RETRY_S
            case _:
                await super().handle_cast(message)

    async def handle_info(self, message: Term) -> None:
        match message:
            case ("tick",):
                self.me.send_after(TICK_S, self.me.pid, message)
                self._dial_due()
            case ("looked", str(name)):
                for candidate in self._found.get(name, ()):
                    self._see(candidate)
                self._dial_due()
            case ("dialled", str(node), bool(ok), why):
                self._dialled(str(node), ok, text_of(why))
            case ("EXIT", _, "normal"):
                pass  # an attempt that has ended and told so
            case ("EXIT", _, reason):
                raise Stop((Atom("discovery_failed"), reason))
            case _:
                await super().handle_info(message)

    # -- looking ---------------------------------------------------------------------------

    def _looker(self, strategy: Strategy) -> Callable[[Process], Any]:
        async def look_again_and_again(me: Process) -> None:
            assert me.parent is not None
            while True:
                pause_s = strategy.period_s
                try:
                    self._found[strategy.name] = await strategy.look()
                except OSError as exc:
                    _log.warning("discovery by %s: %s; tried again", strategy.name, exc)
                    pause_s = LOOK_AGAIN_S
                me.send(me.parent, (Atom("looked"), Atom(strategy.name)))
                try:
                    await me.receive(timeout_s=pause_s)
                except ReceiveTimeout:
                    continue

        return look_again_and_again

    def _see(self, candidate: Candidate) -> None:
        if candidate.refused:
            if (candidate.node, candidate.refused) not in self._named:
                self._named.add((candidate.node, candidate.refused))
                _log.warning("%s is seen and not joined: %s", candidate.node, candidate.refused)
            return
        if candidate.node == self.me.node.name:
            return
        now_s = self._now_s()
        target = self._targets.get(candidate.node)
        if target is None:
            target = self._targets[candidate.node] = _Target(candidate, now_s)
            if candidate.node < self.me.node.name:  # that it dials us is likely: do not collide
                target.next_s = now_s + POLITE_S
            _log.info(
                "found %s by %s at %s",
                candidate.node,
                candidate.source,
                ", ".join(map(str, candidate.addresses)),
            )
        elif candidate.addresses and candidate.addresses != target.candidate.addresses:
            fresher = candidate.source != "member" or target.candidate.source == "member"
            if fresher:  # a new life of it, or other links
                target.candidate, target.num_failed, target.next_s = candidate, 0, 0.0
        target.seen_s = now_s

    # -- dialling --------------------------------------------------------------------------

    def _dial_due(self) -> None:
        now_s = self._now_s()
        there = set(self.me.node.nodes())
        for node, target in list(self._targets.items()):
            if node in there:
                target.seen_s, target.num_failed = now_s, 0
                target.next_s = now_s + retry_s(0, self._rng.random())
            elif now_s - target.seen_s > FORGET_S:
                del self._targets[node]
            elif (
                not target.dialling
                and target.candidate.addresses
                and now_s >= max(target.next_s, target.refused_until_s)
            ):
                target.dialling = True
                ways = fastest_first(self._interfaces(), target.candidate.addresses)
                way = ways[target.num_failed % len(ways)]  # a dead one must not hide the next
                self.me.spawn(_dialler(node, way), link=True, label=f"dial {node}")

    def _dialled(self, node: str, ok: bool, why: str) -> None:
        target = self._targets.get(node)
        if target is None:
            return
        target.dialling = False
        if ok:
            target.num_failed, target.why = 0, ""
        else:
            target.num_failed += 1
            target.why = why
            if target.num_failed == 1:
                _log.info("%s cannot be reached yet: %s", node, why)
        target.next_s = self._now_s() + retry_s(target.num_failed, self._rng.random())

    # -- telling ---------------------------------------------------------------------------

    def _seen(self) -> Term:
        there, now_s = set(self.me.node.nodes()), self._now_s()
        rows: dict[str, dict[Any, Term]] = {}
        for node, target in self._targets.items():
            state = "joined" if node in there else "trying"
            if now_s < target.refused_until_s:
                state = "refused"
            rows[node] = _row(target.candidate, state, target.why if state != "joined" else "")
        for candidates in self._found.values():
            for candidate in candidates:
                if candidate.refused and candidate.node not in rows:
                    rows[candidate.node] = _row(candidate, "refused", candidate.refused)
        return [rows[node] for node in sorted(rows)]

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _row(candidate: Candidate, state: str, why: str) -> dict[Any, Term]:
    return {
        Atom("node"): candidate.node,
        Atom("addresses"): [str(address) for address in candidate.addresses],
        Atom("source"): candidate.source,
        Atom("state"): Atom(state),
        Atom("why"): why,
        Atom("version"): candidate.version,
    }


def _dialler(node: str, way: Address) -> Callable[[Process], Any]:
    async def dial(me: Process) -> None:
        assert me.parent is not None
        ok = await me.node.connect(node, address=(way.host, way.port), timeout_s=CONNECT_S)
        why = "" if ok else f"no link at {way}"
        me.send(me.parent, (Atom("dialled"), Atom(node), ok, why))

    return dial
