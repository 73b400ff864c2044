"""Placement is a pure decision: what fits is chosen, everything else comes with its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control.errors import NoPlacement
from control.load_options import BadOption, LoadOptions, MeshShape
from control.placement import decide
from control.placement_request import Defaults, Host, Request
from control.placement_types import Placement
from models.card import load_cards
from models.card_spec import kind_of_card, spec_of_card
from models.footprint import footprint
from models.legal import IllegalShares
from models.stored import Assumed
from tests.models.specs import FAMILIES, small

GB = 10**9
HOST = Host(name="n@host", limit_bytes=32 * GB, cores=4)
DEFAULTS = Defaults(context_tokens=128, num_slots=2)


def place(
    host: Host = HOST, *, family: str = "llama", defaults: Defaults = DEFAULTS, **options: Any
) -> Placement:
    spec = small(family)
    request = Request.of("m", LoadOptions(**options), spec, defaults)
    return decide(request, (host,), spec, None, "BF16")


def test_one_rank_is_chosen_where_it_fits_and_others_say_what_they_cost() -> None:
    placed = place()
    assert placed.chosen is not None
    assert placed.chosen.shape == MeshShape.even(1, 1)
    assert placed.chosen.ranks[0].limit_bytes == HOST.limit_bytes
    assert placed.chosen.ranks[0].threads == 4
    shapes = [one.shape for one in placed.rejected]
    assert MeshShape.even(2, 1) in shapes
    assert MeshShape.even(2, 2) in shapes
    for one in placed.rejected:
        assert one.refusal is None
        assert "more than 1x1" in one.why


def test_what_was_asked_for_is_taken() -> None:
    placed = place(tensor=2, pipeline=2, shares=(2.0, 1.0, 2.0, 1.0))
    assert placed.chosen is not None
    assert placed.chosen.shape.shares == (2, 1, 2, 1)
    ranks = placed.chosen.ranks
    assert [rank.threads for rank in ranks] == [1] * 4
    assert [len(rank.shard.kv_heads) for rank in ranks] == [3, 1, 3, 1]
    assert [rank.shard.layers for rank in ranks] == [range(3)] * 2 + [range(3, 6)] * 2
    assert all("2x2 with shares 2,1,2,1 was asked for" in one.why for one in placed.rejected)


def test_memory_of_all_ranks_counts_and_each_may_take_what_others_leave() -> None:
    alone = place().chosen
    two = place(tensor=2).chosen
    assert alone is not None
    assert two is not None
    limit_bytes = (alone.total_bytes + two.total_bytes) // 2
    host = replace(HOST, limit_bytes=limit_bytes + 1000, used_bytes=1000)
    assert place(host).chosen is not None
    refused = place(host, tensor=2)
    assert refused.chosen is None
    assert isinstance(refused.refusal, NoPlacement)
    text = str(refused.refusal)
    for words in ("as 2x1", "rank 0 needs", "rank 1 needs", "KV cache", "together", "n@host lends"):
        assert words in text
    roomy = place(replace(HOST, limit_bytes=two.total_bytes + 5), tensor=2).chosen
    assert roomy is not None
    assert [r.limit_bytes - r.needs.total_bytes for r in roomy.ranks] == [5, 5]


def test_nothing_fits_says_why_of_every_shape() -> None:
    placed = place(replace(HOST, limit_bytes=1000))
    assert placed.chosen is None
    assert isinstance(placed.refusal, NoPlacement)
    assert placed.refusal.shape == "1x1"
    assert all("n@host lends 0.00 GB" in one.why for one in placed.rejected)


def test_a_model_that_cannot_be_cut_so_names_every_limit_and_the_nearest() -> None:
    placed = place(tensor=9, pipeline=7)
    assert placed.chosen is None
    assert isinstance(placed.refusal, IllegalShares)
    text = str(placed.refusal)
    assert "9 tensor ranks, but 8 attention heads" in text
    assert "7 pipeline stages, but 6 layers" in text
    assert "Nearest that can: tensor shares 1,1,1,1,1,1,1,1, pipeline shares 1,1,1,1,1,1" in text


@settings(deadline=None)  # a busy machine is no fault of the rule
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tensor=st.integers(1, 4),
    pipeline=st.integers(1, 4),
    limit_bytes=st.integers(0, 2 * GB),
    across=st.booleans(),
)
def test_no_rank_is_placed_beyond_what_is_lent(
    family: str, tensor: int, pipeline: int, limit_bytes: int, across: bool
) -> None:
    host = replace(HOST, limit_bytes=limit_bytes)
    experts = "across" if across and small(family).experts is not None else ""
    placed = place(host, family=family, tensor=tensor, pipeline=pipeline, experts=experts)
    if placed.chosen is None:
        assert placed.refusal is not None
        return
    ranks = placed.chosen.ranks
    assert len(ranks) == tensor * pipeline
    assert sum(rank.needs.total_bytes for rank in ranks) <= limit_bytes
    assert all(rank.needs.total_bytes <= rank.limit_bytes for rank in ranks)


def test_defaults_fill_what_options_leave_open() -> None:
    defaults = Defaults(context_tokens=10_000, num_slots=3, threads=2, device="cpu")
    request = Request.of("m", LoadOptions(), small("llama"), defaults)
    assert (request.context_tokens, request.num_slots) == (256, 3)  # the model ends at 256
    assert (request.threads, request.device, request.shape) == (2, "cpu", None)
    other = Request.of("m", LoadOptions(context=64, engine="mlx"), small("llama"), defaults)
    assert (other.context_tokens, other.device) == (64, "")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": 257}, "context=257 is beyond the 256 tokens"),
        ({"experts": "across"}, "experts=across: this llama model has none"),
        ({"engine": "mlx"}, "n@host has no MLX"),
        ({"device": "mlx"}, "n@host has no MLX"),
        ({"threads": 5}, "threads=5: n@host lends 4 cores"),
    ],
)
def test_what_neither_model_nor_machine_can_do(options: dict[str, Any], named: str) -> None:
    with pytest.raises(BadOption, match=named):
        place(**options)


def test_gpus_have_memories_of_their_own_and_ranks_are_dealt_over_them() -> None:
    host = replace(HOST, cuda_bytes=(GB, GB))
    one = place(host).chosen
    assert one is not None
    assert (one.ranks[0].told, one.ranks[0].device) == ("", "cuda:0")
    two = place(host, tensor=2).chosen
    assert two is not None
    assert [rank.told for rank in two.ranks] == ["cuda:0", "cuda:1"]
    assert [rank.limit_bytes for rank in two.ranks] == [GB, GB]
    small_memory = replace(host, cuda_bytes=(10**6, GB))
    refused = place(small_memory, device="cuda:0")
    assert refused.chosen is None
    assert "cuda:0 of n@host has 0.00 GB" in str(refused.refusal)
    assert place(small_memory, device="cuda:1").chosen is not None
    assert place(small_memory, device="cpu").chosen is not None
    with pytest.raises(BadOption, match="has 2 CUDA devices"):
        place(host, device="cuda:2")


def test_apple_silicon_takes_mlx_unless_told_otherwise() -> None:
    host = replace(HOST, has_mlx=True, has_metal=True)
    chosen = place(host)
    assert chosen.engine == "mlx"
    assert chosen.chosen is not None
    assert chosen.chosen.ranks[0].kernels == "mlx"
    torch = place(host, engine="torch")
    assert torch.engine == "torch"
    assert torch.chosen is not None
    assert torch.chosen.ranks[0].told == "cpu"


def test_mlx_without_a_gpu_is_estimated_as_the_loader_does() -> None:
    chosen = place(replace(HOST, has_mlx=True), engine="mlx").chosen
    assert chosen is not None
    (rank,) = chosen.ranks
    assert rank.needs == footprint(
        small("llama"),
        Assumed("BF16"),
        rank.shard,
        kernels="mlx",
        device="mlx-cpu",
        context_tokens=DEFAULTS.context_tokens,
        num_slots=DEFAULTS.num_slots,
        threads=rank.threads,
    )


@pytest.mark.parametrize("card", load_cards().values(), ids=lambda card: card.id)
def test_a_card_is_enough_for_an_estimate(card: Any) -> None:
    spec = spec_of_card(card)
    request = Request.of(card.id, LoadOptions(context=1024), spec, DEFAULTS)
    placed = decide(request, (HOST,), spec, None, kind_of_card(card))
    assert placed.chosen is not None
    weights_bytes = placed.chosen.ranks[0].needs.weights_bytes
    assert 0.75 * card.size_bytes < weights_bytes < 1.25 * card.size_bytes
