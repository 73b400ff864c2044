"""Small random models on meshes of real processes, with every kind of kernels: one rank's tokens.

The families with experts and latent attention have no real model small enough; theirs are made
here, and loaded from their files by each rank as a port loads them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compute.random_model import FAMILIES, RandomCheckpoint, small_spec
from tests.compute.mesh_processes import Mesh
from tests.compute.mesh_rank import Rank
from tests.models.tiny import write_safetensors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPTS = [[5, 6, 7], list(range(100, 140)), [999, 1, 500, 250, 125]]
COUNT = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``family -> folder`` with a configuration and float32 weights."""
    found = {}
    for family in ("deepseek_v3", "qwen3_moe"):
        folder = found[family] = tmp_path_factory.mktemp(family)
        config = {**FAMILIES[family], "model_type": family}
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = RandomCheckpoint(small_spec(family), seed=3)
        weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        write_safetensors(
            folder / "model.safetensors",
            {
                name if name.startswith("lm_head") else f"model.{name}": (
                    "F32",
                    weight.shape,
                    weight.dequantize().tobytes(),
                )
                for name, weight in weights.items()
            },
        )
    return found


def alone(path: Path, device: str) -> list[list[int]]:
    """Greedy tokens of one rank, here."""
    rank = Rank()
    order: dict[str, Any] = {"instance": "test", "epoch": 1, "rank": 0, "path": str(path)}
    rank.answer({"load": {**order, "context_tokens": 128, "threads": 1, "device": device}})
    found: list[list[int]] = rank.answer({"generate": PROMPTS, "count": COUNT})["ids"]
    assert rank.loaded is not None
    rank.loaded.stage.close()
    assert [len(ids) for ids in found] == [COUNT] * len(PROMPTS)
    assert len({token for ids in found for token in ids}) > COUNT  # it does not repeat itself
    return found


def on_mesh(path: Path, kernels: str, **shape: Any) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """What the ranks of a mesh say of themselves, and their tokens."""
    with Mesh(path, context_tokens=128, **shape) as mesh:
        mesh.load()
        assert all("error" not in facts for facts in mesh.facts), mesh.facts
        assert {facts["kernels"] for facts in mesh.facts} == {kernels}
        return mesh.facts, mesh.generate(PROMPTS, COUNT, chunk=16)["ids"]


def test_deepseeks_experts_are_dealt_out_over_two_by_two_ranks(folders: dict[str, Path]) -> None:
    path = folders["deepseek_v3"]
    facts, ids = on_mesh(path, "torch", tensor=2, pipeline=2, experts="across")
    assert [one["experts"] for one in facts] == [[0, 8], [8, 16]] * 2
    assert facts[0]["layers"][1] == facts[2]["layers"][0]
    assert ids == alone(path, "cpu")


def test_qwens_experts_are_cut_over_two_ranks(folders: dict[str, Path]) -> None:
    path = folders["qwen3_moe"]
    facts, ids = on_mesh(path, "compiled", tensor=2, experts="inside", shares=[2, 1])
    assert [one["experts"] for one in facts] == [[0, 16]] * 2
    assert ids == alone(path, "cpu")


def test_mlx_ranks_in_a_ring_and_in_a_pipeline(folders: dict[str, Path]) -> None:
    pytest.importorskip("mlx.core")
    path = folders["qwen3_moe"]
    expected = alone(path, "mlx")
    assert on_mesh(path, "mlx", device="mlx", tensor=2)[1] == expected
    assert on_mesh(path, "mlx", device="mlx", pipeline=2)[1] == expected
