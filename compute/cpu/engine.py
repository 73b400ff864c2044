"""The CPU engine: one shard's weights, its cache, and the buffers of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compute.cpu import tables as t
from compute.cpu.crew import Crew
from compute.cpu.decoder import run_step
from compute.cpu.layout import padded
from compute.cpu.matmul import UNPACKED_BYTES
from compute.cpu.sync import PHASE_BYTES
from compute.cpu.weights import Weights, load_weights
from compute.engine import Row, check_rows
from compute.kv_cache import PAGE_TOKENS, KvCache
from compute.shard import Shard
from models.checkpoint import Checkpoint
from models.spec import ModelSpec

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class CpuEngine:
    """An :class:`compute.engine.Engine` on the processor's cores.

    A row's logits are the same bits whatever else is in the step, however its prompt was cut
    into chunks, and for any number of threads.
    """

    device = "cpu:0"

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        *,
        shard: Shard,
        context_tokens: int,
        num_slots: int,
        threads: int,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.context_tokens = context_tokens
        self.num_slots = num_slots
        self._weights = weights
        self._cache = KvCache(
            num_layers=len(shard.layers),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            context_tokens=context_tokens,
            num_slots=num_slots,
        )
        self._step = Step(spec, weights, self._cache, shard, num_slots=num_slots, threads=threads)
        self._crew = Crew(threads)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        context_tokens: int,
        num_slots: int,
        threads: int,
        on_progress: Callable[[int, int], None],
        shard: Shard | None = None,
    ) -> CpuEngine:
        """Load a shard of a checkpoint, all of it by default. Raises as ``load_engine``."""
        shard = shard or Shard.whole(checkpoint.spec)
        weights = load_weights(
            checkpoint, shard, context_tokens=context_tokens, on_progress=on_progress
        )
        engine = cls(
            checkpoint.spec,
            weights,
            shard=shard,
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
        )
        engine.forward([Row(slot=0, ids=(0,), start=0)])  # compiles, if nobody has yet
        return engine

    @property
    def memory_bytes(self) -> int:
        """Weights, key/value memory when full, and workspace."""
        return self._weights.memory_bytes + self._cache.memory_bytes + self._step.memory_bytes

    def forward(self, rows: Sequence[Row]) -> Floats:
        """See :meth:`compute.engine.Engine.forward`. Long steps run in parts of 256 positions."""
        check_rows(
            rows,
            num_slots=self.num_slots,
            context_tokens=self.context_tokens,
            vocab_size=self.spec.vocab_size,
        )
        num_wanted = sum(row.want_logits for row in rows)
        logits = np.empty((num_wanted, self.spec.vocab_size), dtype=np.float32)
        done = 0
        for part in parts(rows):
            self._step.fill(part)
            self._part(first=0, last=2 * len(self.shard.layers), embed=True, output=True)
            num_out = sum(row.want_logits for row in part)
            if num_out:
                logits[done : done + num_out] = self._step.logits(num_out)
            done += num_out
        return logits

    def begin(self, rows: Sequence[Row]) -> None:
        """Start a step by hand, for a shard whose halves are summed with others' in between.

        ``rows`` have at most ``MAX_ROWS`` positions in all. Then :meth:`run_half` for each half
        with the ranks' :meth:`partial` summed after it, then :meth:`finish`.
        """
        self._step.fill(rows)
        self._part(first=0, last=0, embed=True)

    def run_half(self, half: int) -> None:
        """Attention (even) or MLP (odd) of layer ``half // 2`` of this shard."""
        self._part(first=half, last=half + 1)

    def partial(self) -> Floats:
        """This shard's share of the half just run: float32 (groups, rows, 32), a view."""
        return self._step.partial()

    def finish(self) -> Floats:
        """Logits of the wanted rows, after the last half's shares are summed."""
        last = 2 * len(self.shard.layers)
        self._part(first=last, last=last, output=True)
        return self._step.logits(self._step.num_out)

    def close(self) -> None:
        """End the threads."""
        self._crew.close()

    def _part(self, *, first: int, last: int, embed: bool = False, output: bool = False) -> None:
        self._step.choose(first, last, embed, output)
        self._crew.run(self._run)

    def _run(self, thread: int) -> None:
        step, weights = self._step, self._weights
        run_step(step.table, weights.dims, weights.reals, weights.matrices, weights.layers, thread)


def parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Cut rows so that each part has at most ``MAX_ROWS`` positions; only ends want logits."""
    out: list[list[Row]] = [[]]
    room = t.MAX_ROWS
    for row in rows:
        at = 0
        while at < len(row.ids):
            if room == 0:
                out.append([])
                room = t.MAX_ROWS
            ids = row.ids[at : at + room]
            ends = at + len(ids) == len(row.ids)
            out[-1].append(Row(row.slot, ids, row.start + at, row.want_logits and ends))
            room -= len(ids)
            at += len(ids)
    return [part for part in out if part]


class Step:
    """The buffers that threads share in a step, and the table with their addresses."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        cache: KvCache,
        shard: Shard,
        *,
        num_slots: int,
        threads: int,
    ) -> None:
        self._spec, self._cache = spec, cache
        self.table: Longs = np.zeros(t.NUM_STEP, dtype=np.int64)
        self._buffers: list[npt.NDArray[Any]] = []
        self._views: dict[int, npt.NDArray[Any]] = {}
        num_layers, head_dim = len(shard.layers), spec.head_dim
        num_heads = int(weights.dims[t.NUM_HEADS])
        per_head = num_heads // len(shard.kv_heads)
        self.max_rows = min(t.MAX_ROWS, num_slots * cache.pages_a_slot * PAGE_TOKENS)
        hidden, inner = padded(spec.hidden_size), padded(len(shard.ffn))
        queries = padded(num_heads * head_dim)
        keys = padded(len(shard.kv_heads) * head_dim)
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
        self._logits = self._floats(t.LOGITS, padded(spec.vocab_size) * min(num_slots, t.MAX_ROWS))
        num_queries = t.RUN_ROWS * per_head
        scores_tokens = cache.pages_a_slot * PAGE_TOKENS
        scratch_bytes = max(
            UNPACKED_BYTES + self.max_rows * 128,
            num_queries * (2 * head_dim + scores_tokens) * 4,
        )
        scratch_bytes = -(-scratch_bytes // 4096) * 4096
        self._floats(t.SCRATCH, scratch_bytes // 4 * threads)
        phases = num_layers * t.PHASES_A_LAYER + t.PHASES_BESIDE_LAYERS
        self._counters = self._longs(t.COUNTERS, phases * PHASE_BYTES // 8)
        self._exits = self._longs(t.EXITS, PHASE_BYTES // 8)
        self._tokens = self._longs(t.TOKENS, self.max_rows)
        self._slots = self._longs(t.SLOTS, self.max_rows)
        self._positions = self._longs(t.POSITIONS, self.max_rows)
        self._run_starts = self._longs(t.RUN_STARTS, self.max_rows)
        self._run_lengths = self._longs(t.RUN_LENGTHS, self.max_rows)
        self._out_rows = self._longs(t.OUT_ROWS, self.max_rows)
        self._partial, self._has = self._views[t.PARTIAL], (shard.is_first(), shard.is_last(spec))
        table = self.table
        table[t.NUM_THREADS] = threads
        table[t.SCRATCH_BYTES], table[t.SCORES_TOKENS] = scratch_bytes, scores_tokens
        table[t.CACHE] = cache.data.ctypes.data
        table[t.PAGES] = cache.page_numbers.ctypes.data
        table[t.PAGES_A_SLOT], table[t.PAGE_BYTES] = cache.pages_a_slot, cache.page_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def fill(self, rows: Sequence[Row]) -> None:
        """Describe the next call: at most ``MAX_ROWS`` positions in all."""
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

    def choose(self, first: int, last: int, embed: bool, output: bool) -> None:
        """Which halves the next call runs, and whether embedding and output belong to it."""
        table = self.table
        table[t.FIRST_HALF], table[t.LAST_HALF] = first, last
        table[t.DO_EMBED], table[t.DO_OUTPUT] = embed and self._has[0], output and self._has[1]
        self._counters.fill(0)
        self._exits.fill(0)

    @property
    def num_out(self) -> int:
        """Rows whose logits are wanted."""
        return int(self.table[t.NUM_OUT])

    def partial(self) -> Floats:
        """The output of the half just run: float32 (groups, rows, 32), a view."""
        rows, groups = int(self.table[t.NUM_ROWS]), padded(self._spec.hidden_size) // 32
        view: Floats = self._partial[: groups * rows * 32].reshape(groups, rows, 32)
        return view

    def logits(self, num_out: int) -> Floats:
        """Logits of the last call: float32 (num_out, vocab)."""
        vocab = padded(self._spec.vocab_size)
        tiled = self._logits[: vocab * num_out].reshape(vocab // 32, num_out, 32)
        flat = tiled.transpose(1, 0, 2).reshape(num_out, vocab)[:, : self._spec.vocab_size]
        if self._spec.logit_softcap:
            cap = np.float32(self._spec.logit_softcap)
            flat = np.tanh(flat / cap) * cap
        logits: Floats = flat
        return logits

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
