"""Asks transformers in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("transformers_oracle.py")


def ask(*requests: dict[str, Any], timeout_s: float = 280.0) -> list[Any]:
    """Answers to some requests, see ``transformers_oracle``."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '["{']
