"""Damage of every kind, in both formats: an error that names the tensor and what it needs."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoint import open_checkpoint
from models.errors import CorruptModel, ModelError, NoSuchModel, UnsupportedModel
from models.gguf import open_gguf
from tests.models.test_quantized_hf import CASES, checkpoint_folder
from tests.models.test_safetensors import CONFIG, raw_tensors, save, sharded
from tests.models.tiny import llama_tensors, write_gguf

Header = dict[str, Any]
DOWN = "model.layers.1.mlp.down_proj.weight"  # F32 (16, 24)


def damage(folder: Path, change: Callable[[Header], None], *, cut: int = 0) -> None:
    """Rewrite the header of a safetensors file, and leave ``cut`` bytes off its end."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    change(header)
    head = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[: len(data) - cut])


def set_(**fields: Any) -> Callable[[Header], None]:
    return lambda header: header[DOWN].update(fields)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda header: header.pop(DOWN), CorruptModel, r"lies apart from"),
        (set_(dtype="F16"), CorruptModel, r"wrong size for F16 \(16, 24\).*768.*1536"),
        (set_(shape=[24, 24]), CorruptModel, r"wrong size for F32 \(24, 24\).*2304.*1536"),
        (set_(shape=[24, 16]), CorruptModel, r"expected \(16, 24\), found \(24, 16\)"),
        (set_(shape=[384]), CorruptModel, r"expected \(16, 24\), found \(384,\)"),
        (set_(shape=[1, 16, 24]), UnsupportedModel, r"shape \(1, 16, 24\)"),
        (set_(dtype="I64", shape=[8, 24]), UnsupportedModel, "stored as I64; read are F32"),
        (set_(dtype="Q9"), UnsupportedModel, "stored as Q9; read are F32"),
        (set_(data_offsets=[0, 1536]), CorruptModel, r"overlaps"),
        (set_(data_offsets=[1536, 0]), CorruptModel, "truncated file"),
        (set_(data_offsets=[2**61, 2**61 + 1536]), CorruptModel, r"no room for F32 \(16, 24\)"),
        (set_(data_offsets=[0]), CorruptModel, "malformed"),
        (set_(shape=[16, 1.5]), CorruptModel, "malformed"),
    ],
)
def test_a_damaged_tensor_of_safetensors_is_named(
    tmp_path: Path, change: Callable[[Header], None], error: type[ModelError], says: str
) -> None:
    damage(save(tmp_path, raw_tensors()), change)
    with pytest.raises(error, match=says) as caught:
        open_checkpoint(tmp_path)
    assert "layers.1.mlp." in str(caught.value)


def test_a_cut_off_safetensors_file_names_the_tensor_and_its_shape(tmp_path: Path) -> None:
    damage(save(tmp_path, raw_tensors()), lambda header: None, cut=10)
    with pytest.raises(CorruptModel, match=r"no room for F32 \(32, 16\).*bytes") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.tensor == "lm_head.weight"


def test_a_header_length_that_lies(tmp_path: Path) -> None:
    path = save(tmp_path, raw_tensors()) / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for lie in (0, 1, size - 1, size + 1, len(raw), 2**63):
        path.unlink()
        path.write_bytes(lie.to_bytes(8, "little") + raw[8:])
        with pytest.raises(CorruptModel, match=r"model\.safetensors"):
            open_checkpoint(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    place = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    first = "model-00001-of-00002.safetensors"
    for text, says in (
        ("{", "not JSON"),
        ("{}", "weight_map"),
        (json.dumps({"weight_map": [first]}), "weight_map"),
        (json.dumps({"weight_map": {"a": 3}}), "weight_map"),
        (json.dumps({"weight_map": {**place, "model.x.weight": first}}), r"model\.x\.weight"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "occurs twice"),
    ):
        index.write_text(text)
        with pytest.raises(CorruptModel, match=says):
            open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {**place, DOWN: "other.safetensors"}}))
    with pytest.raises(NoSuchModel, match=r"other\.safetensors: No such file"):
        open_checkpoint(tmp_path)
    second = {name: file for name, file in place.items() if file != first}
    index.write_text(json.dumps({"weight_map": second}))  # a whole file is not listed
    with pytest.raises(CorruptModel, match=r"embed_tokens\.weight.*expected \(32, 16\)"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    twice = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model-00003-of-00002.safetensors").write_bytes(twice)
    with pytest.raises(CorruptModel, match=r"model-00003.*also in model-00001"):
        open_checkpoint(tmp_path)


def gguf_header(path: Path, name: bytes, change: Callable[[bytearray, int], None]) -> None:
    """Change what stands behind a tensor's name: dims u32, sizes u64, type u32, offset u64."""
    raw = bytearray(path.read_bytes())
    change(raw, raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name))
    path.unlink()
    path.write_bytes(raw)


def put(code: str, at: int, value: int) -> Callable[[bytearray, int], None]:
    return lambda raw, start: struct.pack_into(code, raw, start + at, value)


def swap(raw: bytearray, start: int) -> None:
    raw[start + 4 : start + 12], raw[start + 12 : start + 20] = (
        raw[start + 12 : start + 20],
        raw[start + 4 : start + 12],
    )


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (put("<Q", 12, 95), CorruptModel, r"lies apart from blk\.1\.ffn_up\.weight"),
        (put("<Q", 12, 97), CorruptModel, r"overlaps blk\.1\.ffn_up\.weight"),
        (put("<Q", 12, 2**50), CorruptModel, r"ffn_up\.weight'.*no room for F32 \(1125.*, 64\)"),
        (put("<Q", 4, 96), CorruptModel, r"overlaps blk\.1\.ffn_up\.weight"),
        (swap, CorruptModel, r"up_proj\.weight'.*expected \(96, 64\), found \(64, 96\)"),
        (put("<I", 20, 1), CorruptModel, r"lies apart from blk\.1\.ffn_up\.weight"),
        (put("<I", 20, 26), UnsupportedModel, r"'blk\.1\.ffn_up\.weight' is stored as I32; read"),
        (put("<I", 0, 1), UnsupportedModel, r"'blk\.1\.ffn_up\.weight' is stored as"),
        (put("<I", 0, 9), CorruptModel, r"'blk\.1\.ffn_up\.weight'.*too many dimensions"),
        (put("<Q", 24, 32), CorruptModel, r"F32 \(.*\) overlaps"),
        (put("<Q", 24, 2**50), CorruptModel, r"lies apart from"),
        (put("<Q", 24, 33), CorruptModel, r"misaligned data of F32 \(96, 64\)"),
    ],
)
def test_a_damaged_tensor_of_gguf_is_named(
    tmp_path: Path,
    change: Callable[[bytearray, int], None],
    error: type[ModelError],
    says: str,
) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors())
    gguf_header(path, b"blk.1.ffn_up.weight", change)
    with pytest.raises(error, match=says) as caught:
        open_checkpoint(path)
    assert "m.gguf" in str(caught.value)


def test_a_cut_off_gguf_file_names_the_tensor_and_its_shape(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", llama_tensors(kind="Q8_0"))
    last = max(open_gguf(path).tensors.values(), key=lambda tensor: tensor.start)
    raw = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(raw[: last.start + last.size_bytes - 1])
    with pytest.raises(CorruptModel, match=r"no room for (F32|Q8_0) \(.*\).*expected") as caught:
        open_checkpoint(cut)
    assert caught.value.tensor == last.name


def test_parts_of_two_split_models_are_noticed(tmp_path: Path) -> None:
    for layers in (2, 3):
        (tmp_path / str(layers)).mkdir()
        writer = gguf.GGUFWriter(
            tmp_path / str(layers) / "m.gguf", "llama", split_max_tensors=8, small_first_shard=False
        )
        writer.add_uint32("llama.block_count", layers)
        for name, (values, _) in llama_tensors(layers=layers).items():
            writer.add_tensor(name, np.asarray(values).view(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first, *_, last = sorted((tmp_path / "2").glob("*.gguf"))
    others = sorted((tmp_path / "3").glob("*.gguf"))
    last.unlink()
    last.write_bytes(others[2].read_bytes())
    with pytest.raises(CorruptModel, match=r"parts of another split model.*expected 20 tensors"):
        open_checkpoint(first)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain checkpoint, and one of each packed kind."""
    out = [save(tmp_path_factory.mktemp("plain"), raw_tensors())]
    for quantization, linear, options in CASES:
        out.append(tmp_path_factory.mktemp("packed"))
        checkpoint_folder(out[-1], quantization, linear, **options)
    return out


SHAPES: list[Any] = [[], [0], [0, 0], [1], [2**40, 2], [-1], "x", None, {}]
KINDS: list[Any] = [
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I32",
    "I64",
    "U8",
    "?",
    None,
    3,
    [],
]
OFFSETS: list[Any] = [0, 1, 64, 4096, 2**62, -4, 1.5, None, "a"]


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, str, Any]:
    field = draw(st.sampled_from(["dtype", "shape", "turned", "first", "last", "gone"]))
    values = {"dtype": KINDS, "shape": SHAPES, "first": OFFSETS, "last": OFFSETS}.get(field, [0])
    return draw(st.integers(0, 99)), field, draw(st.sampled_from(values))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(which=st.integers(0, len(CASES)), made=st.lists(changes(), min_size=1, max_size=2))
def test_any_change_of_a_header_gives_a_model_or_a_typed_error(
    folders: list[Path], which: int, made: list[tuple[int, str, Any]]
) -> None:
    folder = folders[which]
    sound, told = (folder / "model.safetensors").read_bytes(), list[str]()

    def change(header: Header) -> None:
        for number, field, value in made:
            name = list(header)[number % len(header)]
            entry = copy.deepcopy(header[name])
            match field:
                case "gone":
                    del header[name]
                    continue
                case "turned":
                    if isinstance(entry["shape"], list):  # else a change before has spoilt it
                        entry["shape"] = entry["shape"][::-1]
                case "first":
                    entry["data_offsets"][0] = value
                case "last":
                    entry["data_offsets"][1] = value
                case _:
                    entry[field] = value
            header[name] = entry

    try:
        damage(folder, change)
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.names():
            checkpoint.tensor(name).dequantize(slice(0, 2))
    except ModelError as error:
        told.append(str(error))
    finally:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").write_bytes(sound)
    assert all(str(folder) in text for text in told)


def test_configs_that_contradict_the_tensors(tmp_path: Path) -> None:
    for field, value, says in (
        ("num_hidden_layers", 3, r"layers\.2\..*missing"),
        ("num_hidden_layers", 1, r"tensors that family llama does not have: layers\.1\."),
        ("intermediate_size", 28, r"mlp\..*expected \(28, 16\), found \(24, 16\)"),
        ("vocab_size", 40, r"embed_tokens\.weight.*expected \(40, 16\), found \(32, 16\)"),
        ("hidden_size", 24, r"expected \(32, 24\), found \(32, 16\)"),
    ):
        config = {**CONFIG, field: value}
        with pytest.raises(ModelError, match=says):
            open_checkpoint(save(tmp_path, raw_tensors(), **config))
