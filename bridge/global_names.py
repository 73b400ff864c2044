"""Registered as ``global_name_server``: lets peers' ``global`` finish, and keeps no names.

Peers that see a visible node want to lock and merge name tables with it, and ``global:sync/0``
waits until that is done. So every step is answered as by a node with no names and no other
nodes. The requests of ``global``'s partition guard are logged and not obeyed: who is up is
decided elsewhere.

Source: OTP ``global.erl``; the exchange with OTP 25 and 28 was measured.
"""

from __future__ import annotations

import logging
from typing import Final

from bridge import gen_server
from bridge.gen_server import GenServer
from bridge.term import Atom, Pid, Term

_log: Final = logging.getLogger("bridge.global")

_NAME: Final = Atom("global_name_server")
_VERSION: Final = 8  # OTP 25 and later


class GlobalNameServer(GenServer):
    """The peers' sides of the exchange; one entry a peer, replaced when it connects anew."""

    def __init__(self) -> None:
        self._tag_of: dict[Atom, Term] = {}
        self._next_tag = 0

    async def handle_call(self, request: Term, from_: Term) -> Term:
        """Locks and registrations: granted, since nothing here depends on them."""
        return True

    async def handle_cast(self, message: Term) -> None:
        """One step of a peer's synchronisation."""
        match message:
            case ("init_connect", (int(), his_tag, *_), Atom() as node, _):
                self._next_tag += 1
                self._tag_of[node] = his_tag
                me = self.me.node.name
                locker: Term = (Atom("locker"), Atom("no_longer_a_pid"), {}, self.me.pid)
                self._cast(node, Atom("init_connect"), (_VERSION, self._next_tag), me, locker)
                ack = (Atom("init_connect_ack"), me, his_tag, self._next_tag)
                self.me.send((_NAME, node), ack)
            case ("lock_set", Pid() as locker, _, _, _) if locker.node in self._tag_of:
                tag = self._tag_of[locker.node]
                self._cast(locker.node, Atom("lock_set"), self.me.pid, True, [], tag)
            case ("exchange", Atom() as node, _, _, _) if node in self._tag_of:
                self._cast(node, Atom("exchange"), self.me.node.name, [], [], self._tag_of[node])
            case ("resolved", Atom() as node, _, _, _, _, _) if node in self._tag_of:
                tag = self._tag_of[node]
                self._cast(node, Atom("resolved"), self.me.node.name, [], [], [], [], tag)
            case ("in_sync", Atom() as node, True):
                # It heard of us from a node it has merged with. False: not to be answered again.
                self._cast(node, Atom("in_sync"), self.me.node.name, False)

    async def handle_info(self, message: Term) -> None:
        """Note what the partition guard wants."""
        match message:
            case ("lost_connection" | "remove_connection" as what, *about):
                _log.warning("%s from a peer's partition guard is not obeyed: %r", what, about)

    def _cast(self, node: Atom, *message: Term) -> None:
        gen_server.cast(self.me, (_NAME, node), message)
