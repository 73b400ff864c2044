"""Ends a control process whose event loop is blocked, once the log says by what.

A blocked loop means late ticks, late beats and no answers, so nothing is left to save: heart starts
the process again and the compute ports wait for it. Heart itself has a longer limit, for what
blocks even the watching thread.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Final

from bridge.loop_watch import LoopWatch

WARN_AFTER_S: Final = 1.0
LIMIT_S: Final = 15.0  # half of heart's, so that the log has the culprit's stack
CRASHED: Final = 70


def guard_loop(*, warn_after_s: float = WARN_AFTER_S, limit_s: float = LIMIT_S) -> LoopWatch:
    """Watch the running event loop until ``stop`` of what is returned.

    Args:
        warn_after_s: a longer block is logged with the stack of what blocks.
        limit_s: one this long ends the process with status ``CRASHED``.
    """
    watch = LoopWatch(warn_after_s=warn_after_s, limit_s=limit_s, on_limit=_end)
    watch.start()
    return watch


def _end(_blocked_s: float) -> None:
    """Called from the watching thread: the loop cannot do anything any more."""
    faulthandler.dump_traceback(all_threads=True)
    sys.stderr.flush()
    os._exit(CRASHED)
