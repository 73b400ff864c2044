"""How the threads of one step share its work: counters in memory, no lock and no system call.

A step is a fixed list of phases; a phase is a number of items that any thread may do in any
order. A thread that comes late finds the items of early phases done and passes; nobody waits for
threads, only for items.
"""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types

from compute.cpu.jit import inner
from compute.cpu.vector import external, operation

PHASE_BYTES = 128  # two counters, each alone on its cache line
_LONG = ir.IntType(64)
_SPINS_BEFORE_YIELD = 2000


@operation(types.int64, types.int64, types.int64)
def fetch_add(builder: Any, address: Any, amount: Any) -> Any:
    """Add to the counter at an address; its value before."""
    pointer = builder.inttoptr(address, _LONG.as_pointer())
    return builder.atomic_rmw("add", pointer, amount, "seq_cst")


@operation(types.int64, types.int64)
def read(builder: Any, address: Any) -> Any:
    """The counter at an address; what other threads wrote before adding to it is visible."""
    return builder.load_atomic(builder.inttoptr(address, _LONG.as_pointer()), "seq_cst", 8)


@operation(types.void, types.int64)
def give_way(builder: Any, unused: Any) -> Any:
    """Let another thread of the machine run on this core."""
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    builder.call(external(builder, name, ir.IntType(32)), [])


@inner
def take(counters: Any, phase: Any) -> Any:
    """Number of an item that nobody else has; at or beyond the phase's items, none is left."""
    return fetch_add(counters + phase * PHASE_BYTES, 1)


@inner
def finish(counters: Any, phase: Any) -> None:
    """Say that one item taken is done."""
    fetch_add(counters + phase * PHASE_BYTES + PHASE_BYTES // 2, 1)


@inner
def wait(address: Any, count: Any) -> None:
    """Return when the counter at an address has reached ``count``."""
    spins = 0
    while read(address) < count:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            give_way(0)


@inner
def is_open(address: Any, number: Any) -> Any:
    """Wait until the counter at an address is beyond ``number``; false once it is below 0."""
    spins = 0
    count = read(address)
    while 0 <= count <= number:
        spins += 1
        if spins > _SPINS_BEFORE_YIELD:
            give_way(0)
        count = read(address)
    return count > number


@inner
def join(counters: Any, phase: Any, num_items: Any) -> None:
    """Return when all items of a phase are done."""
    wait(counters + phase * PHASE_BYTES + PHASE_BYTES // 2, num_items)
