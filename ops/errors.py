"""Errors of the surfaces that a user can do something about: what, where, next step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class OpsError(Exception):
    """Base of every error that ``ctl`` prints without a traceback."""


class HomeError(OpsError):
    """The home folder, or a file in it, cannot be used."""

    def __init__(self, path: Path, why: str, advice: str) -> None:
        super().__init__(path, why, advice)
        self.path, self.why, self.advice = path, why, advice

    def __str__(self) -> str:
        return f"home: {self.path}: {self.why}. {self.advice}"


class HomeBusy(HomeError):
    """Another live node uses this home."""


class ConfigError(OpsError):
    """``config.yaml`` is not valid; one line ``file:line field: why`` a problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class BadUsage(OpsError):
    """A command line that cannot be honoured; the text names the flag."""


class NoNode(OpsError):
    """No node answers: what was tried, why it failed, and the next step."""


class Refused(OpsError):
    """The cluster said no; ``kind`` is the atom it gave."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text or self.kind.replace("_", " ")
