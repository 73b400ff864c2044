"""Compiles the kernels ahead of the first model: ``python -m compute.cpu.warm``.

Compiling takes some ten seconds of one core, once a machine and version; afterwards code comes
from the cache in a fraction of a second. Done beside a download, nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numba

from compute import shm_kernels
from compute.cpu.decoder import run_step
from compute.cpu.layout import Q4H, Q8H
from compute.cpu.matmul import tile_function

_LONGS = numba.int64[::1]
_TABLE = numba.int64[:, ::1]
STEP_SIGNATURE = (_LONGS, _LONGS, numba.float32[::1], _TABLE, _TABLE, *(numba.int64,) * 3)


def warm_up(kinds: Iterable[int] = (Q4H, Q8H)) -> None:
    """Compile, or load from the cache, what loading on a CPU needs.

    That is the step, the products of some ``layout`` kinds, and the collectives of ranks that
    share memory. The default kinds are those of Q4_1 and Q8_0 files. Holds numba's compiler lock,
    not the interpreter lock alone: call it from a thread or process that has nothing else to do.
    """
    step: Any = run_step  # a numba dispatcher
    step.compile(STEP_SIGNATURE)
    for kind in kinds:
        tile_function(kind)
    shm_kernels.compile_all()


if __name__ == "__main__":
    warm_up()
