"""What is needed of a file is all that is read of it: everything else may be any garbage."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import PartsMissing
from models.mesh import grid, mesh, units_of, whole
from models.needed import (
    FileRanges,
    check_here,
    header_ranges,
    merged,
    model_files,
    needed_ranges,
)
from models.part_note import PART_NOTE
from models.plans import slices_of
from models.sharding import RankShard
from tests.models.test_families import HALVES, deepseek_gguf
from tests.models.test_quantized_hf import (
    CASES,
    checkpoint_folder,
)
from tests.models.test_safetensors import raw_tensors, save, sharded
from tests.models.tiny import llama_tensors, write_gguf

Make = Callable[[Path], Path]


def gguf(kind: str, **sizes: Any) -> Make:
    def make(folder: Path) -> Path:
        return write_gguf(folder / "m.gguf", llama_tensors(kind=kind, **sizes))

    return make


def packed(number: int) -> Make:
    def make(folder: Path) -> Path:
        quantization, linear, options = CASES[number]
        checkpoint_folder(folder, quantization, linear, **options)
        return folder

    return make


def plain(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("{}")
    return save(folder, raw_tensors())


def in_shards(folder: Path) -> Path:
    sharded(folder)
    return folder


MODELS: dict[str, Make] = {
    "gguf F32": gguf("F32"),
    "gguf Q4_1": gguf("Q4_1"),
    "gguf Q4_K": gguf("Q4_K", hidden=256, ffn=512),
    "gguf experts": lambda folder: deepseek_gguf(folder / "m.gguf"),
    "gguf halves": lambda folder: deepseek_gguf(folder / "m.gguf", HALVES),
    "safetensors": plain,
    "safetensors in shards": in_shards,
    "fp8": packed(0),
    "awq": packed(1),
    "gptq": packed(2),
    "gptq, reordered": packed(3),
}


def only(path: Path, ranges: FileRanges, into: Path) -> Path:
    """A copy of a model that has nothing but garbage outside of ``ranges``."""
    folder = path if path.is_dir() else path.parent
    rng = np.random.default_rng(11)
    into.mkdir()
    for name in model_files(open_checkpoint(path)):
        data = (folder / name).read_bytes()
        copy = bytearray(rng.bytes(len(data)))
        for start, stop in ranges.get(name, ()):
            copy[start:stop] = data[start:stop]
        (into / name).write_bytes(copy)
    return into if path.is_dir() else into / path.name


def shards_of(checkpoint: Checkpoint) -> list[RankShard]:
    spec = checkpoint.spec
    found: list[RankShard] = []
    for tensor, pipeline in (((1.0,), (1.0, 1.0)), ((2.0, 1.0), (1.0,)), ((1.0, 1.0), (1.0, 1.0))):
        if spec.num_layers >= len(pipeline):
            shares = grid(tensor, pipeline)
            found += mesh(spec, shares, units=units_of(spec, checkpoint), split_embedding=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_shard_reads_nothing_but_what_is_needed(name: str, tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    path = MODELS[name](made)
    model = open_checkpoint(path)
    for number, shard in enumerate(shards_of(model)):
        ranges = needed_ranges(model, shard)
        copy = open_checkpoint(only(path, ranges, tmp_path / str(number)))
        assert copy.spec == model.spec
        for weight_name, part in slices_of(model.spec, shard).items():
            theirs, ours = model.tensor(weight_name), copy.tensor(weight_name)
            np.testing.assert_array_equal(ours.dequantize(*part), theirs.dequantize(*part))
            narrow = ours.rows(part[0])
            if ours.kind not in ("JOINED", "AWQ", "GPTQ"):
                np.testing.assert_array_equal(narrow.packed(), theirs.packed(part[0]))


@pytest.mark.parametrize("name", MODELS)
def test_the_header_is_all_that_opening_reads(name: str, tmp_path: Path) -> None:
    (made := tmp_path / "made").mkdir()
    path = MODELS[name](made)
    model = open_checkpoint(path)
    copy = open_checkpoint(only(path, header_ranges(model), tmp_path / "copy"))
    assert (copy.spec, copy.names()) == (model.spec, model.names())
    assert copy.chat_template == model.chat_template
    assert units_of(copy.spec, copy) == units_of(model.spec, model)
    if name.startswith("gguf"):
        assert copy.tokenizer().encode("ab") == model.tokenizer().encode("ab")


def test_a_rank_needs_less_than_all(tmp_path: Path) -> None:
    path = MODELS["gguf Q4_1"](tmp_path)
    model = open_checkpoint(path)
    sizes = [
        sum(stop - start for start, stop in needed_ranges(model, shard)["m.gguf"])
        for shard in mesh(model.spec, grid((1.0,), (1.0, 1.0)))
    ]
    assert all(size < 0.7 * model.size_bytes for size in sizes)
    everything = needed_ranges(model, whole(model.spec))["m.gguf"]
    assert sum(stop - start for start, stop in everything) > 0.9 * model.size_bytes


def test_a_hole_is_never_read(tmp_path: Path) -> None:
    path = MODELS["gguf F32"](tmp_path)
    model = open_checkpoint(path)
    first, second = mesh(model.spec, grid((1.0,), (1.0, 1.0)))
    check_here(model, first)
    note = tmp_path / PART_NOTE
    note.write_text(json.dumps({"fingerprint": "f", "have": needed_ranges(model, first)}))
    check_here(model, first)
    assert open_checkpoint(path).fingerprint == "f"
    with pytest.raises(PartsMissing, match=r"bytes \d+ to \d+ of m.gguf are not among them"):
        check_here(model, second)
    note.write_text("{")
    with pytest.raises(PartsMissing):
        check_here(model, first)


def test_other_files_of_the_folder_are_no_part_of_a_model(tmp_path: Path) -> None:
    path = plain(tmp_path)
    for name in ("run.py", ".hidden.json", "phalanx.json", "old.bin", "added.txt"):
        (tmp_path / name).write_text("{}")
    assert model_files(open_checkpoint(path)) == (
        "added.txt",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    )


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))))
def test_merged_ranges_are_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    found = merged(ranges)
    assert {n for a, b in found for n in range(a, b)} == {n for a, b in ranges for n in range(a, b)}
    assert all(a < b for a, b in found)
    assert all(one[1] < two[0] for one, two in pairwise(found))
