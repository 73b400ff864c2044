"""Pages on real engines: scattered, shared, read in the step that writes them; and over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compute.stage import FloatArray, Row, Stage, load_stage
from compute.torch.engine import TorchStage
from models.footprint import most_sequences
from models.mesh import whole
from tests.compute.made import made
from tests.compute.mesh_processes import Mesh
from tests.models.specs import small
from tests.models.tiny import llama_tensors, write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # compiles on a fresh machine
CONTEXT, SLOTS = 200, 2


def load(family: str, kernels: str) -> Stage:
    checkpoint = made(small(family))
    shard = whole(checkpoint.spec)
    if kernels == "torch":
        return TorchStage.load(
            checkpoint,
            shard,
            context_tokens=CONTEXT,
            num_slots=SLOTS,
            threads=1,
            device="cpu",
            on_progress=lambda done, total: None,
        )
    return load_stage(
        checkpoint,
        shard,
        context_tokens=CONTEXT,
        num_slots=SLOTS,
        threads=1,
        device="mlx" if kernels == "mlx" else "cpu",
        on_progress=lambda done, total: None,
    )


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("llama", "compiled"),
        ("gemma3", "compiled"),
        ("gemma3", "torch"),
        ("deepseek_v2", "torch"),
        ("gemma3", "mlx"),
        ("deepseek_v2", "mlx"),
    ],
)
def test_where_pages_lie_and_whose_they_are_changes_no_logits(family: str, kernels: str) -> None:
    stage = load(family, kernels)
    assert stage.kernels == kernels
    assert stage.num_sequences == most_sequences(SLOTS) == 8
    assert stage.num_pages == SLOTS * 4
    vocab = stage.spec.vocab_size
    ids = tuple(int(i) for i in np.random.default_rng(3).integers(0, vocab, 150))
    (plain,) = stage.run([Row(0, ids, 0)], None, None)
    (after,) = stage.run([Row(0, (5,), 150)], None, None)

    def close(found: FloatArray, wanted: FloatArray) -> None:
        if kernels == "compiled":
            np.testing.assert_array_equal(found, wanted)  # the same bits
        else:
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)

    # Two pages out of order, then a third; the last slot there is.
    stage.run([Row(7, ids[:100], 0, want_logits=False, pages=(6, 2))], None, None)
    close(stage.run([Row(7, ids[100:], 100, pages=(4,), first_page=2)], None, None)[0], plain)
    # Who begins alike shares two pages, and computes the rest beside the first.
    rows = [Row(7, (5,), 150), Row(3, ids[128:], 128, pages=(6, 2, 7))]
    found = stage.run(rows, None, None)
    close(found[0], after)
    close(found[1], plain)
    # A page that another row of the same step fills.
    rows = [
        Row(1, ids[:128], 0, want_logits=False, pages=(0, 5)),
        Row(2, ids[128:], 128, pages=(0, 5, 3)),
    ]
    close(stage.run(rows, None, None)[0], plain)
    with pytest.raises(ValueError, match="pages must be"):
        stage.run([Row(0, (1,), 0, pages=(8,))], None, None)
    stage.close()


def test_a_prefix_that_was_there_gives_the_same_tokens_on_every_mesh(tmp_path: Path) -> None:
    """Alone, behind others that began alike, and among 16 others with memory for four."""
    path = write_gguf(tmp_path / "tiny.gguf", llama_tensors())
    rng = np.random.default_rng(5)
    shared = [int(i) for i in rng.integers(0, 128, 70)]
    prompts = [[*shared, *(int(i) for i in rng.integers(0, 128, 1 + n % 5))] for n in range(17)]
    answers = []
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2)):
        with Mesh(path, tensor=tensor, pipeline=pipeline, context_tokens=96) as mesh:
            mesh.load()
            alone = mesh.generate(prompts[:1], 12)
            assert alone["cached"] == [0]
            in_turn = mesh.generate(prompts, 12, in_turn=True)
            assert in_turn["cached"] == [0] + [64] * 16
            assert in_turn["ids"][0] == alone["ids"][0]
            together = mesh.generate(prompts, 12)
            assert together["ids"] == in_turn["ids"]
            answers.append(in_turn["ids"])
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
