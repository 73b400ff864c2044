"""Real models in torch: every mesh gives the greedy tokens of the engine that is tested most."""

from __future__ import annotations

import json
import subprocess
import sys
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


LOADING = """
import json, sys
from pathlib import Path
import torch
from compute.torch.engine import TorchStage
from models.checkpoint import open_checkpoint
from models.mesh import grid, mesh, units_of

def resident_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

checkpoint = open_checkpoint(Path(sys.argv[1]))
spec = checkpoint.spec
shard = mesh(spec, grid((1, 1)), units=units_of(spec, checkpoint), split_embedding=True)[1]
torch.randn(64, 64) @ torch.randn(64, 64)  # the library's own buffers
before = resident_bytes("VmRSS")
stage = TorchStage.load(
    checkpoint, shard, context_tokens=64, num_slots=1, threads=1, device="cpu",
    on_progress=lambda done, total: None,
)
print(json.dumps([stage.weights_bytes, resident_bytes("VmHWM") - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_never_holds_much_more_than_the_slice() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(model_path(SMOLLM2))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    slice_bytes, peak_bytes = json.loads(done.stdout)
    assert slice_bytes > 200e6
    assert peak_bytes < 1.3 * slice_bytes
