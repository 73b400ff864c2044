"""The registered servers that every node of an Erlang cluster is expected to have."""

from __future__ import annotations

from bridge.exit_signals import is_atom
from bridge.gen_server import GenServer
from bridge.term import Atom, Term


class NetKernelServer(GenServer):
    """Registered as ``net_kernel``: answers ``net_adm:ping/1``."""

    async def handle_call(self, request: Term, from_: Term) -> Term:
        """``yes`` to ``{is_auth, Node}``: whoever can ask has passed the handshake."""
        if type(request) is tuple and len(request) == 2 and is_atom(request[0], "is_auth"):
            return Atom("yes")
        return await super().handle_call(request, from_)
