"""The check of a GPU: what it says without one, and its checks on the CPU in its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compute.cuda_check import check_company, check_two_ranks, check_types, errors, main
from compute.random_model import FAMILIES, RandomCheckpoint, small_spec
from models.errors import UnsupportedModel
from models.layout import expected_tensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no cuda:0 here" in capsys.readouterr().out
    assert main(["--device", "cpu"]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_all_is_well_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0, capsys.readouterr().out


def test_the_checks_hold_on_a_cpu() -> None:
    findings = [
        *check_types("cpu", ["deepseek_v3"]),
        *check_company("cpu", ["qwen3_moe"]),
        *check_two_ranks("cpu", [("deepseek_v3", "float32")]),
    ]
    assert all(finding.good for finding in findings), findings
    assert len(findings) == 3


def test_errors_are_relative_to_each_row() -> None:
    expected = np.array([[1, -10], [2, 4], [0, 8]], dtype=np.float32)
    found = expected + np.array([[1, 0], [0, 0], [0, 4]], dtype=np.float32)
    assert errors(found, expected) == pytest.approx((0.5, 0.1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_checkpoint_has_the_weights_of_its_spec(name: str) -> None:
    model, other = RandomCheckpoint(small_spec(name)), RandomCheckpoint(small_spec(name), seed=1)
    expected = expected_tensors(model.spec)
    assert model.names() == list(expected)
    for tensor in ("norm.weight", "layers.0.input_layernorm.weight", "embed_tokens.weight"):
        values = model.tensor(tensor).dequantize()
        assert values.shape == expected[tensor]
        np.testing.assert_array_equal(values, model.tensor(tensor).dequantize())
        assert not np.array_equal(values, other.tensor(tensor).dequantize())
    assert model.size_bytes == sum(model.tensor(tensor).size_bytes for tensor in model.names())
    with pytest.raises(UnsupportedModel, match="no words"):
        model.tokenizer()
