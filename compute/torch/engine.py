"""The torch engine: one shard on one CUDA device, bf16 weights and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from compute.engine import Row, check_rows
from compute.shard import Shard
from compute.torch.decoder import Decoder, TorchCache
from compute.torch.weights import load_weights
from models.checkpoint import Checkpoint

Floats = npt.NDArray[np.float32]


class TorchEngine:
    """An :class:`compute.engine.Engine` made of torch operations.

    Rows run one after the other with the shapes they have alone, so a token does not depend on
    the batch it rode in. How a prompt is cut into chunks can change its last bits.
    """

    def __init__(
        self, decoder: Decoder, *, context_tokens: int, num_slots: int, device: torch.device
    ) -> None:
        self.spec = decoder.spec
        self.context_tokens = context_tokens
        self.num_slots = num_slots
        self.device = f"{device.type}:{device.index or 0}"
        self._decoder, self._device = decoder, device

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        context_tokens: int,
        num_slots: int,
        device: str,
        on_progress: Callable[[int, int], None],
        dtype: torch.dtype = torch.bfloat16,
    ) -> TorchEngine:
        """Load a checkpoint.

        Args:
            checkpoint: of any format; weights are dequantised to ``dtype``.
            context_tokens, num_slots, on_progress: as in ``load_engine``.
            device: a torch device.
            dtype: of weights, activations and cache; norms, rotation and softmax are float32.

        Raises:
            UnsupportedModel: an architecture that the decoder does not run.
            ValueError: there is no such device.
        """
        where = torch.device(device)
        if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"no device {device}: torch sees {torch.cuda.device_count()} CUDA devices"
            )
        spec, shard = checkpoint.spec, Shard.whole(checkpoint.spec)
        weights = load_weights(
            checkpoint,
            shard,
            context_tokens=context_tokens,
            device=where,
            dtype=dtype,
            on_progress=on_progress,
        )
        cache = TorchCache(
            spec,
            shard,
            context_tokens=context_tokens,
            num_slots=num_slots,
            device=where,
            dtype=dtype,
        )
        decoder = Decoder(spec, shard, weights, cache)
        return cls(decoder, context_tokens=context_tokens, num_slots=num_slots, device=where)

    @property
    def memory_bytes(self) -> int:
        """Weights and key/value memory; torch's own workspace is not counted."""
        return self._decoder.weights.memory_bytes + self._decoder.cache.memory_bytes

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row]) -> Floats:
        """See :meth:`compute.engine.Engine.forward`."""
        check_rows(
            rows,
            num_slots=self.num_slots,
            context_tokens=self.context_tokens,
            vocab_size=self.spec.vocab_size,
        )
        decoder, logits = self._decoder, []
        for row in rows:
            x_LD = decoder.embed(torch.tensor(row.ids, device=self._device))
            for index in range(len(decoder.weights.layers)):
                x_LD = decoder.layer(index, x_LD, row.slot, row.start)
            if row.want_logits:
                logits.append(decoder.output(x_LD[-1:]))
        if not logits:
            return np.empty((0, self.spec.vocab_size), dtype=np.float32)
        return cast(Floats, torch.cat(logits).cpu().numpy())

    def close(self) -> None:
        """Give the device's memory back."""
        del self._decoder
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
