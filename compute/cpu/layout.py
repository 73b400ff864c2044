"""How a weight matrix lies in memory for the kernels: tiles of 32 outputs by groups of 32 inputs.

A matrix is ``(tiles, groups, block)``. Within a block the 32 outputs of one input lie side by
side, so that a vector runs over outputs and never needs a sum across its lanes. Scales lie behind
the numbers they belong to: a matrix is read as one stream. Activations use the same groups:
``(groups, rows, 32)`` float32, so the outputs of a tile are a group of the next product's input.

``kind`` says what a block holds; every kind represents the file's numbers exactly:

========  ====================================================================================
F32       32 x 32 float32
F16       32 x 32 IEEE half
BF16      32 x 32 bfloat16
Q4H       16 x 32 bytes (low nibble: input j, high: input j + 16), 32 half scales, 32 half offsets
Q8H       32 x 32 int8, 32 half scales
Q4S       as Q4H with float32 scales and offsets
Q8S       32 x 32 int8, 2 x 32 float32 scales, 2 x 32 float32 offsets: one for each 16 inputs
========  ====================================================================================
"""

from __future__ import annotations

TILE = 32  # outputs
GROUP = 32  # inputs

F32, F16, BF16, Q4H, Q8H, Q4S, Q8S = range(7)
BLOCK_BYTES = (4096, 2048, 2048, 640, 1088, 768, 1536)
Q4_BYTES, Q8_BYTES = 512, 1024  # where the scales begin


def padded(size: int) -> int:
    """``size`` rounded up to whole groups."""
    return -(-size // GROUP) * GROUP
