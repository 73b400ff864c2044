"""What placement is asked and what it may use: a request, and machines as it sees them."""

from __future__ import annotations

from dataclasses import dataclass

from control.load_options import BadOption, LoadOptions, MeshShape
from control.machine import Machine
from models.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine as placement sees it.

    Attributes:
        name: of its node.
        limit_bytes: memory that it lends; used_bytes: what other instances take of that.
        available_bytes: of its memory now; None where nobody has looked.
        cores: that ranks may use.
        cuda_bytes: memory of each CUDA device; cuda_used_bytes: what other instances take of it.
        has_mlx: MLX can be imported; has_metal: and has a GPU.
    """

    name: str
    limit_bytes: int
    used_bytes: int = 0
    cores: int = 1
    cuda_bytes: tuple[int, ...] = ()
    cuda_used_bytes: tuple[int, ...] = ()
    has_mlx: bool = False
    has_metal: bool = False
    available_bytes: int | None = None

    @property
    def cuda_free_bytes(self) -> tuple[int, ...]:
        """What is left of each CUDA device."""
        used = (*self.cuda_used_bytes, *(0 for _ in self.cuda_bytes))
        return tuple(
            max(0, size - taken) for size, taken in zip(self.cuda_bytes, used, strict=False)
        )


def host_of(name: str, machine: Machine, used_bytes: int) -> Host:
    """A machine's reading as placement sees it."""
    return Host(
        name=name,
        limit_bytes=machine.limit_bytes,
        used_bytes=used_bytes,
        cores=machine.cores,
        cuda_bytes=tuple(d.memory_bytes for d in machine.devices if d.kind == "cuda"),
        has_mlx=machine.has_mlx,
        has_metal=any(d.kind == "metal" for d in machine.devices),
        available_bytes=machine.available_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """For what options leave open; 0 or empty: there is none.

    Attributes:
        threads: of a rank.
    """

    context_tokens: int = 0
    num_slots: int = 4
    threads: int = 0
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to place.

    Attributes:
        model: its id, for texts.
        shape: None lets placement choose.
        threads: of a rank; 0 divides the machine's cores.
        device, engine: empty lets the port choose.
    """

    model: str
    shape: MeshShape | None
    context_tokens: int
    num_slots: int
    experts: str = ""
    engine: str = ""
    device: str = ""
    threads: int = 0

    @staticmethod
    def of(model: str, options: LoadOptions, spec: ModelSpec, defaults: Defaults) -> Request:
        """Options, and defaults for what they leave open.

        Raises:
            BadOption: the model cannot do what they ask for.
        """
        limit, device = spec.context_length, defaults.device
        if options.context > limit:
            raise BadOption(f"context={options.context} is beyond the {limit} tokens of {model}")
        if options.experts and spec.experts is None:
            raise BadOption(f"experts={options.experts}: this {spec.family} model has none")
        if options.engine and device.startswith("mlx") != (options.engine == "mlx"):
            device = ""  # a default of the other engine
        return Request(
            model=model,
            shape=options.shape(),
            context_tokens=options.context or min(defaults.context_tokens or limit, limit),
            num_slots=options.slots or defaults.num_slots,
            experts=options.experts,
            engine=options.engine,
            device=options.device or device,
            threads=options.threads or defaults.threads,
        )
