"""What a port is told through its standard input before it does anything else.

One JSON line, so that neither cookie nor address is ever on a command line or in the
environment, where every user of the machine could read them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import IO

from bridge.tls import TlsFiles

MAX_LINE_BYTES = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSettings:
    """Identity of a port and the way to its control node.

    Attributes:
        port_id: unique on the machine, chosen by the control process.
        node: distribution name of this port, ``NAME@HOST``; hidden.
        control_node: distribution name of the owner.
        cache_dir: where compiled kernels are kept.
        epmd_port: where EPMD tells the owner's address, now and after it was restarted.
        tls: paths of the certificates where the distribution is over TLS.
        orphan_s: seconds without an owner after which the port ends itself.
        beat_s: seconds between two beats.
    """

    port_id: str
    node: str
    control_node: str
    cookie: str
    cache_dir: str
    epmd_port: int
    tls: TlsFiles | None = None
    orphan_s: float = 9.0
    beat_s: float = 0.25

    def __repr__(self) -> str:  # the cookie never reaches a log
        return f"PortSettings({self.port_id}, {self.node} of {self.control_node})"

    @staticmethod
    def read(stream: IO[bytes]) -> PortSettings:
        """Read the one line from ``stream``.

        Raises:
            ValueError: the line is not the JSON object that the owner should write.
        """
        line = stream.readline(MAX_LINE_BYTES)
        try:
            data = json.loads(line)
            tls = data.pop("tls", None)
            return PortSettings(**data, tls=TlsFiles(**tls) if tls else None)
        except (ValueError, TypeError, AttributeError) as exc:
            raise ValueError(
                f"a port reads one line of JSON with its settings from standard input, "
                f"got {len(line)} bytes it could not use ({type(exc).__name__}); "
                f"ports are started by the control process, not by hand"
            ) from exc
