"""A process of its own for kernels of some kinds: prints each product's relative error."""

from __future__ import annotations

import sys

import numpy as np

from compute.cpu.pack import pack
from models.quant import to_float32
from tests.compute.test_kernels import product, weight


def main(kinds: list[str]) -> None:
    """Multiply with every kind once, all kernels loaded before the first product."""
    packed = {kind: pack(weight(kind)) for kind in kinds}
    x = np.random.default_rng(3).standard_normal((9, 512)).astype(np.float32)
    for _ in range(2):
        for kind in kinds:
            expected = x @ to_float32(weight(kind).data, kind).T
            error = np.abs(product(packed[kind], x) - expected).max() / np.abs(expected).max()
            print(f"{kind} {error:.1e}")
            assert error < 1e-4, kind


if __name__ == "__main__":
    main(sys.argv[1:])
