"""A device is measured with its own engine, in about a second."""

from __future__ import annotations

import pytest

from compute.device_speed import measure


@pytest.mark.slow
def test_a_cpu_has_the_speed_of_its_kernels() -> None:
    weights_per_s, flops_per_s = measure("cpu:0", threads=1)
    assert 1e8 < weights_per_s < 1e13
    assert 2 * weights_per_s < flops_per_s < 1e15  # many positions share one reading of weights


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu:0'"):
        measure("tpu:0", threads=1)
