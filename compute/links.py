"""One rank's connections in the mesh, and a step run over them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compute.collectives import Backend, Group, Rendezvous, choose_backend, join
from compute.errors import numbered_as
from compute.orders import SILENT_S, OrderReceiver, OrderSender
from compute.places import Listeners, Place
from compute.stage import FloatArray, Peers, Row, Stage, num_positions
from models.mesh import head_rank
from models.sharding import RankShard


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """How the ranks of a mesh find each other.

    Attributes:
        group: secret id of this generation of ranks; two groups never meet.
        rank: this rank; ``mesh`` says what every rank holds.
        hosts: machine of each rank; those with equal names share memory.
        places, devices: of each rank.
        timeout_s: for the others to come, ``step_timeout_s``: for a silent one to count as lost.
    """

    group: str = field(repr=False)
    epoch: int
    rank: int
    mesh: tuple[RankShard, ...]
    hosts: tuple[str, ...]
    places: tuple[Place, ...]
    devices: tuple[str, ...]
    timeout_s: float
    step_timeout_s: float

    @property
    def shard(self) -> RankShard:
        """What this rank holds."""
        return self.mesh[self.rank]

    @property
    def device(self) -> str:
        """Where this rank computes."""
        return self.devices[self.rank]

    @property
    def head(self) -> int:
        """The rank that plans and samples."""
        return head_rank(self.shard.tensor.world_size, self.shard.pipeline.world_size)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A group of two: the earlier stage's rank (0), the later one's (1).

    Attributes:
        ranks: what the two are called in the mesh.
    """

    group: Group
    ranks: tuple[int, ...]

    def send(self, x: FloatArray, timeout_s: float) -> None:
        """Hand ``x`` to the later one. Raises PeerLost."""
        with numbered_as(self.ranks):
            self.group.send(x, to=1, timeout_s=timeout_s)

    def receive(self, shape: tuple[int, int], timeout_s: float) -> FloatArray:
        """Take what the earlier one hands on: float32 of ``shape``. Raises PeerLost."""
        x = np.empty(shape, dtype=np.float32)
        with numbered_as(self.ranks):
            self.group.receive(x, source=0, timeout_s=timeout_s)
        return x


@dataclass(slots=True)
class Links:
    """All connections of one rank. Without others: none.

    Attributes:
        peers: the tensor ranks of its stage.
        before, after: this rank and its counterpart in a neighbour stage.
        sender, receiver: of orders: the first on the head, the other on a follower.
    """

    peers: Peers | None = None
    before: Neighbour | None = None
    after: Neighbour | None = None
    sender: OrderSender | None = None
    receiver: OrderReceiver | None = None
    step_timeout_s: float = 0.0
    groups: list[Group] = field(default_factory=list)

    def close(self) -> None:
        """Leave all groups; the others notice."""
        for end in (self.sender, self.receiver, *self.groups):
            if end is not None:
                end.close()


def meet(meeting: Meeting, listeners: Listeners) -> Links:
    """Join every group of this rank; returns when all others have come.

    Raises:
        PeerLost: somebody did not come in time, or ended meanwhile.
        JoinRefused: the others are of another shape.
    """
    links = Links(step_timeout_s=meeting.step_timeout_s)
    if len(meeting.mesh) == 1:
        listeners.close()
        return links
    with contextlib.ExitStack() as undo:
        undo.callback(listeners.close)
        undo.callback(links.close)
        _join_tensor(meeting, listeners, links)
        _join_neighbours(meeting, listeners, links)
        _join_orders(meeting, listeners, links)
        undo.pop_all()
    listeners.close()
    return links


def run(stage: Stage, links: Links, rows: Sequence[Row]) -> FloatArray:
    """This rank's part of one order: receive, compute, hand on.

    Returns:
        Logits on the last stage, else the residual that was handed on. Raises PeerLost.
    """
    incoming = None
    if links.before is not None:
        shape = (num_positions(rows), stage.spec.hidden_size)
        incoming = links.before.receive(shape, links.step_timeout_s)
    out = stage.run(rows, incoming, links.peers)
    if links.after is not None:
        links.after.send(out, links.step_timeout_s)
    return out


def _join_tensor(meeting: Meeting, listeners: Listeners, links: Links) -> None:
    shard = meeting.shard
    world = shard.tensor.world_size
    if world == 1:
        return
    first = shard.pipeline.device_rank * world
    ranks = range(first, first + world)
    backend = _backend(meeting, ranks)
    if backend == "mlx":
        listeners.release("ring")
    group = _join(meeting, "tensor", ranks, listeners, backend=backend)
    links.groups.append(group)
    vocab = tuple(meeting.mesh[rank].vocab for rank in ranks)
    links.peers = Peers(group, vocab, meeting.step_timeout_s, tuple(ranks))


def _join_neighbours(meeting: Meeting, listeners: Listeners, links: Links) -> None:
    """From the first boundary to the last: every stage waits for the one before it alone."""
    stage, world = meeting.shard.pipeline.device_rank, meeting.shard.tensor.world_size
    boundaries = [(stage - 1, meeting.rank - world), (stage, meeting.rank)]
    for boundary, lower in boundaries:
        if not 0 <= boundary < meeting.shard.pipeline.world_size - 1:
            continue
        pair = range(lower, lower + world + 1, world)
        group = _join(meeting, "after", pair, listeners, backend=None)
        links.groups.append(group)
        neighbour = Neighbour(group, tuple(pair))
        if lower == meeting.rank:
            links.after = neighbour
        else:
            links.before = neighbour


def _join(
    meeting: Meeting, use: str, ranks: range, listeners: Listeners, *, backend: Backend | None
) -> Group:
    """Join one group; ``backend`` None is for host memory, whatever the device."""
    ring = tuple(meeting.places[rank].address("ring") for rank in ranks)
    rendezvous = Rendezvous(
        instance=f"{meeting.group}/{use}/{ranks[0]}",
        use=use,
        epoch=meeting.epoch,
        rank=ranks.index(meeting.rank),
        hosts=tuple(meeting.hosts[rank] for rank in ranks),
        address=meeting.places[ranks[0]].address(use),
        ring=ring if backend == "mlx" else (),
        timeout_s=meeting.timeout_s,
    )
    chosen = backend or choose_backend(rendezvous, "cpu")
    listens = chosen not in ("shm", "single") and meeting.rank == ranks[0]
    listener = listeners.take(use) if listens else None
    with numbered_as(ranks):
        return join(rendezvous, device=meeting.device, backend=chosen, listener=listener)


def _backend(meeting: Meeting, ranks: range) -> Backend:
    """What carries a stage's sums: ranks that share a GPU, and rings that are no whole mesh,
    go through the host's memory."""
    hosts = tuple(meeting.hosts[rank] for rank in ranks)
    place = Rendezvous(instance="", epoch=0, rank=0, hosts=hosts, timeout_s=meeting.timeout_s)
    if meeting.device.startswith("mlx") and len(ranks) < len(meeting.mesh):
        return choose_backend(place, "cpu")
    devices = {(hosts[i], meeting.devices[rank]) for i, rank in enumerate(ranks)}
    if meeting.device.startswith("cuda") and len(devices) < len(hosts):
        return "gloo"
    return choose_backend(place, meeting.device)


def _join_orders(meeting: Meeting, listeners: Listeners, links: Links) -> None:
    head = meeting.head
    if meeting.rank == head:
        others = frozenset(range(len(meeting.mesh))) - {head}
        links.sender = OrderSender.accept(
            listeners.take("orders"),
            group=meeting.group,
            ranks=others,
            timeout_s=meeting.timeout_s,
            send_timeout_s=meeting.step_timeout_s,
        )
    else:
        links.receiver = OrderReceiver.connect(
            meeting.places[head].address("orders"),
            group=meeting.group,
            rank=meeting.rank,
            head=head,
            timeout_s=meeting.timeout_s,
            silent_s=min(SILENT_S, meeting.step_timeout_s),
        )
