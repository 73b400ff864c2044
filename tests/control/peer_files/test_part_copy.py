"""A copy of parts of a model on disk: what a kill, a power cut and a damaged note leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from control.peer_files.chunks import CHUNK_BYTES, digest_of
from control.peer_files.offer import Offer
from control.peer_files.part_copy import PartCopy
from control.store_room import taken_bytes
from models.part_note import PART_NOTE, read_note

SIZE = 4 * CHUNK_BYTES + 5
OFFER = Offer(
    id="m", main="m.gguf", files=(("m.gguf", SIZE),), fingerprint="f", header={"m.gguf": ((0, 9),)}
)
CONTENT = bytes(range(251)) * (SIZE // 251 + 1)


def add(copy: PartCopy, chunk: int) -> None:
    start, stop = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, SIZE)
    with copy.path.open("r+b") as file:
        file.seek(start)
        file.write(CONTENT[start:stop])
    copy.add("m.gguf", chunk, digest_of(CONTENT[start:stop]))


def made(root: Path, *chunks: int, clean: bool) -> PartCopy:
    copy = PartCopy.created(root, OFFER)
    for chunk in chunks:
        add(copy, chunk)
    copy.save(clean=clean)
    return copy


def opened(root: Path) -> PartCopy:
    copy = PartCopy.opened(root)
    assert copy is not None
    return copy


def test_a_clean_copy_is_taken_as_it_is(tmp_path: Path) -> None:
    copy = made(tmp_path / "c", 1, 4, clean=True)
    assert copy.have_bytes() == CHUNK_BYTES + 5
    assert taken_bytes(copy.files) < 2 * CHUNK_BYTES
    again = opened(tmp_path / "c")
    assert (
        again.have()
        == copy.have()
        == {"m.gguf": ((CHUNK_BYTES, 2 * CHUNK_BYTES), (SIZE - 5, SIZE))}
    )
    assert again.missing("m.gguf", [(0, SIZE)]) == [0, 2, 3]
    assert again.has("m.gguf", CHUNK_BYTES + 3, 2 * CHUNK_BYTES)
    assert not again.has("m.gguf", 0, 1)
    assert not again.has("other", 0, 1)
    assert not again.is_whole()
    for chunk in (0, 2, 3):
        add(again, chunk)
    assert again.is_whole()
    note = read_note(copy.files)
    assert note is not None
    assert note.fingerprint == "f"


@pytest.mark.slow
def test_after_a_kill_every_chunk_is_checked_again(tmp_path: Path) -> None:
    copy = made(tmp_path / "c", 0, 1, 2, clean=False)
    with copy.path.open("r+b") as file:  # a power cut: it never reached the disk
        file.seek(CHUNK_BYTES + 99)
        file.write(bytes(5000))
    assert opened(tmp_path / "c").missing("m.gguf", [(0, SIZE)]) == [1, 3, 4]


def test_chunks_that_came_after_the_last_note_count_after_a_kill(tmp_path: Path) -> None:
    copy = made(tmp_path / "c", 0, clean=False)
    add(copy, 3)  # too soon after the note for another
    noted = PartCopy.noted(tmp_path / "c")
    assert noted is not None
    assert noted.missing("m.gguf", [(0, SIZE)]) == [1, 2, 3, 4]
    assert opened(tmp_path / "c").missing("m.gguf", [(0, SIZE)]) == [1, 2, 4]


@pytest.mark.parametrize("damage", ["note", "cut", "gone", "nonsense"])
def test_what_cannot_be_gone_on_with_is_nothing(tmp_path: Path, damage: str) -> None:
    copy = made(tmp_path / "c", 0, clean=True)
    match damage:
        case "note":
            (copy.files / PART_NOTE).unlink()
        case "cut":
            copy.path.write_bytes(b"short")
        case "gone":
            copy.path.unlink()
        case _:
            (copy.files / PART_NOTE).write_text('{"id": 3}')
    assert PartCopy.opened(tmp_path / "c") is None
    assert PartCopy.noted(tmp_path / "c") is None
    assert PartCopy.created(tmp_path / "c", OFFER).have_bytes() == 0
