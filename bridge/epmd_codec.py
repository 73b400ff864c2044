"""EPMD's requests and answers as bytes.

Source: erl_dist_protocol, "EPMD Protocol"; what stock nodes send was measured.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from bridge.errors import EpmdError

ALIVE2_REQ: Final = 120
ALIVE2_RESP: Final = 121  # 16-bit creation, for nodes older than version 6
ALIVE2_X_RESP: Final = 118
PORT_PLEASE2_REQ: Final = 122
PORT2_RESP: Final = 119
NAMES_REQ: Final = 110

NORMAL_NODE: Final = 77
HIDDEN_NODE: Final = 72
MAX_REQUEST_BYTES: Final = 1024  # a name of 255 characters and room for extras

_VERSIONS: Final = (6, 5)  # highest, lowest that we and OTP 25 to 28 speak
_NODE: Final = struct.Struct(">HBBHHH")  # port, type, protocol, highest, lowest, name length


@dataclass(frozen=True, slots=True)
class NodeEntry:
    """A node as EPMD knows it: ``name`` is the part before the ``@``."""

    name: str
    tcp_port: int
    hidden: bool = False
    highest_version: int = _VERSIONS[0]
    lowest_version: int = _VERSIONS[1]
    extra: bytes = b""


def request(body: bytes) -> bytes:
    """``body`` behind its length, as every request is sent."""
    return len(body).to_bytes(2, "big") + body


def alive_request(node: NodeEntry) -> bytes:
    """Registers ``node`` for as long as the connection lives."""
    return request(bytes((ALIVE2_REQ,)) + _node_bytes(node))


def port_answer(node: NodeEntry | None) -> bytes:
    """To PORT_PLEASE2: 1 alone says that there is no such node."""
    if node is None:
        return bytes((PORT2_RESP, 1))
    return bytes((PORT2_RESP, 0)) + _node_bytes(node)


def _node_bytes(node: NodeEntry) -> bytes:
    name = node.name.encode()
    kind = HIDDEN_NODE if node.hidden else NORMAL_NODE
    versions = (node.highest_version, node.lowest_version)
    head = _NODE.pack(node.tcp_port, kind, 0, *versions, len(name))
    return head + name + len(node.extra).to_bytes(2, "big") + node.extra


def read_node(body: bytes, start: int) -> NodeEntry:
    """The node described at ``body[start:]``. Raises EpmdError."""
    try:
        port, kind, _protocol, highest, lowest, size = _NODE.unpack_from(body, start)
        start += _NODE.size
        name = body[start : start + size].decode("utf-8")
        (extra_size,) = struct.unpack_from(">H", body, start + size)
        start += size + 2
        extra = body[start : start + extra_size]
    except (struct.error, UnicodeDecodeError) as exc:
        raise EpmdError(f"node description cut short or not UTF-8: {body[:60]!r}") from exc
    if len(extra) != extra_size or not 1 <= len(name) <= 255:
        raise EpmdError(f"node description cut short or without a name: {body[:60]!r}")
    return NodeEntry(name, port, kind == HIDDEN_NODE, highest, lowest, extra)


def names_answer(server_port: int, nodes: list[NodeEntry]) -> bytes:
    """To NAMES: one line a node, as the stock EPMD prints them."""
    lines = (f"name {node.name} at port {node.tcp_port}\n" for node in nodes)
    return server_port.to_bytes(4, "big") + "".join(lines).encode()


def read_names(answer: bytes) -> list[tuple[str, int]]:
    """Names and TCP ports of a NAMES answer. Raises EpmdError."""
    found = []
    for line in answer[4:].decode("utf-8", "replace").splitlines():
        match line.split():
            case ["name", name, "at", "port", port] if port.isascii() and port.isdigit():
                found.append((name, int(port)))
            case _:
                raise EpmdError(f"names answer holds {line[:60]!r}")
    if len(answer) < 4:
        raise EpmdError("names answer cut short")
    return found
