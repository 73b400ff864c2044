"""Whether a rank fits is said before it loads, with what would need the room."""

from __future__ import annotations

import pytest

from models.errors import NoRoom
from models.footprint import Footprint, check_room, footprint, kernels_for
from models.mesh import grid, mesh
from models.stored import Assumed
from tests.models.specs import FAMILIES, small

MIB = 1 << 20
NEEDED = Footprint(
    weights_bytes=100 * MIB, kv_bytes=50 * MIB, workspace_bytes=5 * MIB, process_bytes=162 * MIB
)


def test_a_rank_that_does_not_fit_says_what_it_would_need() -> None:
    check_room(NEEDED, NEEDED.total_bytes)
    check_room(NEEDED, 0)  # no limit
    with pytest.raises(NoRoom) as caught:
        check_room(NEEDED, NEEDED.total_bytes - 1)
    assert caught.value.kind == "no_room"
    assert caught.value.needed_bytes == 317 * MIB
    assert str(caught.value) == (
        "no room: this rank needs 317.0 MiB (weights 100.0 MiB, keys and values 50.0 MiB, "
        "workspace 5.0 MiB, process 162.0 MiB) and may take 317.0 MiB. Load over more ranks, "
        "with less context or fewer slots, or pick a smaller quantization."
    )


def of(family: str, device: str, kind: str = "Q4_K", **sizes: int) -> Footprint:
    spec = small(family)
    return footprint(
        spec,
        Assumed(kind),
        mesh(spec, grid([1]))[0],
        kernels=kernels_for(spec, device),
        device=device,
        context_tokens=sizes.get("context_tokens", 128),
        num_slots=sizes.get("num_slots", 2),
        threads=sizes.get("threads", 1),
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mlx", "mlx-cpu"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_more_context_slots_and_threads_never_take_less(family: str, device: str) -> None:
    least = of(family, device)
    assert least.total_bytes > least.process_bytes > 0
    for sizes in ({"context_tokens": 256}, {"num_slots": 5}, {"threads": 4}):
        more = of(family, device, "Q4_K", **sizes)
        assert more.weights_bytes == least.weights_bytes
        assert more.total_bytes >= least.total_bytes
    assert of(family, device, context_tokens=256).kv_bytes == 2 * least.kv_bytes


def test_a_plain_model_is_kept_in_single_precision_on_mlx() -> None:
    halves, whole = of("llama", "mlx", "BF16"), of("llama", "mlx", "F32")
    assert whole.kv_bytes == 2 * halves.kv_bytes
    assert whole.weights_bytes > 1.9 * halves.weights_bytes


def test_what_runs_nowhere() -> None:
    spec = small("llama")
    for kernels, device, threads in (
        ("compiled", "cuda", 1),
        ("torch", "tpu", 1),
        ("mlx", "mlx", 0),
    ):
        with pytest.raises(ValueError, match=f"no {kernels} kernels on '{device}'"):
            footprint(
                spec,
                Assumed("F16"),
                mesh(spec, grid([1]))[0],
                kernels=kernels,  # type: ignore[arg-type]  # a list of texts
                device=device,
                context_tokens=1,
                num_slots=1,
                threads=threads,
            )
