"""safetensors files and sharded index files: checked headers over memory maps."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import CorruptModel, NoSuchModel, UnsupportedModel
from models.quant import Bytes
from models.weights import mapping_of

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ = ("F32", "F16", "BF16", "F8_E4M3")  # as weights
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I32": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: its format, shape (row-major) and bytes, uint8 (size_bytes,), a read-only view.

    ``kind`` is the file's own name of the format, which need not be one that is read.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    data: Bytes = field(repr=False)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map one file and check its header.

    Raises:
        NoSuchModel: there is no such file.
        CorruptModel: a header that is no JSON or contradicts the file, naming the tensor.

    Source: huggingface/safetensors README, "Format".
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 10:
                raise CorruptModel(path, "shorter than a header", expected=10, found=size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as exc:
        raise NoSuchModel(path, exc.strerror or str(exc)) from exc
    header_bytes = int.from_bytes(mapped[:8], "little")
    limit = min(size - 8, MAX_HEADER_BYTES)
    if header_bytes > limit:
        raise CorruptModel(
            path, "absurd header length", expected=f"at most {limit}", found=header_bytes
        )
    header = parse_json(path, mapped[8 : 8 + header_bytes], strict=True)
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    data = np.frombuffer(mapped, dtype=np.uint8)[start:]
    tensors = {name: _tensor(path, name, entry, data) for name, entry in header.items()}
    _check_places(path, tensors, {name: header[name]["data_offsets"] for name in header}, data.size)
    return tensors


def _check_places(
    path: Path, tensors: Mapping[str, StoredTensor], places: Mapping[str, list[int]], size: int
) -> None:
    """The format wants every byte to belong to one tensor: no overlap, no gap, nothing behind."""
    end, before = 0, "the header"
    for name in sorted(places, key=lambda name: places[name]):
        first, last = places[name]
        if first != end:
            what = f"overlaps {before}" if first < end else f"lies apart from {before}"
            raise CorruptModel(
                path,
                f"{_format(tensors[name])} {what}",
                tensor=name,
                expected=f"data from byte {end}",
                found=first,
            )
        end, before = last, name
    if end != size:
        raise CorruptModel(
            path, "data that no tensor has", expected=f"{end} bytes of data", found=size
        )


def open_sharded(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: by ``*.safetensors.index.json`` where there is one, else all files.

    Raises:
        NoSuchModel: the folder has no safetensors file, or the index names a missing one.
        CorruptModel: an index or file contradicts itself or the others.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = parse_json(index, index.read_bytes(), strict=True).get("weight_map")
        if not isinstance(placed, dict) or not all(
            isinstance(name, str) and name == Path(name).name for name in placed.values()
        ):
            raise CorruptModel(index, "field 'weight_map' is not names to file names")
        files = {name: open_safetensors(folder / name) for name in sorted(set(placed.values()))}
        for tensor, name in placed.items():
            if tensor not in files[name]:
                raise CorruptModel(
                    folder / name,
                    "missing, although the index places it here",
                    tensor=tensor,
                    expected="present",
                    found="absent",
                )
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise NoSuchModel(folder, "no *.safetensors file")
        files = {path.name: open_safetensors(path) for path in paths}
    merged: dict[str, StoredTensor] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in merged:
                raise CorruptModel(folder / file, f"also in {merged[name].path.name}", tensor=name)
            merged[name] = tensor
    return merged


def parse_json(path: Path, raw: bytes, *, strict: bool = False) -> dict[str, Any]:
    """A JSON object. Raises CorruptModel for anything else; ``strict``: and for a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if strict and len(found) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CorruptModel(path, "a name occurs twice in the header", tensor=name)
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as exc:
        raise CorruptModel(path, f"not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CorruptModel(path, "not JSON", expected="an object", found=type(value).__name__)
    return value


def _tensor(path: Path, name: str, entry: Any, data: Bytes) -> StoredTensor:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = isinstance(kind, str) and all(
            type(n) is int and 0 <= n < 2**62 for n in (*shape, first, last)
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise CorruptModel(
            path,
            "malformed header entry",
            tensor=name,
            expected="dtype, shape, data_offsets",
            found=str(entry)[:80],
        )
    if not first <= last <= data.size:
        raise CorruptModel(
            path,
            f"truncated file: no room for {kind} {shape}",
            tensor=name,
            expected=f"{last} bytes of data",
            found=data.size,
        )
    if kind in ITEM_BYTES:
        size = ITEM_BYTES[kind]
        for dim in shape:
            size *= dim
        if size != last - first:
            raise CorruptModel(
                path,
                f"wrong size for {kind} {shape}",
                tensor=name,
                expected=f"{size} bytes",
                found=last - first,
            )
    return StoredTensor(path, name, kind, shape, data[first:last])


def whole_file(tensor: StoredTensor) -> Bytes:
    """The file that a tensor is of: uint8 (size_bytes,), a read-only view."""
    owner = mapping_of(tensor.data)
    assert owner is not None  # ``open_safetensors`` maps every file
    return np.frombuffer(owner, dtype=np.uint8)


def _format(tensor: StoredTensor) -> str:
    return f"{tensor.kind} {tensor.shape}"


def check_kind(tensor: StoredTensor) -> str:
    """Format as ``models.quant`` names it. Raises UnsupportedModel for one that is not read."""
    if tensor.kind not in READ:
        raise UnsupportedModel(
            tensor.path,
            f"tensor {tensor.name!r} is stored as {tensor.kind}; read are {', '.join(READ)}",
        )
    return tensor.kind
