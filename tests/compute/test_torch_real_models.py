"""Real models in torch: every mesh gives the greedy tokens of the engine that is tested most."""

from __future__ import annotations

from pathlib import Path

import pytest

from compute.engine import load_engine
from compute.stage import Row
from compute.torch.engine import TorchStage
from models.checkpoint import Checkpoint, open_checkpoint
from models.sharding import RankShard
from tests.compute.families import Mesh, Shape, cut
from tests.models.default_model import GEMMA3, SMOLLM2, model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SHAPES = [Shape(), Shape((2, 1, 1)), Shape((2, 1), (1, 1))]
TEXTS = ["The capital of France is", "def fibonacci(n):\n    "]
COUNT = 12


def load(checkpoint: Checkpoint, shard: RankShard) -> TorchStage:
    return TorchStage.load(
        checkpoint,
        shard,
        context_tokens=64,
        num_slots=len(TEXTS),
        threads=1,
        device="cpu",
        on_progress=lambda done, total: None,
    )


def greedy(path: Path, mesh: Mesh) -> list[list[int]]:
    """Prompts prefilled together, then decoded together."""
    encode = open_checkpoint(path).tokenizer().encode
    rows = [Row(slot, tuple(encode(text)), 0) for slot, text in enumerate(TEXTS)]
    answers: list[list[int]] = [[] for _ in TEXTS]
    for _ in range(COUNT):
        for row, logits in zip(rows, mesh.run(rows), strict=True):
            answers[row.slot].append(int(logits.argmax()))
        rows = [Row(row.slot, (answers[row.slot][-1],), row.start + len(row.ids)) for row in rows]
    return answers


def compiled(path: Path) -> list[list[int]]:
    """What the compiled kernels answer, one prompt after the other."""
    engine = load_engine(path, context_tokens=64, num_slots=1, threads=1, device="cpu")
    answers = []
    for text in TEXTS:
        row = Row(0, tuple(open_checkpoint(path).tokenizer().encode(text)), 0)
        answer: list[int] = []
        for _ in range(COUNT):
            answer.append(int(engine.forward([row])[0].argmax()))
            row = Row(0, (answer[-1],), row.start + len(row.ids))
        answers.append(answer)
    engine.close()
    return answers


@pytest.mark.parametrize("model", [SMOLLM2, GEMMA3])
def test_every_mesh_gives_the_greedy_tokens_of_the_compiled_kernels(model: str) -> None:
    path = model_path(model)
    expected = compiled(path)
    for shape in SHAPES:
        with cut(path, shape, load) as mesh:
            assert greedy(path, mesh) == expected, str(shape)
