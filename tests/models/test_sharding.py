"""Plans and shards of every family: each weight has one rule, each part one owner."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.layout import expected_tensors
from models.legal import GROUP, IllegalShares, unit_for, validate
from models.mesh import Costs, Units, grid, heads, mesh, stages, weight_costs, whole
from models.plans import PLANS, UnmatchedWeight, rule_for, slices_of
from models.sharding import Along, RankShard, Rule, Split, cut, whole_features
from models.spec import ModelSpec
from tests.models.specs import FAMILIES, small

SPECS = {name: small(name) for name in FAMILIES}
NAMES = st.sampled_from(sorted(FAMILIES))
SHARE = st.one_of(st.integers(1, 9), st.floats(0.1, 50))


def smollm() -> ModelSpec:
    return small("llama-tied", num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_matches_one_rule_that_fits_its_shape(name: str) -> None:
    spec = SPECS[name]
    kept = slices_of(spec, whole(spec))
    for weight, shape in expected_tensors(spec).items():
        assert rule_for(spec.family, weight) in PLANS[spec.family].values()
        assert kept[weight] == tuple(slice(0, size) for size in shape)


def test_every_line_of_every_plan_is_some_models_weight() -> None:
    used: dict[str, set[str]] = {family: set() for family in PLANS}
    for name in FAMILIES:
        for spec in (SPECS[name], small(name, tie_word_embeddings=False)):
            for weight in expected_tensors(spec):
                parts = weight.split(".")
                used[spec.family].add(".".join("*" if p.isdigit() else p for p in parts))
    assert used == {family: set(plan) for family, plan in PLANS.items()}


def test_a_weight_without_a_rule_is_named() -> None:
    with pytest.raises(UnmatchedWeight, match=r"'layers\.3\.mlp\.router\.weight'.*qwen3_moe"):
        rule_for("qwen3_moe", "layers.3.mlp.router.weight")


def test_a_rule_that_does_not_fit_its_tensor_is_an_error() -> None:
    spec = SPECS["llama"]
    everything = whole(spec)
    with pytest.raises(ValueError, match="outside shape"):
        cut(Rule(Split.SHARDED_TO_ALL, Along.FFN), (96, 64), everything, spec)
    with pytest.raises(ValueError, match="outside shape"):
        cut(Rule(Split.SHARDED_TO_ALL, Along.FFN), (160,), everything, spec)


def meshes(name: str, tensor: list[float], pipeline: list[float], **options: Any) -> Any:
    return mesh(SPECS[name], grid(tensor, pipeline), **options)


@settings(max_examples=60, deadline=None)
@given(
    name=NAMES,
    tensor=st.lists(SHARE, min_size=1, max_size=4),
    pipeline=st.lists(SHARE, min_size=1, max_size=4),
    across=st.booleans(),
    split=st.booleans(),
)
@pytest.mark.slow
def test_cuts_tile_every_weight(
    name: str, tensor: list[float], pipeline: list[float], across: bool, split: bool
) -> None:
    """Copies are on every rank of a stage; of the rest each element has exactly one owner.

    Where KV heads are replicated, their keys and values have as many owners as ranks hold them.
    """
    spec = SPECS[name]
    options: dict[str, Any] = {"experts": "across" if across else "inside"}
    shards = meshes(name, tensor, pipeline, split_embedding=split, **options)
    assert shards == meshes(name, tensor, pipeline, split_embedding=split, **options)
    assert [shard.rank for shard in shards] == list(range(len(tensor) * len(pipeline)))
    kept = [slices_of(spec, shard) for shard in shards]
    world = len(tensor)
    for weight, shape in expected_tensors(spec).items():
        owners = np.zeros(shape, dtype=int)
        for part in kept:
            if weight in part:
                owners[part[weight]] += 1
        rule = rule_for(spec.family, weight)
        if weight == "embed_tokens.weight":
            assert owners.min() >= 1
        elif rule.split is Split.COPY:
            assert (owners == world).all()
        elif rule.along is Along.KV_HEADS:
            assert owners.min() >= 1
            assert (owners == 1).all() or world > spec.num_kv_heads
        else:
            assert (owners == 1).all(), weight


@pytest.mark.slow
@settings(deadline=None)
@given(name=NAMES, tensor=st.lists(SHARE, min_size=1, max_size=4))
def test_no_head_or_block_is_cut_and_queries_are_with_their_keys(
    name: str, tensor: list[float]
) -> None:
    spec = SPECS[name]
    per_kv = spec.num_heads // spec.num_kv_heads
    for shard in mesh(spec, grid(tensor)):
        served = {query // per_kv for query in shard.query_heads}
        assert served == set(shard.kv_heads)
        assert len(shard.query_heads) == len(shard.kv_heads) * shard.queries_a_kv_head
        experts = spec.experts
        dims = [(shard.ffn, spec.ffn_size), (shard.vocab, spec.vocab_size)]
        if experts is not None:
            dims += [(shard.expert_ffn, experts.ffn_size)]
            dims += [(shard.shared_ffn, experts.num_shared * experts.ffn_size)]
        for part, size in dims:
            unit = unit_for(size, GROUP, len(tensor))
            assert part.start % unit == 0
            assert part.stop % unit == 0 or part.stop == size


@pytest.mark.slow
@settings(deadline=None)
@given(
    num_kv=st.integers(1, 9),
    per_kv=st.integers(1, 8),
    shares=st.lists(SHARE, min_size=1, max_size=12),
)
def test_heads_go_to_every_rank_and_nowhere_twice(
    num_kv: int, per_kv: int, shares: list[float]
) -> None:
    spec = small("llama", num_attention_heads=num_kv * per_kv, num_key_value_heads=num_kv)
    if len(shares) > spec.num_heads:
        with pytest.raises(ValueError, match="cannot"):
            heads(spec, shares)
        return
    parts = heads(spec, shares)
    assert [query for _, queries in parts for query in queries] == list(range(spec.num_heads))
    assert sorted({head for kv, _ in parts for head in kv}) == list(range(num_kv))
    if len(shares) <= num_kv:
        ideal = [share * num_kv / math.fsum(shares) for share in shares]
        if min(ideal) >= 1 + 1e-9:
            assert all(
                abs(len(kv) - want) < 1 + 1e-9 for (kv, _), want in zip(parts, ideal, strict=True)
            )
    else:
        assert all(len(kv) == 1 for kv, _ in parts)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1, 1], [(2, 6), (1, 3)]),
        ([2, 1], [(2, 6), (1, 3)]),
        ([1, 2], [(1, 3), (2, 6)]),
        ([1, 1, 1], [(1, 3)] * 3),
        ([1, 1, 1, 1], [(1, 3), (1, 3), (1, 2), (1, 1)]),
    ],
)
def test_nine_heads_with_three_kv_heads(
    shares: list[float], expected: list[tuple[int, int]]
) -> None:
    assert [(len(kv), len(queries)) for kv, queries in heads(smollm(), shares)] == expected


@pytest.mark.parametrize(
    ("shares", "queries"),
    [([1, 1], [2, 2]), ([3, 1], [3, 1]), ([1, 1, 1], [2, 1, 1]), ([1] * 4, [1] * 4)],
)
def test_gemmas_one_kv_head_is_on_every_rank(shares: list[float], queries: list[int]) -> None:
    spec = SPECS["gemma3"]
    shards = mesh(spec, grid(shares))
    assert [shard.kv_heads for shard in shards] == [range(1)] * len(shares)
    assert [len(shard.query_heads) for shard in shards] == queries
    kept = slices_of(spec, shards[1])
    assert kept["layers.0.self_attn.k_proj.weight"][0] == slice(0, 16)
    assert kept["layers.0.self_attn.q_proj.weight"][0].start == queries[0] * 16


def test_a_latent_head_has_its_own_sizes() -> None:
    spec = SPECS["deepseek_v3"]
    assert [
        whole_features(spec, whole) for whole in ("head_dim", "value_dim", "key_value_dim")
    ] == [
        24,
        12,
        28,
    ]
    second = mesh(spec, grid([1, 1]))[1]
    kept = slices_of(spec, second)
    assert kept["layers.5.self_attn.q_b_proj.weight"][0] == slice(96, 192)
    assert kept["layers.5.self_attn.kv_b_proj.weight"][0] == slice(112, 224)
    assert kept["layers.5.self_attn.o_proj.weight"][1] == slice(48, 96)
    assert kept["layers.5.self_attn.kv_a_proj_with_mqa.weight"][0] == slice(0, 40)
    assert kept["layers.5.mlp.shared_experts.down_proj.weight"][1] == slice(96, 144)


def test_a_bias_of_a_sum_is_on_the_first_rank_alone() -> None:
    first, second = (
        slices_of(SPECS["llama"], shard) for shard in mesh(SPECS["llama"], grid([1, 1]))
    )
    assert "layers.0.self_attn.o_proj.bias" in first
    assert "layers.0.mlp.down_proj.bias" not in second
    assert second["layers.0.mlp.up_proj.bias"] == (slice(96, 160),)


def test_experts_are_cut_inside_or_dealt_out() -> None:
    spec = SPECS["mixtral"]
    inside = mesh(spec, grid([3, 1]))
    assert [(len(s.experts), s.expert_ffn) for s in inside] == [
        (4, range(128)),
        (4, range(128, 160)),
    ]
    across = mesh(spec, grid([3, 1]), experts="across")
    assert [(s.experts, len(s.expert_ffn)) for s in across] == [(range(3), 160), (range(3, 4), 160)]
    assert "layers.0.mlp.experts.3.up_proj.weight" not in slices_of(spec, across[0])


def test_ends_of_a_pipeline_and_a_tied_output() -> None:
    spec = SPECS["llama-tied"]
    shards = mesh(spec, grid([1, 1], [1, 1, 1]))
    embedding = [slices_of(spec, shard).get("embed_tokens.weight") for shard in shards]
    vocab = [slice(0, 128), slice(128, 200)]
    every = slice(0, 96)
    assert embedding[:2] == [(slice(0, 200), every)] * 2
    assert embedding[2:4] == [None, None]
    assert embedding[4:] == [(rows, every) for rows in vocab]
    assert [("norm.weight" in slices_of(spec, shard)) for shard in shards] == [False] * 4 + [
        True
    ] * 2
    assert [s.is_first() for s in shards] == [True, True, False, False, False, False]
    assert [s.is_last() for s in shards] == [False] * 4 + [True] * 2
    untied = slices_of(SPECS["llama"], mesh(SPECS["llama"], grid([1, 1]))[1])
    assert untied["lm_head.weight"][0] == vocab[1]


def test_blocks_of_256_stay_whole_until_ranks_outnumber_them() -> None:
    spec = small("llama", intermediate_size=768)
    units = Units(ffn=256)

    def cuts(world: int) -> list[int]:
        return [shard.ffn.stop for shard in mesh(spec, grid([1] * world), units=units)]

    assert cuts(2) == [512, 768]
    assert cuts(3) == [256, 512, 768]
    assert cuts(4) == [192, 384, 576, 768]
    assert unit_for(20, 256, 3) == 1


@pytest.mark.parametrize("name", sorted(SPECS))
def test_names_and_costs_are_those_of_every_single_tensor(name: str) -> None:
    """What follows from a spec is kept: equal specs share it, and nobody can change it."""
    spec = SPECS[name]
    tensors: Any = expected_tensors(spec)
    with pytest.raises(TypeError):
        tensors["norm.weight"] = (1,)
    assert expected_tensors(dataclasses.replace(spec)) is tensors
    costs = weight_costs(spec)
    for layer, cost in enumerate(costs.layers):
        own = [n for n in tensors if n.startswith(f"layers.{layer}.")]
        assert cost == sum(math.prod(tensors[n]) for n in own)
    assert next(iter(tensors)) == "embed_tokens.weight"
    assert list(tensors)[-1] == ("norm.weight" if spec.tied_embeddings else "lm_head.weight")
    assert list(slices_of(spec, whole(spec))) == list(tensors)


def test_stages_weigh_the_ends() -> None:
    even = Costs(layers=(1.0,) * 8)
    assert [len(part) for part in stages(even, [1, 1])] == [4, 4]
    assert [len(part) for part in stages(even, [3, 1])] == [6, 2]
    heavy = Costs(layers=(1.0,) * 8, first=2, last=2)
    assert [len(part) for part in stages(heavy, [1, 1, 1])] == [2, 4, 2]
    spec = smollm()
    costs = weight_costs(spec)
    assert costs.first == 200 * 96
    assert costs.last == 200 * 96 + 96


def test_shares_of_every_rank_of_a_mesh() -> None:
    """Two stages whose machines differ: each stage divides by its own ranks."""
    shards = mesh(smollm(), [[1, 1, 1], [6, 3, 3]])
    assert [len(shard.layers) for shard in shards] == [1] * 3 + [5] * 3
    assert [len(shard.ffn) for shard in shards[3:]] == [96, 32, 32]
    assert shards[4].tensor.shares == (6, 3, 3)
    with pytest.raises(ValueError, match="must be equal"):
        mesh(smollm(), [[1], [1, 1]])
    with pytest.raises(ValueError, match="1 costs for 6 layers"):
        mesh(smollm(), [[1]], costs=Costs(layers=(1,)))


@pytest.mark.slow
@settings(deadline=None)
@given(name=NAMES, tensor=st.lists(st.integers(-1, 9), max_size=12), across=st.booleans())
def test_the_nearest_legal_shares_are_legal(name: str, tensor: list[int], across: bool) -> None:
    spec = SPECS[name]
    found = validate(spec, tensor, [1] * 9, across=across)
    assert found  # nine stages for six layers, at least
    nearest = found[0]
    assert len({(v.nearest_shares, v.nearest_pipeline) for v in found}) == 1
    again = nearest.nearest_shares, nearest.nearest_pipeline
    assert validate(spec, *again, across=across) == []
    shards = mesh(spec, grid(*again), experts="across" if across else "inside")
    assert len(shards) == len(again[0]) * len(again[1])
    if not [v for v in found if v.what != "layers"]:
        assert nearest.nearest_shares == tuple(tensor)


def test_every_violation_comes_at_once_with_its_numbers() -> None:
    spec = smollm()
    found = {v.what: v for v in validate(spec, [1, 2] * 60, [1, 0])}
    assert set(found) == {"attention heads", "KV heads", "hidden size", "pipeline shares"}
    assert found["attention heads"].text == "120 tensor ranks, but 9 attention heads"
    assert (found["KV heads"].found, found["KV heads"].limit) == (120, 9)
    assert found["KV heads"].nearest_shares == (2,) * 9
    assert found["KV heads"].nearest_pipeline == (1,)
    with pytest.raises(IllegalShares, match=r"9 attention heads;.*Nearest.*1,1,1,1,1,1,1,1,1"):
        mesh(spec, grid([1] * 10))
    for bad in ([], [0.0], [math.nan], [-1.0, 2.0]):
        with pytest.raises(IllegalShares, match="positive"):
            mesh(spec, [bad])
    with pytest.raises(IllegalShares):
        mesh(spec, [])


def test_what_the_seed_refused_is_done() -> None:
    """No dimension need be a multiple of the number of ranks."""
    spec = small("llama", num_attention_heads=7, num_key_value_heads=7, intermediate_size=100)
    assert validate(spec, [1, 1, 1], [1, 1, 1, 1]) == []
    shard: RankShard = mesh(spec, grid([1, 1, 1], [1, 1, 1, 1]))[2]
    assert (shard.kv_heads, shard.ffn, shard.layers) == (range(5, 7), range(96, 100), range(1))
