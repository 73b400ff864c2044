"""Where pip would look for packages on this machine, read from its environment and files."""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_INDEX = "https://pypi.org/simple"


@dataclass(frozen=True, slots=True)
class PipSettings:
    """Places, in the order to try them.

    Attributes:
        index_urls: simple indexes (http, https or file).
        find_links: local folders with package files.
    """

    index_urls: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[Path, ...] = ()


def read_pip_settings(environ: Mapping[str, str] = os.environ) -> PipSettings:
    """What ``pip install`` would use: later files win over earlier ones, the environment over all.

    Source: pip documentation, "Configuration" (location and precedence of the files).
    """
    values: dict[str, str] = {}
    for path in config_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue  # pip itself will complain about its own file; another place may do
        for section in ("global", "install"):
            if parser.has_section(section):
                values.update(parser.items(section))
    names = ("index-url", "extra-index-url", "find-links", "no-index")
    for name in names:
        told = environ.get("PIP_" + name.upper().replace("-", "_"))
        if told is not None:
            values[name] = told
    indexes = [values.get("index-url") or DEFAULT_INDEX, *values.get("extra-index-url", "").split()]
    if values.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    links = [Path(text.removeprefix("file://")) for text in values.get("find-links", "").split()]
    return PipSettings(
        tuple(dict.fromkeys(url.rstrip("/") for url in indexes)),
        tuple(path for path in links if path.is_dir()),
    )


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's configuration files, the weakest first."""
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or "~").expanduser()
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    if sys.platform == "win32":
        shared = [Path(environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip" / name]
        own = [home / "pip" / name, Path(environ.get("APPDATA", str(home))) / "pip" / name]
    else:
        shared = [Path("/etc/xdg/pip") / name, Path("/etc") / name]
        own = [home / ".pip" / name]
        if sys.platform == "darwin":
            own.append(home / "Library" / "Application Support" / "pip" / name)
        own.append(Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / name)
    told = environ.get("PIP_CONFIG_FILE")
    if told == os.devnull:
        return []
    return [*shared, *own, Path(sys.prefix) / name, *([Path(told)] if told else [])]
