"""The buffers that threads share in a step, and the table with their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import tables as t
from compute.cpu.layout import GROUP, padded
from compute.cpu.matmul import UNPACKED_BYTES
from compute.cpu.routing import SCRATCH_FLOATS
from compute.cpu.sync import PHASE_BYTES
from compute.kv_cache import KvCache
from compute.page_table import PAGE_TOKENS
from compute.stage import Row
from models.sharding import RankShard
from models.spec import ModelSpec

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def _inner_features(spec: ModelSpec, shard: RankShard) -> int:
    """Of the widest MLP that all rows go through: of a dense layer, or shared experts."""
    if all(spec.is_sparse(layer) for layer in shard.layers):
        return len(shard.shared_ffn)
    return max(len(shard.ffn), len(shard.shared_ffn))


class Step:
    """What a rank computes on, for at most ``MAX_ROWS`` positions at once."""

    def __init__(
        self,
        spec: ModelSpec,
        cache: KvCache,
        shard: RankShard,
        *,
        num_slots: int,
        threads: int,
    ) -> None:
        self._spec, self._cache = spec, cache
        self.table: Longs = np.zeros(t.NUM_STEP, dtype=np.int64)
        self._buffers: list[npt.NDArray[Any]] = []
        self._views: dict[int, npt.NDArray[Any]] = {}
        self._vocab = len(shard.vocab) if shard.is_last() else 0
        self.max_rows = min(t.MAX_ROWS, len(cache.data) * PAGE_TOKENS)
        hidden, inner = padded(spec.hidden_size), padded(_inner_features(spec, shard))
        queries = padded(len(shard.query_heads) * spec.head_dim)
        keys = padded(len(shard.kv_heads) * spec.head_dim)
        for column, features in {
            t.RESIDUAL: hidden,
            t.X: hidden,
            t.X_SUMS: hidden // 16,
            t.QUERIES: queries,
            t.KEYS: keys,
            t.VALUES: keys,
            t.MIXED: queries,
            t.MIXED_SUMS: queries // 16,
            t.INNER: inner,
            t.INNER_SUMS: inner // 16,
            t.PARTIAL: hidden,
        }.items():
            self._floats(column, features * self.max_rows)
        room = self._experts(spec, shard) if spec.experts is not None else 0
        self._logits = self._floats(t.LOGITS, padded(self._vocab) * min(num_slots, t.MAX_ROWS))
        num_queries = t.RUN_ROWS * shard.queries_a_kv_head
        scores_tokens = cache.pages_a_slot * PAGE_TOKENS
        scratch_bytes = max(
            UNPACKED_BYTES + self.max_rows * 128,
            num_queries * (2 * spec.head_dim + scores_tokens) * 4,
            room,
        )
        scratch_bytes = -(-scratch_bytes // 4096) * 4096
        self._floats(t.SCRATCH, scratch_bytes // 4 * threads)
        phases = t.EMBED_PHASES + len(shard.layers) * t.PHASES_A_LAYER + t.END_PHASES
        self._counters = self._longs(t.COUNTERS, phases * PHASE_BYTES // 8)
        self._open = self._longs(t.OPEN, PHASE_BYTES // 8)
        self._exits = self._longs(t.EXITS, PHASE_BYTES // 8)
        self._tokens = self._longs(t.TOKENS, self.max_rows)
        self._slots = self._longs(t.SLOTS, self.max_rows)
        self._positions = self._longs(t.POSITIONS, self.max_rows)
        self._run_starts = self._longs(t.RUN_STARTS, self.max_rows)
        self._run_lengths = self._longs(t.RUN_LENGTHS, self.max_rows)
        self._out_rows = self._longs(t.OUT_ROWS, self.max_rows)
        self._residual, self._partial = self._views[t.RESIDUAL], self._views[t.PARTIAL]
        table = self.table
        table[t.NUM_THREADS] = threads
        table[t.SCRATCH_BYTES], table[t.SCORES_TOKENS] = scratch_bytes, scores_tokens
        table[t.CACHE] = cache.data.ctypes.data
        table[t.PAGES] = cache.table.numbers.ctypes.data
        table[t.PAGES_A_SLOT], table[t.PAGE_BYTES] = cache.pages_a_slot, cache.page_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fill(self, rows: Sequence[Row]) -> None:
        """Describe the next step, in which no part is open yet."""
        at = num_runs = num_out = 0
        for row in rows:
            count = len(row.ids)
            self._tokens[at : at + count] = row.ids
            self._slots[at : at + count] = row.slot
            self._positions[at : at + count] = range(row.start, row.start + count)
            for start in range(0, count, t.RUN_ROWS):
                self._run_starts[num_runs] = at + start
                self._run_lengths[num_runs] = min(t.RUN_ROWS, count - start)
                num_runs += 1
            at += count
            if row.want_logits:
                self._out_rows[num_out] = at - 1
                num_out += 1
        table = self.table
        table[t.NUM_ROWS], table[t.NUM_RUNS], table[t.NUM_OUT] = at, num_runs, num_out
        self._counters.fill(0)
        self._open[0] = self._exits[0] = 0

    def abandon(self) -> None:
        """Send helper threads home: no further part of this step will be opened."""
        self._open[0] = -1

    def residual(self) -> Floats:
        """The residual of the step's positions: float32 (groups, positions, 32), a view."""
        return self._tiled(self._residual)

    def partial(self) -> Floats:
        """The output of the half just run: float32 (groups, positions, 32), a view."""
        return self._tiled(self._partial)

    def take(self, incoming: Floats) -> None:
        """Fill the residual from float32 (positions, hidden)."""
        residual, (positions, hidden) = self.residual(), incoming.shape
        whole = hidden // GROUP
        by_group = incoming[:, : whole * GROUP].reshape(positions, whole, GROUP)
        residual[:whole] = by_group.transpose(1, 0, 2)
        if whole < len(residual):
            residual[whole] = 0
            residual[whole, :, : hidden % GROUP] = incoming[:, whole * GROUP :]

    def hand_on(self) -> Floats:
        """The residual as float32 (positions, hidden), a copy."""
        return self._flat(self.residual(), self._spec.hidden_size)

    def logits(self) -> Floats:
        """This rank's logits of the wanted rows: float32 (outputs, its vocab), a copy."""
        num_out, groups = int(self.table[t.NUM_OUT]), padded(self._vocab) // GROUP
        tiled = self._logits[: groups * num_out * GROUP].reshape(groups, num_out, GROUP)
        return self._flat(tiled, self._vocab)

    def _experts(self, spec: ModelSpec, shard: RankShard) -> int:
        """Buffers of layers with experts; returns the scratch bytes that a choice takes."""
        assert spec.experts is not None
        active, here = spec.experts.num_active, len(shard.experts)
        choices = self.max_rows * active
        pairs = self.max_rows * min(active, here)
        hidden, inner = padded(spec.hidden_size), padded(len(shard.expert_ffn))
        every = padded(spec.experts.num_experts)
        for column, size in {
            t.ROUTED: every * self.max_rows,
            t.FACTORS: choices,
            t.EXPERT_X: hidden * pairs,
            t.EXPERT_X_SUMS: hidden // 16 * pairs,
            t.EXPERT_INNER: inner * pairs,
            t.EXPERT_INNER_SUMS: inner // 16 * pairs,
        }.items():
            self._floats(column, size)
        for column, size in {
            t.CHOSEN: choices,
            t.PAIRS: choices,
            t.PAIR_ROWS: pairs,
            t.PAIR_SPANS: pairs,
            t.SPAN_EXPERTS: here,
            t.SPAN_STARTS: here + 1,
            t.NUM_SPANS: 1,
            t.PLACES: here,
        }.items():
            self._longs(column, size)
        return SCRATCH_FLOATS * every * 4

    def _tiled(self, buffer: Floats) -> Floats:
        rows, groups = int(self.table[t.NUM_ROWS]), padded(self._spec.hidden_size) // GROUP
        return buffer[: groups * rows * GROUP].reshape(groups, rows, GROUP)

    def _flat(self, tiled: Floats, features: int) -> Floats:
        groups, rows, _ = tiled.shape
        by_row = np.empty((rows, groups, GROUP), dtype=np.float32)
        by_row[...] = tiled.transpose(1, 0, 2)
        return np.ascontiguousarray(by_row.reshape(rows, groups * GROUP)[:, :features])

    def _floats(self, column: int, size: int) -> Floats:
        buffer = np.zeros(size + 16, dtype=np.float32)
        skip = (-buffer.ctypes.data % 64) // 4
        view: Floats = buffer[skip : skip + size]
        self._register(column, buffer, view)
        return view

    def _longs(self, column: int, size: int) -> Longs:
        buffer = np.zeros(size + 8, dtype=np.int64)
        skip = (-buffer.ctypes.data % 64) // 8
        view = buffer[skip : skip + size]
        self._register(column, buffer, view)
        return view

    def _register(self, column: int, buffer: npt.NDArray[Any], view: npt.NDArray[Any]) -> None:
        self._buffers.append(buffer)
        self._views[column] = view
        self.table[column] = view.ctypes.data
