"""What ``ctl start`` decided, as a file that every life of the control process reads again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ops.errors import ConfigError
from ops.home import write_atomically


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSettings:
    """One start of a node; no secrets. Everything else is in ``config``.

    Attributes:
        home: root of the home; absolute.
        config: the ``config.yaml`` in use; None: there is none, all defaults.
        node: distribution name, ``NAME@HOST``.
        http_port: 0 takes a free one.
        models: to be loaded before the node is ready; the first is the alias ``default``.
        no_model: start empty, forgetting what ran before; ``models`` is empty then.
        log_json: stderr as one JSON object a line.
        insecure: the HTTP API is open to everybody while there is no key.
        join: peers to connect to, ``host[:port]``, besides those of the configuration.
    """

    home: Path
    config: Path | None
    node: str
    http_host: str
    http_port: int
    models: tuple[str, ...]
    no_model: bool
    log_json: bool
    epmd_port: int
    join: tuple[str, ...] = ()
    insecure: bool = False

    def to_file(self, path: Path) -> None:
        """Write, for this user only. Raises OSError."""
        data = {
            **asdict(self),
            "home": str(self.home),
            "config": None if self.config is None else str(self.config),
        }
        write_atomically(path, json.dumps(data, indent=1) + "\n")

    @staticmethod
    def from_file(path: Path) -> StartSettings:
        """Read what ``to_file`` wrote. Raises ConfigError naming the file."""
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            config = data.pop("config")
            return StartSettings(
                home=Path(data.pop("home")),
                config=None if config is None else Path(config),
                models=tuple(data.pop("models")),
                join=tuple(data.pop("join", ())),
                **data,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            why = f"{path}: are no start settings ({type(exc).__name__}: {exc})"
            raise ConfigError([f"{why}; start the node with `ctl start`"]) from exc
