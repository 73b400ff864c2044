"""One handshake over an asyncio stream, with its time-out."""

from __future__ import annotations

import asyncio

from bridge.errors import HandshakeError
from bridge.handshake import SETUP_TIMEOUT_S, Acceptor, Established, Initiator


async def perform(
    machine: Initiator | Acceptor,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    timeout_s: float = SETUP_TIMEOUT_S,
) -> Established:
    """Run ``machine`` to its end. The stream stays open, also on errors: close it then.

    Raises:
        HandshakeError: refused by a side, bad bytes, the stream ended, or the time is up.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _converse(machine, reader, writer)
    except TimeoutError:
        raise HandshakeError(f"no handshake within {timeout_s} s") from None
    except ConnectionError as exc:
        raise HandshakeError(f"connection lost in the handshake: {exc}") from exc


async def _converse(
    machine: Initiator | Acceptor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Established:
    while True:
        writer.write(machine.data_to_send())
        await writer.drain()
        if machine.established is not None:
            return machine.established
        data = await reader.read(4096)
        if not data:
            raise HandshakeError("the peer closed the connection in the handshake")
        try:
            machine.receive(data)
        except HandshakeError:
            writer.write(machine.data_to_send())  # the refusal, if there is one to tell
            raise
