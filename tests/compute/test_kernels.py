"""Kernels against numpy: packing of every storage format, products, exp, phases and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute.cpu import functions, sync, vector
from compute.cpu.crew import Crew
from compute.cpu.jit import entry
from compute.cpu.layout import TILE
from compute.cpu.matmul import UNPACKED_BYTES, multiply_tile, tile_function
from compute.cpu.pack import Packed, pack
from compute.cpu.pack import vector as padded_vector
from compute.cpu.residual import element
from models.quant import SUPPORTED, to_float32
from models.weights import Weight
from tests.models.tiny import random_blocks

Floats = npt.NDArray[np.float32]
COLUMNS = 512


@entry
def whole_product(
    function: Any, p: Any, bias: Any, groups: Any, tiles: Any, x: Any, sums: Any, y: Any,
    rows: Any, scratch: Any,
) -> None:  # fmt: skip
    for tile in range(tiles):
        multiply_tile(
            function, p, bias, groups, tile, x, sums, y + tile * rows * 128, rows, scratch
        )


@entry
def read_element(kind: Any, p: Any, groups: Any, row: Any, column: Any) -> Any:
    return element(kind, p, groups, row, column)


@entry
def exponentials(source: Any, target: Any, count: Any) -> None:
    for i in range(0, count, 16):
        vector.store(target + i * 4, functions.exp(vector.load(source + i * 4)))


@entry
def count_items(counters: Any, tally: Any, phases: Any, items: Any) -> None:
    for phase in range(phases):
        item = sync.take(counters, phase)
        while item < items:
            # an item of phase p may only run when all of p - 1 are done
            if phase == 0 or sync.read(tally + (phase - 1) * 8) == items:
                sync.fetch_add(tally + phase * 8, 1)
            sync.finish(counters, phase)
            item = sync.take(counters, phase)
        sync.join(counters, phase, items)


@entry
def may_begin(counter: Any, part: Any) -> Any:
    return sync.is_open(counter, part)


def weight(kind: str, rows: int = 70, columns: int = COLUMNS) -> Weight:
    if kind in ("F32", "F16", "BF16"):
        wide = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
        stored: npt.NDArray[Any] = wide
        if kind == "F16":
            stored = wide.astype(np.float16)
        if kind == "BF16":
            stored = (wide.view(np.uint32) >> 16).astype(np.uint16)
        return Weight("w", (rows, columns), kind, stored.view(np.uint8).reshape(rows, -1))
    data = np.ascontiguousarray(random_blocks(kind, rows, columns))
    return Weight("w", (rows, columns), kind, data)


def product(packed: Packed, x: Floats, bias: Floats | None = None) -> Floats:
    """``x @ w.T`` by the kernels: float32 (len(x), rows)."""
    rows = x.shape[0]
    wide = np.zeros((rows, packed.groups * 32), dtype=np.float32)
    wide[:, : x.shape[1]] = x
    grouped = np.ascontiguousarray(wide.reshape(rows, -1, 32).transpose(1, 0, 2))
    sums = np.ascontiguousarray(grouped.reshape(*grouped.shape[:2], 2, 16).sum(3))
    y = np.empty((packed.tiles, rows, TILE), dtype=np.float32)
    scratch = np.empty(UNPACKED_BYTES // 4, dtype=np.float32)
    whole_product(
        tile_function(packed.kind),
        packed.address,
        0 if bias is None else bias.ctypes.data,
        packed.groups,
        packed.tiles,
        grouped.ctypes.data,
        sums.ctypes.data,
        y.ctypes.data,
        rows,
        scratch.ctypes.data,
    )
    return y.transpose(1, 0, 2).reshape(rows, -1)[:, : packed.rows]


@pytest.mark.slow
@pytest.mark.timeout(300)  # compiles the kernels of all kinds on a fresh machine
@pytest.mark.parametrize("kind", SUPPORTED)
def test_products_of_every_format(kind: str) -> None:
    stored = weight(kind)
    packed = pack(stored)
    values = to_float32(stored.data, kind)
    for row, column in ((0, 0), (69, 511), (33, 17), (5, 48), (31, 255), (32, 256)):
        found = read_element(packed.kind, packed.address, packed.groups, row, column)
        assert found == values[row, column]
    x = np.random.default_rng(2).standard_normal((101, COLUMNS)).astype(np.float32)
    bias = np.linspace(-2, 2, 70, dtype=np.float32)
    found = product(packed, x, padded_vector(bias))
    expected = x.astype(np.float64) @ values.T.astype(np.float64) + bias
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    for rows in (1, 2, 6, 7, 13, 97):  # the same bits in any company
        again = product(packed, x[:rows], padded_vector(bias))
        assert np.array_equal(again, found[:rows])
    assert packed.data.ctypes.data % 64 == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q8_0", "Q6_K", "Q4_K"])
@pytest.mark.parametrize("columns", [slice(64, 288), slice(0, 256), slice(40, 90)])
def test_parts_of_a_matrix(kind: str, columns: slice) -> None:
    stored = weight(kind)
    packed = pack(stored, slice(3, 40), columns)
    values = to_float32(stored.data, kind)[3:40, columns]
    assert (packed.rows, packed.columns) == values.shape
    x = np.random.default_rng(2).standard_normal((3, values.shape[1])).astype(np.float32)
    expected = x @ values.T
    assert np.abs(product(packed, x) - expected).max() < 2e-5 * np.abs(expected).max()


def test_quantised_weights_stay_small() -> None:
    sizes = {kind: pack(weight(kind, rows=64)).data.nbytes * 8 / (64 * 512) for kind in SUPPORTED}
    assert sizes["Q4_1"] == 5.0
    assert sizes["Q8_0"] == sizes["Q5_0"] == 8.5
    assert sizes["Q4_K"] == sizes["Q4_0"] == 6.0
    assert sizes["Q6_K"] == sizes["Q2_K"] == 12.0
    assert sizes["BF16"] == sizes["F16"] == 16.0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kernels_compiled_in_different_processes_live_together(tmp_path: Path) -> None:
    """Cached machine code is linked by name: a kind must never call another kind's code."""
    for kinds in (["Q4_1"], ["F32"], ["F32", "Q4_1"]):
        done = subprocess.run(
            [sys.executable, "-m", "tests.compute.kernel_process", *kinds],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_warming_up_leaves_nothing_for_ranks_to_compile() -> None:
    """In a process of its own: here other tests may have compiled them."""
    script = """
from compute import shm_kernels
from compute.cpu.decoder import run_step
from compute.cpu.warm import warm_up
warm_up()
names = ("all_reduce", "all_gather", "broadcast", "send", "receive")
kernels = [run_step, *(getattr(shm_kernels, name) for name in names)]
print([len(kernel.signatures) for kernel in kernels])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == "[1, 1, 1, 1, 1, 1]", done.stdout + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exp_is_near_exact() -> None:
    x = np.linspace(-100, 88, 16 * 4096).astype(np.float32)
    y = np.empty_like(x)
    exponentials(x.ctypes.data, y.ctypes.data, x.size)
    exact = np.exp(x.astype(np.float64))
    inside = x >= -87
    assert np.abs(y[inside] / exact[inside] - 1).max() < 3e-7
    assert (y[~inside] == 0).all()
    special = np.full(16, -np.inf, dtype=np.float32)
    special[1], special[2], special[3] = 0.0, 1000.0, np.nan
    exponentials(special.ctypes.data, y.ctypes.data, 16)
    assert y[0] == 0
    assert y[1] == 1
    assert y[2] == np.exp(np.float32(88))
    assert np.isnan(y[3])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(num_threads=st.integers(1, 4), phases=st.integers(1, 30), items=st.integers(0, 20))
def test_phases_run_every_item_once_and_in_order(num_threads: int, phases: int, items: int) -> None:
    counters = np.zeros((phases + 1) * sync.PHASE_BYTES // 8, dtype=np.int64)
    tally = np.zeros(phases, dtype=np.int64)
    threads = [
        threading.Thread(
            target=count_items, args=(counters.ctypes.data, tally.ctypes.data, phases, items)
        )
        for _ in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert (tally == items).all()


def test_helpers_wait_for_parts_to_be_opened_and_leave_when_told() -> None:
    counter = np.zeros(1, dtype=np.int64)
    told: list[bool] = []
    helper = threading.Thread(
        target=lambda: told.extend(may_begin(counter.ctypes.data, part) for part in range(3))
    )
    helper.start()
    counter[0] = 2
    counter[0] = -1
    helper.join(timeout=30)
    assert not helper.is_alive()
    assert told[-1] is False
    counter[0] = 3
    assert all(may_begin(counter.ctypes.data, part) for part in range(3))


def test_a_crew_calls_every_thread_and_closes_twice() -> None:
    crew = Crew(3)
    for _ in range(20):
        everybody = threading.Barrier(3, timeout=10)
        seen = []

        def task(thread: int, everybody: threading.Barrier = everybody) -> None:
            everybody.wait()
            seen.append(thread)  # noqa: B023  # read before the next turn
            everybody.wait()

        crew.wake(task)
        task(0)
        assert sorted(seen) == [0, 1, 2]
    crew.close()
    crew.close()
