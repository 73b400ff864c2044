"""A model on disk, whatever its format: spec, weights by canonical name, tokenizer, template."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Protocol

from models import tokenizer_gguf, tokenizer_hf
from models.errors import CorruptModel, NoSuchModel, UnsupportedModel
from models.gguf import open_gguf
from models.gguf_file import GgufFile
from models.gguf_names import NOT_WEIGHTS, canonical, canonical_stack
from models.layout import expected_tensors
from models.part_note import read_note
from models.quant import KINDS, Bytes
from models.quantization_hf import quantization_of
from models.row_order import heads_order, latent_order
from models.safetensors_files import open_sharded, parse_json, whole_file
from models.spec import ModelSpec
from models.spec_gguf import architecture_of, from_gguf
from models.spec_hf import from_hf_config, rotary_pairs
from models.stored_hf import canonical_weights, is_read_at_once
from models.tokenizer import Tokenizer
from models.weights import Weight, release_file
from models.weights_gguf import join

__all__ = ["Checkpoint", "Weight", "open_checkpoint"]

FINGERPRINT_SAMPLE_BYTES = 4096
KEY_HALF, VALUE_HALF = ".attn_k_b.weight", ".attn_v_b.weight"


class Checkpoint(Protocol):
    """One model, open for reading. The files stay mapped as long as it or a Weight lives."""

    path: Path
    spec: ModelSpec
    size_bytes: int
    chat_template: str | None

    @property
    def fingerprint(self) -> str:
        """Hex id (32 digits) of headers, sizes and a sample of every tensor, not of the path.

        Equal for equal files on every machine; takes milliseconds.
        """
        ...

    def names(self) -> list[str]:
        """Canonical names of all weights, in the order of the forward pass."""
        ...

    def tensor(self, name: str) -> Weight:
        """One weight. Raises KeyError for a name that ``names`` does not list."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built once. Raises CorruptModel, UnsupportedModel."""
        ...

    def release(self) -> None:
        """Tell the system that this process is done reading, see ``Weight.release``."""
        ...

    def mapped_files(self) -> dict[Path, Bytes]:
        """Each file that holds weights, whole, uint8 (size_bytes,)."""
        ...

    def read_when_opened(self) -> list[Bytes]:
        """What ``open_checkpoint`` has read of those files: headers, and a few small tensors."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file (or the first part of a split one), or a folder with ``config.json``.

    Every weight that the spec calls for is checked to be there in its exact shape, and nothing
    else to be there; a folder that holds exactly one GGUF model is taken as that file.

    Raises:
        NoSuchModel: nothing there to open.
        CorruptModel: damaged; names file, tensor, expected and found.
        UnsupportedModel: sound but not built; names what.
    """
    if path.is_dir():
        if (path / "config.json").is_file():
            return SafetensorsCheckpoint(path)
        files = sorted(path.glob("*.gguf"))
        first = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
        if len(first) != 1:
            raise NoSuchModel(path, f"a folder with no config.json and {len(first)} GGUF models")
        return GgufCheckpoint(first[0])
    return GgufCheckpoint(path)


class _Weights:
    """What both formats share: a table of weights checked against the spec."""

    path: Path
    spec: ModelSpec
    size_bytes: int

    def _check(self, found: dict[str, Weight]) -> None:
        expected = expected_tensors(self.spec)
        for name, shape in expected.items():
            if name not in found:
                raise CorruptModel(
                    self.path, "missing", tensor=name, expected=shape, found="no such tensor"
                )
            if found[name].shape != shape:
                raise CorruptModel(
                    self.path,
                    "wrong shape",
                    tensor=name,
                    expected=shape,
                    found=found[name].shape,
                )
        extra = sorted(found.keys() - expected.keys())
        if extra:
            raise UnsupportedModel(
                self.path,
                f"{len(extra)} tensors that family {self.spec.family} does not have: "
                f"{', '.join(extra[:5])}",
            )
        self._weights = {name: found[name] for name in expected}

    def names(self) -> list[str]:
        """Canonical names of all weights, in the order of the forward pass."""
        return list(self._weights)

    def tensor(self, name: str) -> Weight:
        """One weight. Raises KeyError for a name that ``names`` does not list."""
        return self._weights[name]

    def _headers(self) -> list[bytes]:
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """Hex id (32 digits) of headers, sizes and a sample of every tensor."""
        note = read_note(self.path if self.path.is_dir() else self.path.parent)
        if note is not None:  # the samples need not be here
            return note.fingerprint
        digest = hashlib.sha256()
        for header in self._headers():
            digest.update(len(header).to_bytes(8, "little") + header)
        digest.update(self.size_bytes.to_bytes(8, "little"))
        for name, weight in self._weights.items():
            digest.update(f"{name} {weight.shape} {weight.kind}\n".encode())
            digest.update(weight.data.reshape(-1)[:FINGERPRINT_SAMPLE_BYTES].tobytes())
        return digest.hexdigest()[:32]


class GgufCheckpoint(_Weights):
    """A GGUF file, or several that belong together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _parts(open_gguf(path))
        self.file = self.files[0]
        every = {name: file for file in self.files for name in file.tensors}
        self.spec = from_gguf(self.file, every.keys())
        self.size_bytes = sum(file.size_bytes for file in self.files)
        self.chat_template = self.file.text("tokenizer.chat_template")
        found: dict[str, Weight] = {}
        for name, file in every.items():
            if name in NOT_WEIGHTS or name.endswith(VALUE_HALF):
                continue
            if name.endswith(KEY_HALF):
                weight = self._joined(every, name)
                found[weight.name] = weight
            else:
                found |= {weight.name: weight for weight in self._weights_of(file, name)}
        self._check(found)

    def _joined(self, every: dict[str, GgufFile], name: str) -> Weight:
        """``kv_b_proj`` of a layer whose file has its halves apart."""
        start = name.removesuffix(KEY_HALF)
        other = start + VALUE_HALF
        if other not in every:
            raise CorruptModel(self.path, "missing, although its other half is there", tensor=other)
        halves = []
        for half in (name, other):
            info = every[half].tensors[half]
            kind = KINDS[info.kind]
            row = info.shape[-1] // kind.block_size * kind.block_bytes
            data = every[half].bytes_of(info).reshape(-1, row)
            halves.append(Weight(half, info.shape, info.kind, data))
        full = f"layers.{start.removeprefix('blk.')}.self_attn.kv_b_proj.weight"
        try:
            return join(full, *halves)
        except ValueError as exc:
            raise CorruptModel(self.path, str(exc), tensor=name) from exc

    def _weights_of(self, file: GgufFile, name: str) -> list[Weight]:
        """The weight of one tensor, or those of all experts that it holds."""
        info, spec = file.tensors[name], self.spec
        kind = KINDS[info.kind]
        if len(info.shape) == 3 and spec.experts is not None:
            names = canonical_stack(name, spec.experts.num_experts)
            if names is not None and len(names) == info.shape[0]:
                row = info.shape[2] // kind.block_size * kind.block_bytes
                stack = file.bytes_of(info).reshape(*info.shape[:2], row)
                return [
                    Weight(full, info.shape[1:], info.kind, stack[expert])
                    for expert, full in enumerate(names)
                ]
        known = canonical(name, spec)
        if known is None or len(info.shape) > 2:
            raise UnsupportedModel(
                file.path, f"tensor {name!r} {info.shape}, which family {spec.family} does not have"
            )
        if len(info.shape) == 1:
            if kind.block_size != 1:
                raise UnsupportedModel(file.path, f"tensor {name!r}: a vector in {info.kind}")
            row = kind.block_bytes
        else:
            row = info.shape[1] // kind.block_size * kind.block_bytes
        order = None
        if architecture_of(self.file)[1].interleaved:
            module = known.split(".")[-2]
            order = (heads_order if spec.latent is None else latent_order)(module, spec)
            if order is not None and len(order) != info.shape[0]:
                order = None  # of a wrong shape, which the check against the spec will name
        data = file.bytes_of(info).reshape(info.shape[0], row)
        return [Weight(known, info.shape, info.kind, data, order)]

    def _headers(self) -> list[bytes]:
        return [file.header().tobytes() for file in self.files]

    def mapped_files(self) -> dict[Path, Bytes]:
        """Each file, whole."""
        return {file.path: file.content() for file in self.files}

    def read_when_opened(self) -> list[Bytes]:
        """Headers, and what becomes part of the spec."""
        tensors = [(file, file.tensors.get(name)) for file in self.files for name in NOT_WEIGHTS]
        found = [file.bytes_of(info) for file, info in tensors if info is not None]
        return [file.header() for file in self.files] + found

    def release(self) -> None:
        """Let go of the resident pages of all files; they can still be read."""
        for file in self.files:
            release_file(file.header())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_gguf.load(self.file)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the metadata, built once."""
        return self._tokenizer


class SafetensorsCheckpoint(_Weights):
    """A folder with ``config.json``, ``*.safetensors`` and ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = parse_json(path / "config.json", (path / "config.json").read_bytes())
        self.spec = from_hf_config(config, path / "config.json")
        stored = open_sharded(path)
        one_of = {tensor.path: tensor for tensor in stored.values()}
        quantization = quantization_of(config, path / "config.json")
        self._small = [
            tensor.data for tensor in stored.values() if is_read_at_once(tensor, quantization)
        ]
        self._one_of_each_file = [one_of[path] for path in sorted(one_of)]
        self.size_bytes = sum(path.stat().st_size for path in one_of)
        self.chat_template = tokenizer_hf.chat_template(path)
        self._check(
            canonical_weights(
                stored,
                self.spec,
                quantization,
                rotary_pairs=rotary_pairs(config),
            )
        )

    def _headers(self) -> list[bytes]:
        return [(self.path / "config.json").read_bytes()]

    def mapped_files(self) -> dict[Path, Bytes]:
        """Each ``*.safetensors`` file, whole."""
        return {tensor.path: whole_file(tensor) for tensor in self._one_of_each_file}

    def read_when_opened(self) -> list[Bytes]:
        """Headers, and what packed linears are checked by."""
        files = self.mapped_files().values()
        headers = [data[: 8 + int.from_bytes(data[:8].tobytes(), "little")] for data in files]
        return headers + self._small

    def release(self) -> None:
        """Let go of the resident pages of all files; they can still be read."""
        for tensor in self._one_of_each_file:
            release_file(tensor.data)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_hf.load(self.path)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of ``tokenizer.json``, built once."""
        return self._tokenizer


def _parts(first: GgufFile) -> list[GgufFile]:
    """All files of a split model, given its first; ``[first]`` for an ordinary one."""
    count = first.integer("split.count") or 1
    if count <= 1:
        return [first]
    tail = f"-00001-of-{count:05d}.gguf"
    if not first.path.name.endswith(tail):
        raise CorruptModel(
            first.path, "not the first part of a split model", expected=f"*{tail}", found=""
        )
    stem = first.path.name.removesuffix(tail)
    files = [first]
    seen = set(first.tensors)
    for number in range(2, count + 1):
        part = open_gguf(first.path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf"))
        twice = seen & part.tensors.keys()
        if twice:
            raise CorruptModel(part.path, "also in an earlier part", tensor=min(twice))
        seen |= part.tensors.keys()
        files.append(part)
    total = first.integer("split.tensors.count")
    if total is not None and total != len(seen):
        why = f"parts of another split model among its {count} files"
        raise CorruptModel(first.path, why, expected=f"{total} tensors", found=len(seen))
    return files
