"""Typed reading of a ``config.json``: wrong types are errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import CorruptModel


class HfConfig:
    """One config, with defaults behind it; every reader raises CorruptModel for a wrong type."""

    def __init__(
        self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.values = path, {**(defaults or {}), **values}

    def has(self, key: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer, or the default where it is absent or null."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, or the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean, or the default."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; empty where it is absent or null."""
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return value

    def wrong(self, key: str, expected: str, found: object) -> CorruptModel:
        """The error for a field of the wrong type."""
        return CorruptModel(self.path, f"field {key!r}", expected=expected, found=repr(found))
