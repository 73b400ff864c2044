"""Which life of a node this is: heart just started, or started the control process again.

A later life keeps the HTTP port that the first one was given, so that clients find it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ops.home import write_atomically

log = logging.getLogger("ops.life")


@dataclass(frozen=True, slots=True)
class Life:
    """What one life leaves to the next.

    Attributes:
        heart: pid and start time of the parent, which tell whose life it is.
        http_port: bound port; 0 until it is.
    """

    heart: str
    http_port: int = 0

    @staticmethod
    def begin(path: Path) -> tuple[Life, bool]:
        """This life, and whether it is the first under its heart."""
        heart = _parent()
        try:
            former = Life(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):  # none, or written by half
            former = Life("")
        if former.heart == heart:
            return former, False
        life = Life(heart)
        life.write(path)
        return life, True

    def write(self, path: Path) -> None:
        """Leave it to the next life; a full disk costs that one its port, not this one."""
        try:
            write_atomically(path, json.dumps(asdict(self)) + "\n")
        except OSError as exc:
            log.error("cannot write %s: %s", path, exc)


def _parent() -> str:
    pid = os.getppid()
    try:
        return f"{pid} {psutil.Process(pid).create_time():.0f}"
    except psutil.NoSuchProcess:  # heart is gone already: this life is about to end
        return f"{pid} gone"
