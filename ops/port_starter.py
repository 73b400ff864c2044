"""Starts the OS process of a compute port; the secret goes through its standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge.tls import TlsFiles
from control.os_process import OsChild

NUM_LOGS = 50  # one a port; a port of a live rank is always among the newest written


@dataclass(frozen=True, slots=True, kw_only=True)
class PortStarter:
    """Starts ``python -m compute.port`` with its settings on standard input."""

    control_node: str
    cookie: str
    epmd_port: int
    logs_dir: Path
    cache_dir: Path
    tls: TlsFiles | None = None

    def __call__(self, port_id: str) -> OsChild:
        _prune(self.logs_dir)
        host = self.control_node.partition("@")[2]
        line = json.dumps(
            {
                "port_id": port_id,
                "node": f"{port_id}@{host}",
                "control_node": self.control_node,
                "cookie": self.cookie,
                "cache_dir": str(self.cache_dir),
                "epmd_port": self.epmd_port,
                "tls": asdict(self.tls) if self.tls else None,
            }
        )
        return OsChild.start(
            [sys.executable, "-P", "-m", "compute.port"],
            first_line=line.encode(),
            log_path=self.logs_dir / f"port-{port_id}.log",
        )

    def __repr__(self) -> str:  # the cookie never reaches a log
        return f"PortStarter(of {self.control_node})"


def _prune(logs_dir: Path) -> None:
    """Delete the logs of ports that are long gone, all but the newest."""
    found = sorted(logs_dir.glob("port-*.log"), key=lambda path: path.stat().st_mtime)
    for path in found[:-NUM_LOGS]:
        path.unlink(missing_ok=True)
