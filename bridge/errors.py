"""Errors of the codec and the protocol. Errors of processes and calls live with the processes."""


class BridgeError(Exception):
    """Anything that the bridge raises on purpose."""


class EncodeError(BridgeError):
    """A Python value has no Erlang form, or nests too deep. The caller can fix it."""


class DecodeError(BridgeError):
    """Bytes from outside are no valid external term. The sender is at fault."""


class ProtocolError(BridgeError):
    """A distribution packet breaks the protocol; the link must be closed."""


class HandshakeError(BridgeError):
    """A handshake failed: bad bytes, wrong cookie, missing flags, refused by a side."""


class EpmdError(BridgeError):
    """EPMD is unreachable, silent or gave an answer that makes no sense."""


class NameTaken(EpmdError):
    """EPMD already knows a live node of that name."""


class TlsError(BridgeError):
    """The files for TLS cannot be used; the text names file and reason."""
