"""What there is to know of each engine's memory: how it keeps weights, keys, and its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from models.memory import Packing

Kernels = Literal["compiled", "torch", "mlx"]
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What there is to know of one engine on one kind of device.

    Attributes:
        packing: how matrices lie in memory.
        kv_bytes_per_element: of a remembered number.
        process_bytes: resident memory of a port's process beside its model: interpreter,
            libraries, compiled code; on a GPU what the driver and libraries keep there.
        network_bytes: beside that, where ranks of other machines are met: PyTorch's libraries,
            in which gloo comes.
    """

    packing: Packing
    kv_bytes_per_element: int
    process_bytes: int
    network_bytes: int = 0


# Bytes of a block of 32 outputs by 32 inputs, see compute.cpu.layout.BLOCK_BYTES; formats are
# those of compute.cpu.stored.TAKE_APART. Whatever is not listed is kept as float32.
_BLOCK_BYTES: Final = {
    "F32": 4096,
    "F16": 2048,
    "BF16": 2048,
    "Q4_1": 640,
    **dict.fromkeys(("Q5_0", "Q8_0"), 1088),
    **dict.fromkeys(("Q4_0", "Q4_K"), 768),
    **dict.fromkeys(("Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K"), 1536),
}
# Bits of a weight that stays packed on MLX, with two factors for each 32; see compute.mlx.pack.
_MLX_BITS: Final = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}
_ROUTER: Final = ".mlp.gate.weight"  # always float32
_EXPANSION: Final = ".kv_b_proj.weight"  # of latent attention: taken apart by head, never packed


def _mlx(size: int, process_bytes: int) -> Figures:
    """With activations of ``size`` bytes."""
    packed = {kind: (4 * bits + 2 * size) / 32 for kind, bits in _MLX_BITS.items()}
    return Figures(
        packing=Packing(
            bytes_per_weight=packed,
            otherwise=float(size),
            group=32,
            by_name={_ROUTER: 4.0, _EXPANSION: float(size)},
        ),
        kv_bytes_per_element=size,
        process_bytes=process_bytes,
        network_bytes=190 * MIB,
    )


# Processes: compute.bench_memory on Linux x86-64 with CPython 3.11, torch 2.13 (CPU build) and
# mlx 0.32. With compiled kernels 156 MiB before loading, 6 more behind a first step; all of it
# with code from the cache: a process that compiles itself takes 40 to 90 MiB more. A port on a
# CPU has the kernels in memory also where torch or MLX then multiplies. Two are not measured:
# CUDA's context with cuBLAS is NVIDIA's 0.5 GiB and some, MLX on Metal is its 43 MiB on Linux
# without the kernels and some.
FIGURES: Final[Mapping[tuple[Kernels, str], Figures]] = {
    ("compiled", "cpu"): Figures(
        packing=Packing(
            bytes_per_weight={kind: size / 1024 for kind, size in _BLOCK_BYTES.items()},
            otherwise=4.0,
            tile=(32, 32),
            group=32,
        ),
        kv_bytes_per_element=4,
        process_bytes=162 * MIB,
        network_bytes=190 * MIB,
    ),
    ("torch", "cpu"): Figures(
        packing=Packing(
            bytes_per_weight={"F16": 2.0, "BF16": 2.0},
            otherwise=4.0,
            by_name={_ROUTER: 4.0, _EXPANSION: 4.0},
        ),
        kv_bytes_per_element=4,
        process_bytes=350 * MIB,
    ),
    ("torch", "cuda"): Figures(
        packing=Packing(otherwise=2.0, by_name={_ROUTER: 4.0}),
        kv_bytes_per_element=2,
        process_bytes=600 * MIB,
    ),
    ("mlx", "mlx"): _mlx(2, 60 * MIB),
    ("mlx", "mlx-wide"): _mlx(4, 190 * MIB),
}
