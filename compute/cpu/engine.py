"""The compiled stage: one rank's weights on the processor's cores, its cache and its threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from compute.cpu.crew import Crew
from compute.cpu.decoder import run_step
from compute.cpu.step import Step
from compute.cpu.weights import Weights, load_weights
from compute.kv_cache import KvCache
from compute.stage import Peers, Row
from models.checkpoint import Checkpoint
from models.footprint import PAGE_TOKENS, most_sequences
from models.sharding import RankShard
from models.spec import ModelSpec

Floats = npt.NDArray[np.float32]


class CpuStage:
    """A :class:`compute.stage.Stage` of compiled kernels.

    A row's logits are the same bits whatever else is in the step, however its prompt was cut into
    chunks, for any number of threads and of pipeline stages. Tensor ranks of other shares add
    up in another order; all ranks of a group hold the same bits, the same in every run.
    """

    device = "cpu:0"
    kernels = "compiled"

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        weights: Weights,
        *,
        context_tokens: int,
        num_slots: int,
        threads: int,
    ) -> None:
        self.spec, self.shard = spec, shard
        self.context_tokens, self.num_slots = context_tokens, num_slots
        self.num_sequences = most_sequences(num_slots)
        self.num_pages = num_slots * -(-context_tokens // PAGE_TOKENS)
        self._weights = weights
        self._cache = KvCache(
            num_layers=len(shard.layers),
            num_kv_heads=len(shard.kv_heads),
            head_dim=spec.head_dim,
            context_tokens=context_tokens,
            num_slots=self.num_sequences,
            num_pages=self.num_pages,
        )
        self._step = Step(spec, self._cache, shard, num_slots=self.num_sequences, threads=threads)
        self._crew = Crew(threads)
        self._is_last = shard.is_last()
        self._sums_embedding = shard.is_first() and len(shard.embedding) < spec.vocab_size
        self._num_halves = 2 * len(shard.layers)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        shard: RankShard,
        *,
        context_tokens: int,
        num_slots: int,
        threads: int,
        on_progress: Callable[[int, int], None],
    ) -> CpuStage:
        """Load one rank's slice. Arguments and errors as of ``compute.stage.load_stage``."""
        spec = checkpoint.spec
        weights = load_weights(
            checkpoint, shard, context_tokens=context_tokens, on_progress=on_progress
        )
        stage = cls(
            spec,
            shard,
            weights,
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
        )
        incoming = None if shard.is_first() else np.zeros((1, spec.hidden_size), dtype=np.float32)
        stage.run([Row(slot=0, ids=(0,), start=0)], incoming, None)  # compiles, if nobody has yet
        return stage

    @property
    def weights_bytes(self) -> int:
        """Weights as the kernels keep them."""
        return self._weights.weights_bytes

    @property
    def kv_bytes(self) -> int:
        """Key/value memory when every page is full."""
        return self._cache.memory_bytes

    @property
    def workspace_bytes(self) -> int:
        """Buffers of a step, and tables of positions."""
        return self._step.memory_bytes + self._weights.tables_bytes

    def run(self, rows: Sequence[Row], incoming: Floats | None, peers: Peers | None) -> Floats:
        """See :meth:`compute.stage.Stage.run`."""
        step, last = self._step, self._num_halves + 2
        self._cache.table.follow(rows)
        step.fill(rows)
        if incoming is not None:
            step.take(incoming)
        self._crew.wake(self._help)
        if peers is None:
            self._run(0, last, 0)
        else:
            try:
                self._run_with(peers)
            except BaseException:
                step.abandon()
                raise
        if not self._is_last:
            return step.hand_on()
        logits = step.logits()
        if not len(logits):
            return np.empty((0, self.spec.vocab_size), dtype=np.float32)
        if peers is not None:
            logits = np.concatenate(peers.gather(logits), axis=1)
        if self.spec.logit_softcap:
            cap = np.float32(self.spec.logit_softcap)
            logits = np.tanh(logits / cap) * cap
        return logits

    def close(self) -> None:
        """End the threads."""
        self._crew.close()

    def _run_with(self, peers: Peers) -> None:
        """The step part by part, summed over the ranks in between."""
        step, last = self._step, self._num_halves + 1
        begin = 0
        if self._sums_embedding:
            self._run(0, 1, 0)
            peers.sum(step.residual())
            begin = 1
        partial = step.partial()
        for half in range(1, last):
            self._run(begin, half + 1, 0)
            peers.sum(partial)
            begin = half + 1
        self._run(last, last + 1, 0)

    def _help(self, thread: int) -> None:
        self._run(0, self._num_halves + 2, thread)

    def _run(self, first: int, last: int, thread: int) -> None:
        step, w = self._step, self._weights
        run_step(step.table, w.dims, w.reals, w.matrices, w.layers, first, last, thread)
