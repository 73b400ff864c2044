"""The distribution header: a link's atom cache, as a peer fills and uses it.

We never agree to DIST_HDR_ATOM_CACHE, so stock peers send empty headers; a header with
entries is still read, since the flag only says what may be sent.

Source: erl_dist_protocol, "Distribution Header".
"""

from __future__ import annotations

import struct
from typing import Final

from bridge.errors import ProtocolError
from bridge.term import Atom, Term

_U16: Final = struct.Struct(">H").unpack_from


class AtomCache:
    """Atoms that one peer has sent on one link: 8 segments of 256 entries."""

    def __init__(self) -> None:
        self._atoms: dict[int, Term] = {}

    def read_header(self, packet: bytes, pos: int) -> tuple[list[Term], int]:
        """The atom table of one packet and the position after its header.

        Args:
            pos: of the byte that counts the entries.

        Raises:
            ProtocolError: cut short, or an entry that was never sent.
        """
        try:
            return self._read(packet, pos)
        except (IndexError, struct.error, UnicodeDecodeError):
            raise ProtocolError("distribution header cut short or not UTF-8") from None

    def _read(self, packet: bytes, pos: int) -> tuple[list[Term], int]:
        num_entries = packet[pos]
        if not num_entries:
            return [], pos + 1
        nibbles = packet[pos + 1 : pos + 2 + num_entries // 2]
        pos += 1 + num_entries // 2 + 1
        flags = [nibbles[i // 2] >> 4 * (i % 2) & 15 for i in range(num_entries + 1)]
        long_atoms = flags.pop() & 1
        table: list[Term] = []
        for flag in flags:
            key = (flag & 7) << 8 | packet[pos]
            pos += 1
            if flag & 8:
                size = _U16(packet, pos)[0] if long_atoms else packet[pos]
                pos += 2 if long_atoms else 1
                text = packet[pos : pos + size]
                pos += size
                if len(text) != size:
                    raise ProtocolError("distribution header cut short")
                name = text.decode("utf-8")
                if len(name) > 255:
                    raise ProtocolError(f"atom of {len(name)} characters in the header")
                self._atoms[key] = {"true": True, "false": False}.get(name, Atom(name))
            elif key not in self._atoms:
                raise ProtocolError(f"atom cache entry {key} was never sent")
            table.append(self._atoms[key])
        return table, pos
