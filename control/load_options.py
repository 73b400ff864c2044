"""What may be asked of a load: the options of ``ctl model load`` and ``ctl place``, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bridge.show import show
from bridge.text import text_of
from control.errors import ControlError

MAX_SLOTS = 1024
MAX_RANKS = 256
MAX_REPLICAS = 16
MAX_PRIORITY = 100
_DEVICE = re.compile(r"cpu(:0)?|cuda(:\d{1,3})?|mlx(:0)?")
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,12})?")


class BadOption(ControlError):
    """A load option is unknown, of the wrong type, or cannot be honoured."""

    kind = "bad_option"

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Ranks of an instance: ``pipeline`` stages of ``tensor`` ranks each.

    Attributes:
        tensor, pipeline: from 1.
        shares: memory or speed of every rank in any unit, in rank order: stage by stage, within
            each the tensor ranks.
    """

    tensor: int
    pipeline: int
    shares: tuple[float, ...]

    @staticmethod
    def even(tensor: int, pipeline: int) -> MeshShape:
        """All ranks alike."""
        return MeshShape(tensor, pipeline, (1.0,) * (tensor * pipeline))

    @property
    def num_ranks(self) -> int:
        """How many."""
        return self.tensor * self.pipeline

    @property
    def grid(self) -> tuple[tuple[float, ...], ...]:
        """Shares as ``[stage][tensor rank]``."""
        starts = range(0, self.num_ranks, self.tensor)
        return tuple(self.shares[at : at + self.tensor] for at in starts)

    @property
    def strategy(self) -> str:
        """``single``, ``tensor``, ``pipeline`` or ``mixed``."""
        if self.num_ranks == 1:
            return "single"
        return ("mixed" if self.tensor > 1 else "pipeline") if self.pipeline > 1 else "tensor"

    def __str__(self) -> str:
        uneven = len(set(self.shares)) > 1
        shares = f" with shares {show_shares(self.shares)}" if uneven else ""
        return f"{self.tensor}x{self.pipeline}{shares}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Shape of an instance; 0 or empty lets the cluster choose.

    Attributes:
        context: tokens a request may have, prompt and answer together.
        slots: requests served at once.
        tensor, pipeline: ranks in each direction.
        shares: how much each rank takes, see ``shape``.
        experts: ``inside`` cuts every routed expert over the tensor ranks, ``across`` deals
            whole ones out.
        threads: CPU threads of a rank.
        engine: ``torch`` (with the compiled CPU kernels) or ``mlx``.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mlx``; ``cuda`` deals ranks over all devices.
        goal: ``latency`` (one request alone) or ``throughput`` (all slots busy).
        replicas: instances of the model that should run.
        priority: from -100 to 100; what has more keeps its place where memory is short.
    """

    context: int = 0
    slots: int = 0
    tensor: int = 0
    pipeline: int = 0
    shares: tuple[float, ...] = ()
    experts: str = ""
    threads: int = 0
    engine: str = ""
    device: str = ""
    goal: str = ""
    replicas: int = 0
    priority: int = 0

    @staticmethod
    def from_term(options: Mapping[Any, Any]) -> LoadOptions:
        """Check a map of options. Raises BadOption with the option's name."""
        known = {f.name: str(f.type) for f in fields(LoadOptions)}
        found: dict[str, Any] = {}
        for key, value in options.items():
            name = text_of(key)
            if name not in known:
                raise BadOption(f"unknown option {name!r}; known: {', '.join(sorted(known))}")
            if name == "shares":
                found[name] = _shares(value)
            elif known[name] == "int":
                least = -MAX_PRIORITY if name == "priority" else 0
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise BadOption(
                        f"{name}: expected a number from {least}, got {show(value, 60)}"
                    )
                found[name] = value
            else:
                if not isinstance(value, str | bytes):
                    raise BadOption(f"{name}: expected text, got {show(value, 60)}")
                found[name] = text_of(value)
        return LoadOptions(**found).checked()

    def checked(self) -> LoadOptions:
        """Raises BadOption for what no machine could do."""
        if self.slots > MAX_SLOTS:
            raise BadOption(f"slots={self.slots}: at most {MAX_SLOTS}")
        if self.device and not _DEVICE.fullmatch(self.device):
            raise BadOption(f"device={self.device!r}: give cpu, cuda, cuda:N or mlx")
        if self.engine not in ("", "torch", "mlx"):
            raise BadOption(f"engine={self.engine!r}: give torch or mlx")
        if self.engine and self.device and (self.engine == "mlx") != self.device.startswith("mlx"):
            raise BadOption(f"engine={self.engine!r} does not run on device={self.device!r}")
        if self.experts not in ("", "inside", "across"):
            raise BadOption(f"experts={self.experts!r}: give inside or across")
        if self.goal not in ("", "latency", "throughput"):
            raise BadOption(f"goal={self.goal!r}: give latency or throughput")
        if self.replicas > MAX_REPLICAS:
            raise BadOption(f"replicas={self.replicas}: at most {MAX_REPLICAS}")
        if abs(self.priority) > MAX_PRIORITY:
            raise BadOption(f"priority={self.priority}: give {-MAX_PRIORITY} to {MAX_PRIORITY}")
        self.shape()
        return self

    def shape(self) -> MeshShape | None:
        """The ranks asked for; None where nothing is said of them.

        Shares alone make that many tensor ranks. Beside ``tensor`` or ``pipeline`` there is one
        for each of their ranks: ``tensor * pipeline``, stage by stage.

        Raises:
            BadOption: another number of shares than ranks, or too many of these.
        """
        if not (self.tensor or self.pipeline or self.shares):
            return None
        alone = bool(self.shares) and not self.tensor and self.pipeline <= 1
        tensor = len(self.shares) if alone else self.tensor or 1
        pipeline = self.pipeline or 1
        num_ranks = tensor * pipeline
        if num_ranks > MAX_RANKS:
            raise BadOption(
                f"tensor={tensor} x pipeline={pipeline} are {num_ranks} ranks: at most {MAX_RANKS}"
            )
        if self.shares and len(self.shares) != num_ranks:
            raise BadOption(
                f"shares={show_shares(self.shares)}: {len(self.shares)} numbers for tensor="
                f"{tensor} x pipeline={pipeline} = {num_ranks} ranks; give one a rank, stage by "
                "stage"
            )
        return MeshShape(tensor, pipeline, self.shares or (1.0,) * num_ranks)


def show_shares(shares: Sequence[float]) -> str:
    """``2,1``, as the flag takes it."""
    return ",".join(f"{share:.12g}" for share in shares)


def _shares(value: Any) -> tuple[float, ...]:
    """Shares from a list of numbers or from text such as ``2,1``. Raises BadOption."""
    if isinstance(value, str | bytes):
        parts = [part.strip() for part in text_of(value).split(",")]
        if not all(_NUMBER.fullmatch(part) for part in parts):
            raise BadOption(f"shares={text_of(value)[:60]!r}: write positive numbers, such as 2,1")
        value = [float(part) for part in parts]
    if not isinstance(value, list | tuple):
        raise BadOption(f"shares: expected a list of numbers, got {show(value, 60)}")
    if len(value) > MAX_RANKS:
        raise BadOption(f"shares: {len(value)} numbers, at most {MAX_RANKS}")
    for share in value:
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        if not is_number or not (0 < share <= 1e12 and math.isfinite(share)):
            raise BadOption(f"shares: {show(share, 60)} is not a positive number up to 1e12")
    return tuple(float(share) for share in value)
