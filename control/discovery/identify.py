"""Who listens at an address: a whole handshake, as a hidden node without a name of its own.

It shows the name of the node there and that it has our cookie, or why not.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from bridge.errors import BridgeError, HandshakeError
from bridge.flags import HIDDEN_NODE, Flag
from bridge.handshake import Initiator, Local
from bridge.handshake_io import perform
from control.discovery.candidates import Address

TIMEOUT_S: Final = 3.0


class NotIdentified(Exception):
    """Nobody of ours is there; ``refused``: somebody is, and does not take our cookie."""

    def __init__(self, address: Address, why: str, *, refused: bool) -> None:
        super().__init__(address, why)
        self.address, self.why, self.refused = address, why, refused

    def __str__(self) -> str:
        return f"{self.address}: {self.why}"


async def identify(
    address: Address,
    *,
    host: str,
    cookie: str,
    tls: ssl.SSLContext | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str:
    """Name of the node at ``address``.

    Args:
        host: our own, for the name that we are given.
        tls: client context where the nodes speak TLS.

    Raises:
        NotIdentified: no connection, no node, or another cookie.
    """
    local = Local(host, cookie, 0, HIDDEN_NODE | Flag.NAME_ME, 4 if tls else 2)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(*address, ssl=tls)
    except TimeoutError:
        raise NotIdentified(address, f"no answer for {timeout_s:g} s", refused=False) from None
    except OSError as exc:
        raise NotIdentified(address, exc.strerror or str(exc), refused=False) from exc
    try:
        found = await perform(Initiator(local, None), reader, writer, timeout_s=timeout_s)
    except HandshakeError as exc:
        text = str(exc)
        refused = "closed" in text or "cookies" in text or "lost" in text
        why = "it has another secret (cookie), or is no node of ours" if refused else text
        raise NotIdentified(address, why, refused=refused) from exc
    except (BridgeError, OSError) as exc:
        raise NotIdentified(address, str(exc), refused=False) from exc
    finally:
        writer.close()
    return found.peer_name
