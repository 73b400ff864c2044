"""Errors that models raise: a damaged file, a kind of model or field that is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class ModelError(Exception):
    """Base of every error about a model; ``kind`` is the short name remote callers see."""

    kind = "model_error"


class CorruptModel(ModelError):
    """A model file contradicts its format or its own header."""

    kind = "corrupt_model"

    def __init__(
        self,
        path: Path | str,
        why: str,
        *,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        super().__init__(str(path), why)
        self.path, self.why, self.tensor = str(path), why, tensor
        self.expected, self.found = expected, found

    def __str__(self) -> str:
        where = f", tensor {self.tensor!r}" if self.tensor is not None else ""
        numbers = (
            f" (expected {self.expected}, found {self.found})" if self.expected is not None else ""
        )
        return (
            f"corrupt model {self.path}{where}: {self.why}{numbers}. "
            "Delete the file and fetch it again."
        )


class UnsupportedModel(ModelError):
    """The file is sound, but needs something that is not built."""

    kind = "unsupported_model"

    def __init__(self, path: Path | str, what: str) -> None:
        super().__init__(str(path), what)
        self.path, self.what = str(path), what

    def __str__(self) -> str:
        return f"unsupported model {self.path}: {self.what}"


class NoSuchModel(ModelError):
    """The path holds no model file."""

    kind = "no_such_model"

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(str(path), why)
        self.path, self.why = str(path), why

    def __str__(self) -> str:
        return (
            f"no model at {self.path}: {self.why}. "
            "Give a GGUF file, or a folder with config.json and *.safetensors."
        )


class NoRoom(ModelError):
    """A rank would take more memory than it may; nothing has been read.

    Attributes:
        needed_bytes, limit_bytes: all it would take, and may take.
        parts: bytes of what needs them, by its name.
    """

    kind = "no_room"

    def __init__(self, needed_bytes: int, limit_bytes: int, parts: Mapping[str, int]) -> None:
        super().__init__(needed_bytes, limit_bytes, parts)
        self.needed_bytes, self.limit_bytes, self.parts = needed_bytes, limit_bytes, parts

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in self.parts.items())
        return (
            f"no room: this rank needs {_mib(self.needed_bytes)} ({parts}) and may take "
            f"{_mib(self.limit_bytes)}. Load over more ranks, with less context or fewer slots, "
            "or pick a smaller quantization."
        )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


class TemplateError(ModelError):
    """A chat template refused the messages, or is itself faulty."""

    kind = "template_error"


class BadCard(ModelError):
    """A model card has an unknown field, a wrong type or an impossible value."""

    kind = "bad_card"


class BadConstraint(ModelError):
    """A form asked of an answer is faulty, or says something that cannot be enforced.

    Attributes:
        what: the kind of constraint; why: the keyword and its place, or the fault.
    """

    kind = "bad_constraint"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what, why)
        self.what, self.why = what, why

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class PartsMissing(ModelError):
    """Of a model that is on this machine in parts, a part that would be read is not here."""

    kind = "parts_missing"

    def __init__(self, path: Path | str, file: str, start: int, stop: int) -> None:
        super().__init__(str(path), file, start, stop)
        self.path, self.file, self.start, self.stop = str(path), file, start, stop

    def __str__(self) -> str:
        return (
            f"model {self.path} is here in parts, and bytes {self.start} to {self.stop} of "
            f"{self.file} are not among them. Fetch the model again."
        )
