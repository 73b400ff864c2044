"""An open GGUF file: typed metadata, tensor places, and views of the mapped bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import CorruptModel
from models.quant import Bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. ``shape`` is row-major, outermost first (the file stores it reversed).

    ``start`` counts from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    size_bytes: int


@dataclass(slots=True)
class StringArray:
    """An array of strings in the header, decoded only when asked for."""

    path: Path
    data: memoryview
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def to_list(self) -> list[str]:
        """All strings. Raises CorruptModel for one that is not UTF-8."""
        return [self._text(item) for item in self.to_bytes()]

    def to_bytes(self) -> list[bytes]:
        """All strings as stored."""
        data, at, items = self.data, self.start, []
        for _ in range(self.length):
            size = int.from_bytes(data[at : at + 8], "little")
            items.append(bytes(data[at + 8 : at + 8 + size]))
            at += 8 + size
        return items

    def _text(self, item: bytes) -> str:
        try:
            return item.decode()
        except UnicodeDecodeError as exc:
            raise CorruptModel(
                self.path, "a header string is not UTF-8", expected="UTF-8", found=item[:32]
            ) from exc


Value = int | float | bool | str | StringArray | npt.NDArray[Any]


@dataclass(slots=True)
class GgufFile:
    """One open GGUF file.

    Attributes:
        metadata: scalar values, strings, numeric arrays (numpy) and ``StringArray``.
        tensors: by name as in the file.
        header_bytes: bytes before the tensor data.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    header_bytes: int
    size_bytes: int
    _data: Bytes = field(repr=False)

    def bytes_of(self, tensor: TensorInfo) -> Bytes:
        """Read-only view of a tensor's bytes: uint8 (size_bytes,)."""
        return self._data[tensor.start : tensor.start + tensor.size_bytes]

    def content(self) -> Bytes:
        """Read-only view of the whole file: uint8 (size_bytes,)."""
        return self._data

    def header(self) -> Bytes:
        """Read-only view of everything before the tensor data."""
        return self._data[: self.header_bytes]

    def text(self, key: str) -> str | None:
        """A string value, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def integer(self, key: str) -> int | None:
        """An integer value, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._wrong(key, "an integer", value)
        return value

    def number(self, key: str) -> float | None:
        """A number, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise self._wrong(key, "a number", value)
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        """A boolean, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "a boolean", value)
        return value

    def strings(self, key: str) -> StringArray | None:
        """An array of strings, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, StringArray):
            raise self._wrong(key, "an array of strings", value)
        return value

    def array(self, key: str) -> npt.NDArray[Any] | None:
        """An array of numbers, or None. Raises CorruptModel if it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._wrong(key, "an array of numbers", value)
        return value

    def _wrong(self, key: str, expected: str, value: object) -> CorruptModel:
        return CorruptModel(
            self.path,
            f"metadata {key!r} has the wrong type",
            expected=expected,
            found=type(value).__name__,
        )
