"""Functions of vectors that processors do not have: exponential, hyperbolic tangent."""

from __future__ import annotations

from typing import Any

import numpy as np

from compute.cpu.jit import inner
from compute.cpu.vector import (
    add,
    div,
    fma,
    larger,
    mul,
    nearest,
    power_of_two,
    splat,
    sub,
    where_less,
)

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(0.5)
_TWO, _ONE, _ZERO = np.float32(2), np.float32(1), np.float32(0)
_LOWEST, _HIGHEST = np.float32(-87), np.float32(88)


@inner
def exp(x: Any) -> Any:
    """e to the power of each lane, within 2 units in the last place; 0 below -87, e**88 above 88,
    NaN for NaN.

    Source: Cephes ``expf``.
    """
    held = where_less(splat(_HIGHEST), x, splat(_HIGHEST), x)  # NaN stays
    held = larger(held, splat(_LOWEST))
    n = nearest(mul(held, splat(_LOG2_E)))
    r = fma(n, splat(-_LN2_HIGH), held)
    r = fma(n, splat(-_LN2_LOW), r)
    p = fma(splat(_C0), r, splat(_C1))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_C3))
    p = fma(p, r, splat(_C4))
    p = fma(p, r, splat(_C5))
    p = fma(p, mul(r, r), add(r, splat(_ONE)))
    return where_less(x, splat(_LOWEST), splat(_ZERO), mul(p, power_of_two(n)))


@inner
def tanh(x: Any) -> Any:
    """Hyperbolic tangent of each lane."""
    e = exp(mul(x, splat(_TWO)))
    return sub(splat(_ONE), div(splat(_TWO), add(e, splat(_ONE))))
