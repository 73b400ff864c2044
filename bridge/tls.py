"""TLS for distribution links: the contexts of both roles, and taking a link up to TLS.

Both sides show a certificate of the same authority, so that whoever is not of the cluster gets
no further than the TLS handshake. Host names are not compared: a certificate says "of this
cluster", and the cookie is asked for as well. Stock nodes do compare them with ours, if told so.

Source: OTP's "Using TLS for Erlang Distribution"; measured with ``inet_tls`` of OTP 25: no ALPN,
and 4-byte lengths from the first handshake message on.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bridge.errors import TlsError

# For the peer's part of a TLS farewell; a link that is given up must not linger.
CLOSE_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Paths of PEM files: the authority, the node's certificate (chain) and its private key."""

    ca: str
    certificate: str
    key: str

    def contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Contexts for accepting and for connecting.

        Raises:
            TlsError: a file is missing, unusable, or a key that others can read.
        """
        mode = mode_of(self.key)
        if sys.platform != "win32" and mode & 0o077:
            raise TlsError(
                f"{self.key}: mode {mode:04o} lets other users read the private key; "
                f"run `chmod 600 {self.key}`"
            )
        return self._context(ssl.PROTOCOL_TLS_SERVER), self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # Links live for days: a ticket to resume one would only be a way round the certificate.
        context.options |= ssl.OP_NO_TICKET
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0
        try:
            context.load_verify_locations(self.ca)
        except (OSError, ValueError) as exc:
            raise TlsError(f"{self.ca}: no certificate of an authority: {exc}") from exc
        try:
            # An empty password: a locked key is an error, not a question to the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ValueError) as exc:
            raise TlsError(
                f"{self.certificate} and {self.key}: no certificate with its unlocked key: {exc}"
            ) from exc
        return context


def mode_of(path: str) -> int:
    """The permissions of a file. Raises TlsError where it cannot be looked at."""
    try:
        return stat.S_IMODE(Path(path).stat().st_mode)
    except OSError as exc:
        raise TlsError(f"{path}: {exc.strerror}") from exc


async def accept(
    transport: asyncio.Transport, context: ssl.SSLContext, *, timeout_s: float
) -> tuple[asyncio.Transport, bytes]:
    """Do the server's part of TLS on a connection just made, whose reading is paused.

    Done here and not by ``create_server``, whose connections nobody counts before TLS is done.

    Returns:
        The transport to go on with, after ``set_protocol``, and what has arrived on it already.

    Raises:
        OSError: it failed, or took longer than ``timeout_s``; the connection is closed.
    """
    early = _Early()
    secured = await asyncio.get_running_loop().start_tls(
        transport,
        early,
        context,
        server_side=True,
        ssl_handshake_timeout=timeout_s,
        ssl_shutdown_timeout=CLOSE_TIMEOUT_S,
    )
    if secured is None or early.lost:
        raise ConnectionResetError("lost right after the TLS handshake")
    return secured, bytes(early.data)


class _Early(asyncio.Protocol):
    """Keeps what comes between the end of the TLS handshake and the next turn of the loop."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, _exc: Exception | None) -> None:
        self.lost = True
