"""Carries out a load order: this rank's shard, its weights, its place among the other ranks."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.term import Atom, Term
from bridge.text import text_of
from compute.engine import StageEngine, check_limits
from compute.errors import BadRequest
from compute.links import Links, Meeting, meet
from compute.places import Listeners, place_of
from compute.requests import LoadOrder
from compute.stage import Progress, Row, Stage, best_device, load_stage
from models.checkpoint import Checkpoint, open_checkpoint
from models.footprint import check_room, footprint, kernels_for
from models.mesh import mesh, units_of
from models.sharding import RankShard


@dataclass(frozen=True, slots=True)
class Loaded:
    """A rank that is ready: on the head an engine for the worker, elsewhere a stage to follow."""

    stage: Stage
    links: Links
    engine: StageEngine | None


def load(order: LoadOrder, listeners: Listeners | None, on_progress: Progress) -> Loaded:
    """Load one rank and meet the others; the head then runs a first step through all of them.

    Args:
        listeners: of this rank's place; taken over. None where it was not prepared.

    Raises:
        BadRequest: the order contradicts itself.
        ModelError: the file is damaged, or cannot be cut so, or no engine here runs it.
        NoRoom: the rank would take more than ``limit_bytes``; nothing has been read.
        OutOfMemory: the system has no room.
        PeerLost, JoinRefused: another rank did not come.
        ValueError: a limit or device that cannot be.
    """
    if order.world_size > 1 and listeners is None:
        raise BadRequest(f"{order.world_size} ranks: prepare this one first, so that it can be met")
    checkpoint = open_checkpoint(Path(order.path))
    spec = checkpoint.spec
    context_tokens = order.context_tokens or spec.context_length
    threads = order.threads or os.cpu_count() or 1
    check_limits(spec, context_tokens, order.num_slots, threads)
    shards = mesh(
        spec,
        order.grid(),
        units=units_of(spec, checkpoint),
        experts="across" if order.experts == "across" else "inside",
        split_embedding=True,
    )
    device = order.device or best_device()
    _check_room(checkpoint, shards[order.rank], order, context_tokens, threads, device)
    stage = load_stage(
        checkpoint,
        shards[order.rank],
        context_tokens=context_tokens,
        num_slots=order.num_slots,
        threads=threads,
        device=device,
        on_progress=on_progress,
    )
    links = Links() if listeners is None else meet(_meeting(order, shards, device), listeners)
    if links.receiver is not None:
        return Loaded(stage, links, None)
    engine = StageEngine(stage, links)
    engine.forward([Row(slot=0, ids=(0,), start=0)])  # compiles, and proves that all ranks work
    return Loaded(stage, links, engine)


def facts(stage: Stage) -> dict[Any, Term]:
    """What a rank says of itself once it is loaded; ranges are half-open."""
    shard = stage.shard
    ranges = {
        name: [part.start, part.stop]
        for name, part in (
            ("layers", shard.layers),
            ("kv_heads", shard.kv_heads),
            ("query_heads", shard.query_heads),
            ("ffn", shard.ffn),
            ("experts", shard.experts),
            ("vocab", shard.vocab),
        )
    }
    return {
        Atom("device"): stage.device,
        Atom("kernels"): Atom(stage.kernels),
        Atom("memory_bytes"): stage.weights_bytes + stage.kv_bytes + stage.workspace_bytes,
        Atom("weights_bytes"): stage.weights_bytes,
        Atom("kv_bytes"): stage.kv_bytes,
        Atom("workspace_bytes"): stage.workspace_bytes,
        Atom("context_tokens"): stage.context_tokens,
        **{Atom(name): list(part) for name, part in ranges.items()},
    }


def _meeting(order: LoadOrder, shards: tuple[RankShard, ...], device: str) -> Meeting:
    world = order.world_size
    return Meeting(
        group=order.group,
        epoch=order.epoch,
        rank=order.rank,
        mesh=shards,
        hosts=tuple(text_of(host) for host in order.hosts) or ("",) * world,
        places=tuple(place_of(term) for term in order.places),
        devices=tuple(text_of(name) for name in order.devices) or (device,) * world,
        timeout_s=order.join_timeout_s,
        step_timeout_s=order.step_timeout_s,
    )


def _check_room(
    checkpoint: Checkpoint,
    shard: RankShard,
    order: LoadOrder,
    context_tokens: int,
    threads: int,
    device: str,
) -> None:
    if not order.limit_bytes:
        return
    kernels = kernels_for(checkpoint.spec, device)
    no_gpu = kernels == "mlx" and sys.platform != "darwin"
    estimate = footprint(
        checkpoint.spec,
        checkpoint,
        shard,
        kernels=kernels,
        device="mlx-cpu" if no_gpu else device,
        context_tokens=context_tokens,
        num_slots=order.num_slots,
        threads=threads,
        network=len(set(order.hosts)) > 1,
    )
    check_room(estimate, order.limit_bytes)
