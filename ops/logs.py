"""Logging of a process: structlog and stdlib through one chain, to stderr and a rotated file.

Secrets never reach it: fields named like one, every value told to ``hide``, and whatever
looks like a bearer token are replaced in the finished line, tracebacks included.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal

import structlog

HIDDEN = "[hidden]"
MIN_SECRET_CHARACTERS = 8  # shorter ones would also hide ordinary words
_FIELD = re.compile(
    r"cookie|password|secret|authorization|api[-_]?key|(api|hf|bearer)[-_]?token", re.I
)
_BEARER = re.compile(
    r"((?i:bearer)\s+|(?i:x-api-key)['\":=\s]+)[A-Za-z0-9._~+/=-]{8,}"
    r"|(\b(?:hf_|sk-|phx-))[A-Za-z0-9_-]{20,}"  # long, so that HF_ENDPOINT and the like stay
)
_known: set[str] = set()


def hide(secret: str) -> None:
    """Never show this value (a cookie, an API key) in any line from now on."""
    if len(secret) >= MIN_SECRET_CHARACTERS:
        _known.add(secret)


def redact(line: str) -> str:
    """``line`` without secrets."""
    for secret in _known:
        line = line.replace(secret, HIDDEN)
    return _BEARER.sub(lambda found: (found[1] or found[2]) + HIDDEN, line)


def hide_fields(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """structlog processor: empties fields whose name says that they hold a secret."""
    for name, value in event.items():
        if _FIELD.search(name):
            event[name] = HIDDEN
        elif isinstance(value, dict):
            event[name] = dict(hide_fields(_logger, _method, dict(value)))
    return event


class RedactingFormatter(structlog.stdlib.ProcessorFormatter):
    """The chain's end: renders, then takes secrets out of the whole line."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure(
    *,
    style: Literal["console", "json"] = "console",
    level: str = "info",
    folder: Path | None = None,
    name: str = "node",
    max_file_bytes: int = 10_000_000,
    num_files: int = 5,
) -> None:
    """Set up all logging of this process; calling it again replaces the former set-up.

    Args:
        style: of stderr. The file is always JSON, one object a line.
        folder: where ``<name>.log`` and its rotated predecessors go; None: no file.
        num_files: files kept in all, the current one included.

    Raises:
        OSError: the file cannot be opened.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        hide_fields,
    ]
    as_json = RedactingFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ],
    )
    as_text = RedactingFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
    )
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(as_json if style == "json" else as_text)
    handlers: list[logging.Handler] = [screen]
    if folder is not None:
        file = logging.handlers.RotatingFileHandler(
            folder / f"{name}.log",
            maxBytes=max_file_bytes,
            backupCount=num_files - 1,
            encoding="utf-8",
        )
        file.setFormatter(as_json)
        handlers.append(file)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in (
        "httpx",
        "httpcore",
        "filelock",
        "urllib3",
        "huggingface_hub",
        "asyncio",
        "uvicorn",
        "bridge.net_kernel",
    ):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
