"""Where an instance would run and in which shape: one pure decision, with reasons.

A request, machines, and a model's header in; out come the chosen mesh with what each rank holds
and takes, and why every other was not chosen. Nothing is measured, read or started here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from control.errors import NoPlacement
from control.load_options import BadOption, MeshShape
from control.placement_request import Host, Request
from control.placement_types import MEMORY, Candidate, Placement, RankPlace
from models.footprint import Footprint, footprint, kernels_for
from models.legal import IllegalShares, check
from models.mesh import Costs, Units, mesh, units_of, weight_costs
from models.spec import ModelSpec
from models.stored import Assumed, Stored

MOST_CONSIDERED = 8  # ranks of a shape that nobody asked for


def decide(
    request: Request, hosts: Sequence[Host], spec: ModelSpec, stored: Stored | None, kind: str = ""
) -> Placement:
    """Choose a mesh.

    What was asked for is taken if it can be. Else the first shape that fits: as few ranks as
    will do, since ranks of one machine share its cores and each has a process of its own.

    Args:
        request: what to place.
        hosts: machines that may run ranks; today the first one holds all of an instance.
        spec: of the model.
        stored: its checkpoint; None where it is not downloaded.
        kind: the storage format to assume then.

    Raises:
        BadOption: no machine here has what was asked for.
    """
    host = hosts[0]
    if request.threads > host.cores:
        raise BadOption(f"threads={request.threads}: {host.name} lends {host.cores} cores")
    on = _Machine(host, request, spec, stored, kind)
    tried = [on.candidate(shape) for shape in _shapes(request, host)]
    asked = tried[:1] if request.shape is not None else tried
    chosen = next((candidate for candidate in asked if candidate.refusal is None), None)
    rejected = tuple(
        _with_reason(candidate, chosen, request, host)
        for candidate in tried
        if candidate is not chosen
    )
    return Placement(
        request=request,
        engine=on.engine,
        chosen=chosen,
        rejected=rejected,
        refusal=None if chosen else asked[0].refusal,
    )


def _shapes(request: Request, host: Host) -> list[MeshShape]:
    """The shape asked for, then every other that is worth a look, few ranks first."""
    most = min(MOST_CONSIDERED, max(2, host.cores, len(host.cuda_bytes)))
    sizes = [(t, p) for t in range(1, most + 1) for p in range(1, most // t + 1)]
    sizes.sort(key=lambda size: (size[0] * size[1], size[1]))
    first = [] if request.shape is None else [request.shape]
    return first + [shape for t, p in sizes if (shape := MeshShape.even(t, p)) not in first]


def _with_reason(
    candidate: Candidate, chosen: Candidate | None, request: Request, host: Host
) -> Candidate:
    if isinstance(candidate.refusal, NoPlacement):
        why = candidate.refusal.why
    elif candidate.refusal is not None:
        why = str(candidate.refusal)
    elif request.shape is not None:
        why = f"would take {_gb(candidate.total_bytes)}, but {request.shape} was asked for"
    else:
        assert chosen is not None  # else this one would be chosen
        more = candidate.total_bytes - chosen.total_bytes
        why = (
            f"would take {_gb(candidate.total_bytes)}, {_gb(more)} more than {chosen.shape}, on "
            f"the same {host.cores} cores"
        )
    return Candidate(
        shape=candidate.shape, ranks=candidate.ranks, refusal=candidate.refusal, why=why
    )


class _Machine:
    """One machine, asked for one model: what is the same for all shapes."""

    def __init__(
        self, host: Host, request: Request, spec: ModelSpec, stored: Stored | None, kind: str
    ) -> None:
        self.host, self.request, self.spec = host, request, spec
        self.engine = _engine(request, host)
        self._across = request.experts == "across"
        self._stored: Stored = stored if stored is not None else Assumed(kind)
        self._units = Units() if stored is None else units_of(spec, stored)
        self._costs: Costs = weight_costs(spec)

    def candidate(self, shape: MeshShape) -> Candidate:
        """What each rank of a shape would hold and take."""
        stages = [sum(stage) for stage in shape.grid]
        try:
            for stage in shape.grid:  # as mesh checks it, with numbers that are easier to read
                check(self.spec, stage, [s / min(stages) for s in stages], across=self._across)
            shards = mesh(
                self.spec,
                shape.grid,
                units=self._units,
                costs=self._costs,
                experts="across" if self._across else "inside",
                split_embedding=True,
            )
        except IllegalShares as exc:
            return Candidate(shape=shape, refusal=exc)
        told = [self._device(rank, shape.num_ranks) for rank in range(shape.num_ranks)]
        devices = [_numbered(device or self._likely) for device in told]
        kernels = [kernels_for(self.spec, device) for device in devices]
        threads = self.request.threads or max(1, self.host.cores // shape.num_ranks)
        needs = [
            footprint(
                self.spec,
                self._stored,
                shard,
                kernels=kernels[rank],
                device=self._measured(devices[rank]),
                context_tokens=self.request.context_tokens,
                num_slots=self.request.num_slots,
                threads=threads,
            )
            for rank, shard in enumerate(shards)
        ]
        pools = [device if device.startswith("cuda") else MEMORY for device in devices]
        taken: Counter[str] = Counter()
        for pool, need in zip(pools, needs, strict=True):
            taken[pool] += need.total_bytes
        ranks = tuple(
            RankPlace(
                node=self.host.name,
                device=devices[rank],
                told=told[rank],
                pool=pools[rank],
                kernels=kernels[rank],
                threads=threads,
                shard=shard,
                needs=needs[rank],
                limit_bytes=self._limit(pools[rank], taken[pools[rank]] - needs[rank].total_bytes),
            )
            for rank, shard in enumerate(shards)
        )
        for pool, total_bytes in taken.items():
            free = self._free(pool)
            if free is not None and total_bytes > free:
                return Candidate(
                    shape=shape, ranks=ranks, refusal=self._refusal(shape, ranks, pool)
                )
        return Candidate(shape=shape, ranks=ranks)

    def _measured(self, device: str) -> str:
        """Under which name the figures of a device stand: MLX without a GPU has its own."""
        return "mlx-cpu" if device.startswith("mlx") and not self.host.has_metal else device

    @property
    def _likely(self) -> str:
        """The device a port chooses by itself on such a machine."""
        if self.engine == "mlx":
            return "mlx"
        return "cuda:0" if self.host.cuda_bytes and self.request.engine != "mlx" else "cpu"

    def _device(self, rank: int, num_ranks: int) -> str:
        """What the port of a rank is told."""
        asked, devices = self.request.device, len(self.host.cuda_bytes)
        if asked == "cuda" or (not asked and self._likely == "cuda:0" and num_ranks > 1):
            return f"cuda:{rank % max(1, devices)}"
        if self.engine == "mlx":
            return "mlx"
        if not asked and self.request.engine == "torch" and self.host.has_metal:
            return "cpu"  # a port would choose MLX there
        return asked

    def _free(self, pool: str) -> int | None:
        """Bytes that ranks may take of a memory; None where only the port can know."""
        if pool == MEMORY:
            return max(0, self.host.limit_bytes - self.host.used_bytes)
        number = int(pool.partition(":")[2] or 0)
        known = self.host.cuda_free_bytes
        return known[number] if number < len(known) else None

    def _limit(self, pool: str, others_bytes: int) -> int:
        free = self._free(pool)
        return 0 if free is None else max(1, free - others_bytes)

    def _refusal(self, shape: MeshShape, ranks: Sequence[RankPlace], pool: str) -> NoPlacement:
        if pool == MEMORY:
            where = f"{self.host.name} lends {_gb(self.host.limit_bytes)}"
            if self.host.used_bytes:
                where += f", {_gb(self.host.used_bytes)} of it to other instances"
        else:
            where = f"{pool} of {self.host.name} has {_gb(self._free(pool) or 0)}"
        needs = "; ".join(
            f"rank {number} needs {_parts(rank.needs)}" for number, rank in enumerate(ranks)
        )
        total_bytes = sum(rank.needs.total_bytes for rank in ranks)
        together = f", together {_gb(total_bytes)}" if len(ranks) > 1 else ""
        return NoPlacement(self.request.model, str(shape), f"{needs}{together}; {where}")


def _engine(request: Request, host: Host) -> str:
    """``torch`` or ``mlx``. Raises BadOption where that cannot run here."""
    device = request.device
    wants_mlx = request.engine == "mlx" or device.startswith("mlx")
    if wants_mlx and not host.has_mlx:
        raise BadOption(
            f"engine='mlx': {host.name} has no MLX; install the extra 'mlx' there, or leave "
            "engine and device out"
        )
    if wants_mlx or (host.has_metal and host.has_mlx and not (request.engine or device)):
        return "mlx"
    devices, number = len(host.cuda_bytes), int(device.partition(":")[2] or 0)
    if device.startswith("cuda") and devices and number >= devices:
        raise BadOption(f"device={device!r}: {host.name} has {devices} CUDA devices, from 0")
    return "torch"


def _numbered(device: str) -> str:
    """As a loaded rank names its device: ``cpu:0``."""
    return device if ":" in device else f"{device}:0"


def _parts(needs: Footprint) -> str:
    return (
        f"{_gb(needs.total_bytes)} (weights {_gb(needs.weights_bytes)}, KV cache "
        f"{_gb(needs.kv_bytes)}, workspace {_gb(needs.workspace_bytes)}, process "
        f"{_gb(needs.process_bytes)})"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
