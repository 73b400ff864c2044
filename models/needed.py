"""Which bytes of a checkpoint's files are read: to open it, and to load one rank's shard.

Names of files are relative to the folder the model is in, with ``/`` on every system. Ranges are
half-open, in order, and apart from each other. Pure: from headers alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.checkpoint import Checkpoint
from models.errors import PartsMissing
from models.part_note import OWN_NOTES, read_note
from models.plans import slices_of
from models.sharding import RankShard
from models.weights import Weight
from models.weights_gguf import JoinedWeight
from models.weights_hf import GroupedWeight

Ranges = tuple[tuple[int, int], ...]
FileRanges = dict[str, Ranges]

# What belongs to a model beside its weights. Nothing here is ever run.
SMALL_SUFFIXES: Final = (".json", ".jinja", ".model", ".tiktoken", ".txt")


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same bytes in order, each once; empty ranges vanish, neighbours become one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def model_folder(checkpoint: Checkpoint) -> Path:
    """The folder that names of files are relative to."""
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def model_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Every file of a model: those with weights; of a folder also the small ones beside them."""
    folder = model_folder(checkpoint)
    names = {path.name for path in checkpoint.mapped_files()}
    if checkpoint.path.is_dir():
        names |= {
            path.name
            for path in folder.iterdir()
            if path.suffix in SMALL_SUFFIXES
            and path.name not in OWN_NOTES
            and not path.name.startswith(".")
            and path.is_file()
        }
    return tuple(sorted(names))


def header_ranges(checkpoint: Checkpoint) -> FileRanges:
    """What ``open_checkpoint``, the tokenizer and the chat template read; small files whole."""
    folder, places = model_folder(checkpoint), _Places(checkpoint.mapped_files())
    found = places.of(checkpoint.read_when_opened())
    for name in model_files(checkpoint):
        if folder / name not in places.paths:
            found[name] = merged([(0, (folder / name).stat().st_size)])
    return found


def needed_ranges(checkpoint: Checkpoint, shard: RankShard) -> FileRanges:
    """What loading a shard reads, the header included.

    Rows of a weight lie together in a file and columns do not: of a weight that is cut by
    columns all of a row counts. Of a linear that is packed across its rows (AWQ, GPTQ) or stored
    as two halves, all of it does.

    Raises:
        models.plans.UnmatchedWeight: as ``slices_of``.
    """
    places = _Places(checkpoint.mapped_files())
    views: list[npt.NDArray[Any]] = []
    for name, part in slices_of(checkpoint.spec, shard).items():
        views += _read(checkpoint.tensor(name), part[0])
    found = header_ranges(checkpoint)
    for file, ranges in places.of(views).items():
        found[file] = merged((*found.get(file, ()), *ranges))
    return found


def check_here(checkpoint: Checkpoint, shard: RankShard) -> None:
    """See that all of a shard is on this disk; nothing is done for a model that is whole.

    Raises:
        PartsMissing: something that loading would read is a hole, and would read as zeros.
    """
    note = read_note(model_folder(checkpoint))
    if note is None:
        return
    for name, ranges in needed_ranges(checkpoint, shard).items():
        for start, stop in ranges:
            if note.lacks(name, start, stop):
                raise PartsMissing(checkpoint.path, name, start, stop)


def _read(weight: Weight, rows: slice) -> list[npt.NDArray[Any]]:
    """Views that hold all that any reader of ``rows`` touches; scales that are read already."""
    if isinstance(weight, JoinedWeight):
        return [weight.keys.data, weight.values.data]
    if isinstance(weight, GroupedWeight):
        return [weight.words, weight.zeros, weight.scales]
    lines = weight.file_rows(rows)
    if not isinstance(lines, slice):
        if not len(lines):
            return []
        lines = slice(int(lines.min()), int(lines.max()) + 1)
    return [weight.data[lines]]


class _Places:
    """Where in which file a view lies: by its address in the mapping."""

    def __init__(self, files: Mapping[Path, npt.NDArray[Any]]) -> None:
        bounds = sorted(
            (*np.lib.array_utils.byte_bounds(data), path) for path, data in files.items()
        )
        self._lows = [low for low, _, _ in bounds]
        self._highs = [high for _, high, _ in bounds]
        self._paths = [path for _, _, path in bounds]
        self.paths = frozenset(files)

    def of(self, views: Iterable[npt.NDArray[Any]]) -> FileRanges:
        """Ranges of all views; one that is no part of a file (a copy) has none."""
        found: dict[str, list[tuple[int, int]]] = {}
        for view in views:
            if not view.size:
                continue
            low, high = np.lib.array_utils.byte_bounds(view)
            at = bisect_right(self._lows, low) - 1
            if at >= 0 and high <= self._highs[at]:
                base = self._lows[at]
                found.setdefault(self._paths[at].name, []).append((low - base, high - base))
        return {name: merged(ranges) for name, ranges in found.items()}
