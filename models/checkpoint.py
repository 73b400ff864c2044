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
from models.gguf_names import NOT_WEIGHTS, canonical, deinterleave
from models.layout import expected_tensors
from models.quant import KINDS, Bytes
from models.safetensors_files import check_kind, open_sharded, parse_json
from models.spec import ModelSpec
from models.spec_gguf import architecture_of, from_gguf
from models.spec_hf import from_hf_config
from models.tokenizer import Tokenizer
from models.weights import Weight

__all__ = ["Checkpoint", "Weight", "open_checkpoint"]

FINGERPRINT_SAMPLE_BYTES = 4096
# Parts of a vision model's file that its text half does not need.
OTHER_HALVES = ("vision_tower.", "multi_modal_projector.", "visual.", "mtp.")
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.")


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
            if name in NOT_WEIGHTS:
                continue
            weight = self._weight(file, name)
            found[weight.name] = weight
        self._check(found)

    def _weight(self, file: GgufFile, name: str) -> Weight:
        info, spec = file.tensors[name], self.spec
        known = canonical(name, spec)
        if known is None or len(info.shape) > 2:
            raise UnsupportedModel(
                file.path, f"tensor {name!r} {info.shape}, which family {spec.family} does not have"
            )
        kind = KINDS[info.kind]
        if len(info.shape) == 1:
            if kind.block_size != 1:
                raise UnsupportedModel(file.path, f"tensor {name!r}: a vector in {info.kind}")
            data = file.bytes_of(info).reshape(info.shape[0], kind.block_bytes)
        else:
            row = info.shape[1] // kind.block_size * kind.block_bytes
            data = file.bytes_of(info).reshape(info.shape[0], row)
        order = None
        if architecture_of(self.file)[1].interleaved:
            heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
            num_heads = heads.get(known.split(".")[-2], 0)
            if num_heads and info.shape[0] == num_heads * spec.head_dim:
                order = deinterleave(num_heads, spec.head_dim)
        return Weight(known, info.shape, info.kind, data, order)

    def _headers(self) -> list[bytes]:
        return [file.header().tobytes() for file in self.files]

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
        self._files = sorted({tensor.path for tensor in stored.values()})
        self.size_bytes = sum(file.stat().st_size for file in self._files)
        self.chat_template = tokenizer_hf.chat_template(path)
        found: dict[str, Weight] = {}
        for name, tensor in stored.items():
            if name.removeprefix("model.").startswith(OTHER_HALVES):
                continue
            known = _without_prefix(name)
            if known.endswith("rotary_emb.inv_freq"):
                continue  # older files store what the spec says
            if known == "lm_head.weight" and self.spec.tied_embeddings:
                continue  # a copy of the embeddings
            if len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
                raise UnsupportedModel(tensor.path, f"tensor {name!r} of shape {tensor.shape}")
            data: Bytes = tensor.data.reshape(tensor.shape[0], -1)
            found[known] = Weight(known, tensor.shape, check_kind(tensor), data)
        self._check(found)

    def _headers(self) -> list[bytes]:
        return [(self.path / "config.json").read_bytes()]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_hf.load(self.path)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of ``tokenizer.json``, built once."""
        return self._tokenizer


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


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
    return files
