"""A stage in torch: loads a rank on a device and runs its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

from compute.errors import OutOfMemory
from compute.stage import FloatArray, Peers, Progress, Row
from compute.torch.cache import Cache
from compute.torch.decoder import Decoder
from compute.torch.step import Step
from compute.torch.weights import load_weights
from models.checkpoint import Checkpoint
from models.footprint import footprint
from models.sharding import RankShard


class TorchStage:
    """A :class:`compute.stage.Stage` made of torch operations, for every family.

    On CUDA weights, activations and cache are bfloat16; the residual, norms, rotation, routing
    and softmax are float32. There all multiplications have one of two fixed numbers of rows, so
    that a token's bits do not depend on the others of its step (see ``Blocks``); on a CPU, where
    each row costs time, a step's rows are multiplied together and company can change last bits.
    """

    kernels: Final = "torch"

    def __init__(
        self,
        decoder: Decoder,
        *,
        context_tokens: int,
        num_slots: int,
        threads: int,
        device: torch.device,
        padded: bool,
        workspace_bytes: int,
    ) -> None:
        self.spec, self.shard = decoder.spec, decoder.shard
        self.context_tokens, self.num_slots = context_tokens, num_slots
        self.num_sequences = decoder.cache.num_sequences
        self.num_pages = decoder.cache.num_pages
        self.device = f"{device.type}:{device.index or 0}"
        self.weights_bytes = decoder.weights.memory_bytes
        self.kv_bytes = decoder.cache.memory_bytes
        self.workspace_bytes = workspace_bytes
        self._decoder: Decoder | None = decoder
        self._device, self._threads, self._padded = device, threads, padded

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        shard: RankShard,
        *,
        context_tokens: int,
        num_slots: int,
        threads: int,
        device: str,
        on_progress: Progress,
        dtype: torch.dtype | None = None,
    ) -> TorchStage:
        """Load one rank's slice of a checkpoint.

        Args:
            checkpoint, shard, context_tokens, num_slots, threads, on_progress: as in
                ``compute.stage.load_stage``.
            device: a torch device.
            dtype: of weights, activations and cache. None: bfloat16 on CUDA. On a CPU float32,
                but weights stored in 16 bits are kept so and widened as they are multiplied,
                which halves their memory for about twice the time.

        Raises:
            models.errors.CorruptModel: a tensor cannot be read.
            compute.errors.OutOfMemory: no room.
            ValueError: there is no such device.
        """
        where = torch.device(device)
        if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"no device {device}: torch sees {torch.cuda.device_count()} CUDA devices"
            )
        on_cpu = where.type == "cpu"
        if on_cpu:
            torch.set_num_threads(threads)
        else:
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
        compute = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        expected = footprint(
            checkpoint.spec,
            checkpoint,
            shard,
            kernels="torch",
            device=where.type,
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
        )
        try:
            weights = load_weights(
                checkpoint,
                shard,
                device=where,
                compute=compute,
                storage=None if on_cpu and dtype is None else compute,
                on_progress=on_progress,
            )
            cache = Cache(
                checkpoint.spec,
                shard,
                context_tokens=context_tokens,
                num_slots=num_slots,
                device=where,
                dtype=compute,
            )
        except (MemoryError, RuntimeError) as exc:
            if not _is_memory(exc):
                raise
            need_bytes = expected.weights_bytes + expected.kv_bytes
            raise OutOfMemory("a rank's weights, keys and values", need_bytes) from exc
        return cls(
            Decoder(checkpoint.spec, shard, weights, cache, compute),
            context_tokens=context_tokens,
            num_slots=num_slots,
            threads=threads,
            device=where,
            padded=not on_cpu,
            workspace_bytes=expected.workspace_bytes,
        )

    @torch.inference_mode()
    def run(
        self, rows: Sequence[Row], incoming: FloatArray | None, peers: Peers | None
    ) -> FloatArray:
        """See :meth:`compute.stage.Stage.run`."""
        decoder = self._decoder
        if decoder is None:
            raise ValueError("this stage has been closed")
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # counts for the calling thread alone
        last = self.shard.is_last()
        if not rows:
            return np.empty((0, self.spec.vocab_size if last else self.spec.hidden_size), "f4")
        step = Step(rows, device=self._device, padded=self._padded)
        decoder.cache.begin(rows, step)

        def total(share: Tensor) -> Tensor:
            if peers is None:
                return share
            if share.device.type != "cpu":
                return cast(Tensor, peers.sum(share.contiguous()))
            return torch.from_numpy(peers.sum(share.contiguous().numpy()))

        if incoming is None:
            x_ND = decoder.embed(step, total)
        else:
            ordered = incoming if step.order is None else incoming[step.order]
            x_ND = torch.tensor(ordered, device=self._device)
        for index in range(len(self.shard.layers)):
            x_ND = decoder.layer(index, x_ND, step, total)
        if not last:
            return _back(cast(FloatArray, x_ND.cpu().numpy()), step)
        if len(step.ends) == 0:
            return np.empty((0, self.spec.vocab_size), dtype=np.float32)
        part = decoder.output(x_ND, step)
        if peers is None:
            return cast(FloatArray, part.cpu().numpy())
        if part.device.type == "cpu":
            whole: FloatArray = np.concatenate(peers.gather(part.numpy()), axis=1)
            return whole
        return cast(FloatArray, torch.cat(peers.gather(part), dim=1).cpu().numpy())

    def close(self) -> None:
        """Give the device's memory back; a second call does nothing."""
        self._decoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _back(x: FloatArray, step: Step) -> FloatArray:
    """The residual in the order of the caller's rows."""
    if step.order is None:
        return x
    out = np.empty_like(x)
    out[step.order] = x
    return out


def _is_memory(exc: Exception) -> bool:
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(exc)
