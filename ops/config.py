"""``config.yaml``: its fields, their defaults and limits, and errors that name file, line, field.

The commented list of every field is ``ops/config.example.yaml``; a test keeps both in step.
"""

from __future__ import annotations

import difflib
import json
import re
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from control.discovery.candidates import parse_peer
from ops.errors import ConfigError
from ops.yaml_lines import Document, YamlError, parse

UNITS = {"B": 1}
UNITS |= {f"{p}B": 1000**i for i, p in enumerate(("k", "M", "G", "T"), 1)} | {"KB": 1000}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate(("K", "M", "G", "T"), 1)}
MIN_MEMORY_BYTES = 64 * 2**20  # less holds no rank
MAX_MEMORY_BYTES = 2**50
ORIGIN = (
    r"^(\*|[a-z][a-z0-9+.-]*://(\[[0-9a-f:]+\]|[a-z0-9_.-]*)(:[0-9]{1,5})?)$"  # as browsers say
)
LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"


def parse_bytes(value: object) -> int:
    """``128GB``, ``1.5 GiB`` -> bytes. Raises PydanticCustomError naming the units."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", value)
        if found and found[2] in UNITS:
            return int(Decimal(found[1]) * UNITS[found[2]])
    raise PydanticCustomError(
        "bytes",
        "{value} is not a size with a unit; write a number and one of {units}, such as 128GB",
        {"value": repr(value), "units": ", ".join(sorted(UNITS))},
    )


def _memory(value: int) -> int:
    if not MIN_MEMORY_BYTES <= value <= MAX_MEMORY_BYTES:
        raise PydanticCustomError(
            "memory",
            "{value} bytes is impossible; at least 64MiB, at most 1024TiB",
            {"value": value},
        )
    return value


def _address(value: str) -> str:
    try:
        host, _ = parse_peer(value)
    except ValueError:
        host = ""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", host):
        raise PydanticCustomError(
            "address", "{value} is not HOST or HOST:PORT (1 to 65535)", {"value": repr(value)}
        )
    return value


def _unique(values: tuple[str, ...]) -> tuple[str, ...]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise PydanticCustomError("twice", "{value} is listed twice", {"value": repr(value)})
    return values


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
Memory = Annotated[int, BeforeValidator(parse_bytes), AfterValidator(_memory)]
Quota = Annotated[int, BeforeValidator(parse_bytes), Field(ge=10**6, le=2**60)]
Hostname = Annotated[str, StringConstraints(pattern=rf"^{LABEL}(\.{LABEL})*$", max_length=253)]
Address = Annotated[str, AfterValidator(_address)]
Origin = Annotated[str, StringConstraints(pattern=ORIGIN, max_length=300)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
TcpPort = Annotated[int, Field(ge=0, le=65535)]
PlainPath = Annotated[Path, Field(strict=False)]  # text, also where a validator has run before
Names = Annotated[tuple[str, ...], AfterValidator(_unique)]


class Role(StrEnum):
    """What a machine may do in the cluster."""

    COORDINATOR = "coordinator"  # may be elected leader
    COMPUTE = "compute"  # runs ranks
    STORAGE = "storage"  # keeps model files and serves them to peers


class Section(BaseModel):
    """Base of all sections: nothing is converted silently, nothing unknown is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Device(Section):
    """One machine, known by its host name, and what it may be used for."""

    hostname: Hostname
    roles: frozenset[Role] = Field(default=frozenset(Role), min_length=1)
    max_memory_bytes: Memory | None = Field(default=None, alias="max_memory")
    max_cores: int | None = Field(default=None, ge=1, le=4096)
    gpu: bool = True


class Network(Section):
    """How machines find each other."""

    discovery: Literal["auto", "static", "epmd"] = "auto"
    tie_breaker: Hostname | None = None
    peers: Annotated[tuple[Address, ...], AfterValidator(_unique)] = ()

    @model_validator(mode="after")
    def _peers_and_discovery_agree(self) -> Self:
        if self.discovery == "static" and not self.peers:
            raise PydanticCustomError(
                "peers", "discovery: static needs peers: [host[:port], ...]", {"at": "discovery"}
            )
        if self.discovery != "static" and self.peers:
            raise PydanticCustomError(
                "peers", "peers are used with discovery: static only", {"at": "peers"}
            )
        return self


class Tls(Section):
    """Certificates for the distribution: all three files, or none to have them made."""

    ca: PlainPath | None = None
    certificate: PlainPath | None = None
    key: PlainPath | None = None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        given = [name for name in Tls.model_fields if getattr(self, name) is not None]
        missing = [name for name in Tls.model_fields if name not in given]
        if given and missing:
            raise PydanticCustomError(
                "tls",
                "{missing} is missing: ca, certificate and key belong together; "
                "tls: true makes them",
                {"missing": " and ".join(missing), "at": given[0]},
            )
        return self


def _switch(value: object) -> object:
    """``true`` is the section with its defaults, ``false`` is none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class Node(Section):
    """The Erlang side of this machine."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}@[A-Za-z0-9_.-]{1,190}$")] = (
        "phalanx@127.0.0.1"
    )
    epmd_port: int = Field(default=4369, ge=1, le=65535)
    dist_port: TcpPort = 0
    ticktime_s: float = Field(default=60.0, alias="ticktime", ge=1, le=3600)
    tls: Annotated[Tls | None, BeforeValidator(_switch)] = None


class HttpTls(Section):
    """The certificate of the HTTP endpoint: both files, or none to have them made."""

    certificate: PlainPath | None = None
    key: PlainPath | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            given = "key" if self.certificate is None else "certificate"
            raise PydanticCustomError(
                "tls",
                "certificate and key belong together; tls: true makes both",
                {"at": given},
            )
        return self


class Http(Section):
    """The HTTP endpoint."""

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,253}$")] = "127.0.0.1"
    port: TcpPort = 52415
    tls: Annotated[HttpTls | None, BeforeValidator(_switch)] = None
    cors_origins: Annotated[tuple[Origin, ...], AfterValidator(_unique)] = ()


class Models(Section):
    """Which models there are and which are loaded by themselves."""

    default: Names = ("smollm2-135m-instruct",)
    autoload: bool = True
    dir: Path | None = None
    quota_bytes: Quota | None = Field(default=None, alias="quota")
    cards: tuple[Path, ...] = ()


class Engine(Section):
    """How a model runs unless ``ctl model load`` says otherwise."""

    threads: int | None = Field(default=None, ge=1, le=4096)
    context_tokens: int | None = Field(default=None, alias="context", ge=16, le=2**24)
    num_slots: int = Field(default=4, alias="slots", ge=1, le=1024)
    device: Annotated[str, Field(pattern=r"^(cpu|mlx|cuda(:\d{1,3})?)$")] | None = None
    spare_ports: int = Field(default=1, ge=0, le=64)
    kernel_cache: Path | None = None


class Limits(Section):
    """How much, how long."""

    max_body_bytes: ByteSize = Field(default=8 * 2**20, alias="max_body", ge=1024, le=2**30)
    receive_timeout_s: Seconds = 60.0
    open_timeout_s: Seconds = 60.0
    write_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 30.0


class Log(Section):
    """What is written about what happens."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"
    max_file_bytes: ByteSize = Field(default=10 * 10**6, alias="max_file", ge=10_000, le=2**40)
    num_files: int = Field(default=5, ge=1, le=1000)


class Config(Section):
    """The whole file; ``Config()`` is what an empty or missing file means."""

    cluster_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "default"
    devices: tuple[Device, ...] = ()
    network: Network = Network()
    node: Node = Node()
    http: Http = Http()
    models: Models = Models()
    engine: Engine = Engine()
    limits: Limits = Limits()
    log: Log = Log()

    @model_validator(mode="after")
    def _devices_make_a_cluster(self) -> Self:
        seen: dict[str, int] = {}
        for i, device in enumerate(self.devices):
            first = seen.setdefault(device.hostname.lower(), i)
            if first != i:
                raise PydanticCustomError(
                    "twice",
                    "{name} is listed twice, first as devices[{first}]",
                    {"name": device.hostname, "first": first, "at": f"devices.{i}.hostname"},
                )
        breaker = self.network.tie_breaker
        if breaker is not None and self.devices and breaker.lower() not in seen:
            raise PydanticCustomError(
                "tie_breaker",
                "{name} is none of the devices",
                {"name": breaker, "at": "network.tie_breaker"},
            )
        roles = {role for device in self.devices for role in device.roles}
        if self.devices and self.network.discovery == "static" and Role.COORDINATOR not in roles:
            raise PydanticCustomError(
                "coordinator",
                "no device has the role coordinator, so no leader can be elected",
                {"at": "devices"},
            )
        return self

    def device(self, hostname: str) -> Device | None:
        """The entry of a machine (host names ignore case), None where it is not listed."""
        wanted = hostname.lower()
        return next((d for d in self.devices if d.hostname.lower() == wanted), None)


def load(path: Path) -> Config:
    """Read and check one ``config.yaml``; relative paths in it count from its folder.

    Raises:
        ConfigError: one line ``file:line field: why`` for every problem.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError([f"{path}: cannot be read: {exc.strerror}"]) from exc
    except UnicodeDecodeError as exc:
        raise ConfigError([f"{path}: is not UTF-8 text: {exc.reason}"]) from exc
    return loads(text, str(path), path.parent)


def loads(text: str, name: str, folder: Path) -> Config:
    """As ``load``, from text; ``name`` stands for the file in errors."""
    try:
        document = parse(text)
    except YamlError as exc:
        field = f" {_dotted(exc.field)}" if exc.field else ""
        raise ConfigError([f"{name}:{exc.line}{field}: {exc.why}"]) from exc
    if not isinstance(document.data, dict):
        raise ConfigError([f"{name}:1: fields are expected, such as `cluster_name: home`"])
    try:
        # through JSON: there pydantic is strict and still takes a list for a tuple, text for a path
        config = Config.model_validate_json(json.dumps(document.data))
    except ValidationError as exc:
        found = [_explain(document, error) for error in exc.errors(include_url=False)]
        raise ConfigError([f"{name}:{line} {field}: {why}" for line, field, why in found]) from exc
    models = config.models
    rooted = models.model_copy(
        update={
            "dir": folder / models.dir.expanduser() if models.dir else None,
            "cards": tuple(folder / card.expanduser() for card in models.cards),
        }
    )
    node = config.node
    if node.tls is not None:
        paths = {name: path and folder / path.expanduser() for name, path in node.tls}
        node = node.model_copy(update={"tls": node.tls.model_copy(update=paths)})
    http = config.http
    if http.tls is not None:
        paths = {name: path and folder / path.expanduser() for name, path in http.tls}
        http = http.model_copy(update={"tls": http.tls.model_copy(update=paths)})
    return config.model_copy(update={"models": rooted, "node": node, "http": http})


def _explain(document: Document, error: ErrorDetails) -> tuple[int, str, str]:
    """``(line, field, why)`` of one pydantic error, in the words of somebody who edits YAML."""
    context: dict[str, Any] = error.get("ctx") or {}
    path = error["loc"] + tuple(
        int(part) if part.isdigit() else part
        for part in str(context.get("at", "")).split(".")
        if part
    )
    why = error["msg"]
    given = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(path[:-1])
            close = difflib.get_close_matches(str(path[-1]), known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            why = f"unknown field; {hint}"
        case "missing":
            why = "is required"
        case "model_type" | "dict_type":
            why = f"fields are expected here, not {_shown(given)}"
        case "tuple_type" | "frozen_set_type" | "list_type":
            why = f"a list is expected, such as [a, b], not {_shown(given)}"
        case "bool_type" | "int_type" | "float_type" | "string_type" | "path_type":
            kind = {"bool": "true or false", "int": "a whole number", "float": "a number"}
            why = (
                f"{kind.get(error['type'].split('_')[0], 'text')} is expected, not {_shown(given)}"
            )
        case "enum" | "literal_error":
            why = f"{_shown(given)} is none of {context.get('expected')}"
        case "string_pattern_mismatch":
            why = f"{_shown(given)} is not a valid {str(path[-1]).replace('_', ' ')}"
        case "too_short":
            why = "must not be empty"
        case _ if not context.get("at") and not isinstance(given, dict | list):
            if str(given) not in why:
                why = f"{_shown(given)}: {why[:1].lower()}{why[1:]}"
    return document.line_of(path), _dotted(path), why


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    """Field names that may stand in the section at ``path``, as written in the file."""
    section: Any = Config
    for part in path:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            inner = {"devices": Device, "tls": HttpTls if section is Http else Tls}
            section = inner.get(part, annotation)
    return sorted(field.alias or name for name, field in section.model_fields.items())
