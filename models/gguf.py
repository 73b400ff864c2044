"""Opening GGUF files: the whole header is checked, no tensor byte is read."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from models.errors import CorruptModel, NoSuchModel, UnsupportedModel
from models.gguf_file import GgufFile, StringArray, TensorInfo, Value
from models.quant import KINDS

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 1024
STRING, ARRAY = 8, 9
# value type -> struct code; bool (7) is one byte
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
NUMPY = {kind: np.dtype("<" + code) for kind, code in SCALARS.items()}


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file (version 2 or 3, little-endian) and check its whole header.

    Raises:
        NoSuchModel: there is no such file.
        CorruptModel: wrong magic, a length, count, offset or type that the file cannot hold,
            overlapping or truncated tensors.
        UnsupportedModel: another version, byte order or tensor type.

    Source: ggml ``docs/gguf.md``.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CorruptModel(path, "shorter than a header", expected=24, found=size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as exc:
        raise NoSuchModel(path, exc.strerror or str(exc)) from exc
    return _Parser(path, mapped, size).parse()


class _Parser:
    """Reads the header front to back; every read is checked against the end of the file."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self.data = memoryview(mapped)

    def parse(self) -> GgufFile:
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            raise CorruptModel(self.path, "not a GGUF file", expected=MAGIC, found=magic)
        self.at = 4
        version = self.scalar("I")
        if version >> 24 and not version & 0xFFFF:
            raise UnsupportedModel(self.path, "big-endian GGUF")
        if version not in (2, 3):
            raise UnsupportedModel(self.path, f"GGUF version {version}; 2 and 3 are read")
        num_tensors, num_values = self.scalar("Q"), self.scalar("Q")
        # the smallest entry of each kind: 8+1+4+1 bytes of metadata, 8+1+4+8+4+8 of a tensor
        for what, count, least in (("metadata", num_values, 14), ("tensor", num_tensors, 33)):
            if count * least > self.size - self.at:
                raise CorruptModel(
                    self.path,
                    f"absurd {what} count",
                    expected=f"at most {(self.size - self.at) // least}",
                    found=count,
                )
        metadata: dict[str, Value] = {}
        for _ in range(num_values):
            key = self.name("metadata key")
            if key in metadata:
                raise CorruptModel(self.path, f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(key, self.scalar("I"))
        infos = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 0 < alignment <= 2**20
            or alignment & (alignment - 1)
        ):
            raise CorruptModel(
                self.path, "impossible alignment", expected="a power of two", found=alignment
            )
        start = -(-self.at // alignment) * alignment
        tensors = self.place(infos, start, alignment)
        array = np.frombuffer(self.data, dtype=np.uint8)
        return GgufFile(self.path, metadata, tensors, self.at, self.size, array)

    def take(self, count: int, what: str) -> memoryview:
        if count > self.size - self.at:
            raise CorruptModel(
                self.path,
                f"truncated in the header, in {what} at byte {self.at}",
                expected=f"{count} more bytes",
                found=self.size - self.at,
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        raw = self.take(struct.calcsize("<" + code), "a number")
        return struct.unpack("<" + code, raw)[0]

    def text(self, what: str) -> str:
        raw = bytes(self.take(self.scalar("Q"), what))
        try:
            return raw.decode()
        except UnicodeDecodeError as exc:
            raise CorruptModel(
                self.path, f"{what} is not UTF-8", expected="UTF-8", found=raw[:32]
            ) from exc

    def name(self, what: str) -> str:
        size = int.from_bytes(self.data[self.at : self.at + 8], "little")
        if size > MAX_NAME_BYTES:
            raise CorruptModel(
                self.path,
                f"{what} at byte {self.at} is too long",
                expected=f"at most {MAX_NAME_BYTES} bytes",
                found=size,
            )
        return self.text(what)

    def value(self, key: str, kind: int) -> Value:
        if kind == STRING:
            return self.text(f"metadata {key!r}")
        if kind == ARRAY:
            return self.array(key)
        if kind not in SCALARS:
            raise CorruptModel(self.path, f"metadata {key!r} has unknown value type {kind}")
        result: int | float | bool = self.scalar(SCALARS[kind])
        return result

    def array(self, key: str) -> Value:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in NUMPY:
            raw = self.take(count * NUMPY[kind].itemsize, f"array {key!r}")
            return np.frombuffer(raw, dtype=NUMPY[kind])
        if kind != STRING:
            raise CorruptModel(
                self.path,
                f"array {key!r} has items of an unknown type",
                expected="numbers or strings",
                found=kind,
            )
        if count * 8 > self.size - self.at:
            raise CorruptModel(
                self.path,
                f"array {key!r} is longer than the file",
                expected=f"at most {(self.size - self.at) // 8} strings",
                found=count,
            )
        start, at, end, data = self.at, self.at, self.size, self.data
        for _ in range(count):
            at += 8 + int.from_bytes(data[at : at + 8], "little")
            if at > end:
                raise CorruptModel(
                    self.path, f"array {key!r} is truncated", expected=f"{at} bytes", found=end
                )
        self.at = at
        return StringArray(self.path, data, start, count)

    def tensor(self) -> TensorInfo:
        name = self.name("tensor name")
        num_dims = self.scalar("I")
        if num_dims > MAX_DIMS:
            raise CorruptModel(
                self.path,
                "too many dimensions",
                tensor=name,
                expected=f"at most {MAX_DIMS}",
                found=num_dims,
            )
        shape = tuple(reversed([self.scalar("Q") for _ in range(num_dims)]))
        number, offset = self.scalar("I"), self.scalar("Q")
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError:
            kind = f"type {number}"
        if kind not in KINDS:
            raise UnsupportedModel(
                self.path, f"tensor {name!r} is stored as {kind}; read are {', '.join(KINDS)}"
            )
        weights = 1
        for dim in shape:
            weights *= dim
        size = KINDS[kind]
        if not shape or weights <= 0 or shape[-1] % size.block_size:
            raise CorruptModel(
                self.path,
                "impossible shape",
                tensor=name,
                expected=f"rows of a positive multiple of {size.block_size} ({kind})",
                found=shape,
            )
        return TensorInfo(name, shape, kind, offset, weights // size.block_size * size.block_bytes)

    def place(self, infos: list[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
        """Turn offsets into file positions; refuse overlap, gaps and what lies beyond the end."""
        tensors: dict[str, TensorInfo] = {}
        end, before = start, "the header"
        for info in sorted(infos, key=lambda info: info.start):
            at, what = start + info.start, f"{info.kind} {info.shape}"
            if info.start % alignment:
                raise CorruptModel(
                    self.path,
                    f"misaligned data of {what}",
                    tensor=info.name,
                    expected=f"a multiple of {alignment}",
                    found=info.start,
                )
            follows = -(-end // alignment) * alignment
            if at != follows:
                raise CorruptModel(
                    self.path,
                    f"{what} {'overlaps' if at < follows else 'lies apart from'} {before}",
                    tensor=info.name,
                    expected=f"data from byte {follows}",
                    found=at,
                )
            end, before = at + info.size_bytes, info.name
            if end > self.size:
                raise CorruptModel(
                    self.path,
                    f"truncated file: no room for {what}",
                    tensor=info.name,
                    expected=f"{end} bytes",
                    found=self.size,
                )
            if info.name in tensors:
                raise CorruptModel(self.path, "occurs twice", tensor=info.name)
            tensors[info.name] = TensorInfo(info.name, info.shape, info.kind, at, info.size_bytes)
        return tensors
