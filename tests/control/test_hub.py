"""The real ``huggingface_hub`` against a small hub of our own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils._http import close_session

from control.errors import ChecksumMismatch, DownloadFailed, NotAModel
from control.fetch import Cancelled
from control.hub import HubFile, choose, fetch_repo
from models.card import HubSource
from tests.control.file_server import FileServer, closed_port
from tests.control.hub_server import COMMIT, add_repo

WEIGHTS = os.urandom(2_000_000)
REPO = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"x",
    "README.md": b"# x",
}


@pytest.fixture(autouse=True)
def hub(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    add_repo(server, "org/repo", REPO)
    yield server
    close_session()


def source(repo: str = "org/repo", *files: str) -> HubSource:
    return HubSource(repo=repo, revision="main", files=files, size_bytes=0)


def fetch(
    folder: Path, what: HubSource, seen: list[tuple[int, int]] | None = None, cancel: bool = False
) -> list[Path]:
    cancelled = threading.Event()
    told = [] if seen is None else seen

    def on_bytes(done: int, total: int) -> None:
        told.append((done, total))
        if cancel:
            cancelled.set()

    return fetch_repo(
        what, folder, on_bytes=on_bytes, on_phase=lambda _phase: None, cancelled=cancelled
    )


def test_a_repository_arrives_without_its_code(hub: FileServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    paths = fetch(tmp_path, source(), seen)
    assert sorted(p.name for p in paths) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert not list(tmp_path.rglob("*.py"))
    total = len(WEIGHTS) + 4
    assert seen[-1] == (total, total)
    assert all(COMMIT in path for verb, path, _ in hub.requests if "/resolve/" in path)


def test_one_file_and_patterns(tmp_path: Path) -> None:
    assert [p.name for p in fetch(tmp_path, source("org/repo", "README.md"))] == ["README.md"]
    assert len(fetch(tmp_path, source("org/repo", "*.json"))) == 2
    with pytest.raises(NotAModel, match=r"no file like \*\.py"):
        fetch(tmp_path, source("org/repo", "*.py"))


def test_a_dropped_connection_is_resumed(hub: FileServer, tmp_path: Path) -> None:
    data = os.urandom(13_000_000)  # the library writes 10 MiB at a time
    add_repo(hub, "org/big", {"m.gguf": data})
    hub.files[f"/org/big/resolve/{COMMIT}/m.gguf"].drops.append(12_000_000)
    (path,) = fetch(tmp_path, source("org/big"))
    assert path.read_bytes() == data
    assert any(wanted.startswith("bytes=") for _, _, wanted in hub.requests)


def test_a_file_with_a_wrong_digest_is_thrown_away(hub: FileServer, tmp_path: Path) -> None:
    served = hub.files[f"/org/repo/resolve/{COMMIT}/model.safetensors"]
    served.data = b"x" * len(WEIGHTS)
    with pytest.raises(ChecksumMismatch, match=r"org/repo/model\.safetensors"):
        fetch(tmp_path, source())
    assert not (tmp_path / "model.safetensors").exists()


def test_a_cancelled_transfer_ends(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        fetch(tmp_path, source(), cancel=True)


def test_the_hubs_answers_become_clear_errors(
    hub: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadFailed, match="there is no such repository or file"):
        fetch(tmp_path, source("org/none"))
    hub.missing_headers["X-Error-Code"] = "RepoNotFound"
    with pytest.raises(DownloadFailed, match=r"no such repository, or it is private.*HF_TOKEN"):
        fetch(tmp_path, source("org/none"))
    with pytest.raises(DownloadFailed, match="Write hf:ORG/REPO"):
        fetch(tmp_path, source("org/-bad--name"))
    hub.files["/api/models/org/repo/revision/main"].statuses = [500] * 50
    with pytest.raises(DownloadFailed, match="the hub answered 500"):
        fetch(tmp_path, source())
    with closed_port() as url:
        monkeypatch.setenv("HF_ENDPOINT", url(""))
        with pytest.raises(DownloadFailed, match=r"the hub was not reached.*HF_ENDPOINT"):
            fetch(tmp_path, source())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.gguf", "README.md"], ["a.gguf"]),
        (["config.json", "x.safetensors", "a.gguf"], ["config.json", "x.safetensors"]),
        (["a.Q4.gguf", "a.Q8.gguf"], "several GGUF files; name one of hf:org/repo/a.Q4.gguf"),
        (["README.md"], "neither a GGUF file nor"),
    ],
)
def test_what_is_taken_of_a_repository(names: list[str], found: list[str] | str) -> None:
    files = [HubFile(name, 1, None) for name in names]
    if isinstance(found, str):
        with pytest.raises(NotAModel, match=found):
            choose(source(), files)
    else:
        assert [f.name for f in choose(source(), files)] == found
