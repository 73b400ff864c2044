"""Rotation frequencies of a RopeSpec: the one place where its scaling kinds get their meaning."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec) -> tuple[npt.NDArray[np.float32], float]:
    """Angle per position of each rotated pair, and the factor on cos and sin.

    Returns:
        ``(frequencies, factor)``: float32 (dim/2,), and 1.0 except for yarn. Feature ``i`` pairs
        with ``i + dim/2``; its angle at position p is ``p * frequencies[i]``.

    Source: Su et al. 2021 (RoPE); Llama 3.1 (``llama3``); Peng et al. 2023, YaRN (``yarn``);
        transformers ``modeling_rope_utils``, whose formulas these match.
    """
    pairs = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    base = (1.0 / np.power(np.float32(rope.theta), pairs)).astype(np.float32)
    match rope.scaling:
        case "none":
            return base, 1.0
        case "linear":
            return (base / np.float32(rope.factor)).astype(np.float32), 1.0
        case "divisors":
            return (base / np.asarray(rope.divisors, dtype=np.float32)).astype(np.float32), 1.0
        case "llama3":
            return _llama3(rope, base), 1.0
        case "yarn":
            return _yarn(rope, base)


def _llama3(rope: RopeSpec, base: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    wavelength = 2 * math.pi / base
    low = rope.original_context / rope.low_freq_factor
    high = rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * base / rope.factor + smooth * base
    scaled = np.where(wavelength > low, base / rope.factor, base)
    medium = (wavelength <= low) & (wavelength >= high)
    return np.where(medium, between, scaled).astype(np.float32)


def _yarn(rope: RopeSpec, base: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
    def pair_at(rotations: float) -> float:
        return (rope.dim * math.log(rope.original_context / (rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low = max(math.floor(pair_at(rope.beta_fast)), 0)
    high = min(math.ceil(pair_at(rope.beta_slow)), rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0, 1)
    frequencies = (base / rope.factor) * (1 - keep) + base * keep
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        factor = mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = mscale(rope.factor, 1.0)
    return frequencies.astype(np.float32), factor


def mscale(factor: float, strength: float) -> float:
    """YaRN's temperature for a context extension of ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0
