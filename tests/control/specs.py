"""Instances as tests need them."""

from __future__ import annotations

from pathlib import Path

from control.instance_spec import InstanceSpec, RankSpec
from control.load_options import MeshShape


def spec(id_: str, *nodes: str, num_bytes: int = 0, first_epoch: int = 0) -> InstanceSpec:
    """An instance with a rank on each of ``nodes``; the head is on the first."""
    names = nodes or ("n@h",)
    ranks = tuple(
        RankSpec(
            node=node,
            path=Path("m.gguf"),
            device="cpu",
            pool="memory",
            threads=1,
            memory_bytes=num_bytes,
            limit_bytes=0,
        )
        for node in names
    )
    return InstanceSpec(
        id=id_,
        model="m",
        context_tokens=8,
        num_slots=1,
        shape=MeshShape.even(len(ranks), 1),
        ranks=ranks,
        first_epoch=first_epoch,
        addresses=tuple((node, "127.0.0.1") for node in dict.fromkeys(names))
        if len(names) > 1
        else (),
    )
