"""Runs ``ctl`` in this process, and nodes for it in others."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ops import ctl

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_ctl(*args: str | Path, stdin: str = "") -> Result:
    """One command: its exit status and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        patch.object(sys, "argv", ["ctl", *map(str, args)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            ctl.main()
        except SystemExit as exc:
            status = int(exc.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class CtlNode:
    home: Path
    name: str
    epmd_port: int
    process: subprocess.Popen[str]

    def ctl(self, *args: str, stdin: str = "") -> Result:
        return run_ctl(*args, "--home", self.home, stdin=stdin)

    @property
    def seen(self) -> list[str]:
        path = self.home / "seen"
        return path.read_text().splitlines() if path.exists() else []


@contextmanager
def running_node(home: Path, name: str = "n@127.0.0.1") -> Iterator[CtlNode]:
    """A node of ``tests/ops/ctl_node.py`` with an EPMD of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ops.ctl_node", str(home), name, str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        yield CtlNode(home, name, port, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
