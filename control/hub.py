"""Model files from the Hugging Face hub, or from whatever ``HF_ENDPOINT`` names instead.

``huggingface_hub`` does the transfer (resume, Xet, tokens); this file says which files are taken,
checks their digests, and puts the library's errors into words. Code files are never taken.
"""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from control.errors import ChecksumMismatch, DownloadFailed, NotAModel
from control.fetch import Cancelled, OnBytes, check_sha256, disk_errors, need_space
from models.card import HubSource

DEFAULT_ENDPOINT = "https://huggingface.co"
DATA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.safetensors",
    "*.safetensors.index.json",
)
CODE = (".py", ".so", ".pyd", ".dll", ".sh", ".pkl", ".pickle", ".bin", ".pt", ".pth")
SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository; ``sha256`` is known for large (LFS) files only."""

    name: str
    size_bytes: int
    sha256: str | None


def endpoint() -> str:
    """Base address of the hub, read at every use."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def list_files(source: HubSource) -> tuple[str, list[HubFile]]:
    """The commit that ``source`` means now, and the files to take from it.

    Raises:
        DownloadFailed: hub not reached, or it does not give the repository out.
        NotAModel: there is nothing we can load in it.
    """
    with _clear_errors(source.repo):
        info = HfApi(endpoint=endpoint()).model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=SETTLE_S
        )
    every = [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in info.siblings or ()
        if not s.rfilename.lower().endswith(CODE) and _is_plain(s.rfilename)
    ]
    return str(info.sha), choose(source, every)


def choose(source: HubSource, every: list[HubFile]) -> list[HubFile]:
    """Files that the source's patterns name; without patterns: the model that is obvious.

    Raises:
        NotAModel: no file, or several models to choose from.
    """
    name = f"hf:{source.repo}"
    if source.files:
        found = [f for f in every if any(fnmatch.fnmatchcase(f.name, p) for p in source.files)]
        if not found:
            raise NotAModel(name, f"the repository has no file like {', '.join(source.files)}")
        return found
    names = {f.name for f in every}
    if "config.json" in names and any(fnmatch.fnmatchcase(n, "*.safetensors") for n in names):
        flat = [f for f in every if "/" not in f.name]
        return [f for f in flat if any(fnmatch.fnmatchcase(f.name, p) for p in DATA_FILES)]
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf"))
    if len(ggufs) == 1:
        return [f for f in every if f.name == ggufs[0]]
    if ggufs:
        shown = ", ".join(f"{name}/{n}" for n in ggufs[:20])
        raise NotAModel(name, f"it holds several GGUF files; name one of {shown}")
    raise NotAModel(name, "it has neither a GGUF file nor config.json with *.safetensors")


def fetch_repo(
    source: HubSource,
    folder: Path,
    *,
    on_bytes: OnBytes,
    on_phase: Callable[[str], None],
    cancelled: threading.Event,
) -> list[Path]:
    """Fill ``folder`` with the files of ``source``, all of one commit; returns them.

    What is there already is not fetched again; a broken-off file is resumed.

    Raises:
        DownloadFailed, ChecksumMismatch, NotAModel, DiskFull, Cancelled.
    """
    commit, files = list_files(source)
    total = sum(file.size_bytes for file in files)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    have = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    need_space(folder, max(0, total - have))
    before = 0
    paths = []
    for file in files:
        if cancelled.is_set():
            raise Cancelled
        with _clear_errors(f"{source.repo}/{file.name}"), disk_errors(folder, total - before):
            name = hf_hub_download(
                source.repo,
                file.name,
                revision=commit,
                local_dir=folder,
                endpoint=endpoint(),
                tqdm_class=_reporting(on_bytes, before, total, cancelled),
            )
        paths.append(Path(name))
        before += file.size_bytes
        on_bytes(before, total)
    on_phase("verifying")
    for file, path in zip(files, paths, strict=True):
        what = f"{source.repo}/{file.name}"
        if file.size_bytes and path.stat().st_size != file.size_bytes:
            found = path.stat().st_size
            path.unlink()
            raise ChecksumMismatch(what, f"{file.size_bytes} bytes", f"{found} bytes")
        if file.sha256:
            check_sha256(path, file.sha256, what, cancelled)
    return paths


def _is_plain(name: str) -> bool:
    """A relative name that stays inside the folder it is put into."""
    parts = name.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") and ":" not in part for part in parts)


def _reporting(
    on_bytes: OnBytes, before: int, total: int, cancelled: threading.Event
) -> type[hub_tqdm]:
    """A progress bar that draws nothing: it reports bytes, and stops a transfer nobody wants."""

    class Reporting(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._done = int(kwargs.get("initial") or 0)
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if cancelled.is_set():
                raise Cancelled
            self._done += int(n or 0)
            on_bytes(before + self._done, total)
            return None

    return Reporting


class _clear_errors:
    """Turn the hub library's exceptions into DownloadFailed."""

    def __init__(self, what: str) -> None:
        self.what = f"{what} from {endpoint()}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        match exc:
            case GatedRepoError():
                why, advice = "the repository is gated", "Accept its terms there and set HF_TOKEN"
            case RepositoryNotFoundError():
                why = "there is no such repository, or it is private"
                advice = "Check the name; set HF_TOKEN for a private one"
            case RevisionNotFoundError():
                why, advice = "there is no such revision", "Check the revision"
            case OfflineModeIsEnabled():
                why, advice = "HF_HUB_OFFLINE is set", "Unset it to download"
            case LocalEntryNotFoundError() | httpx2.TransportError():
                cause = exc.__cause__ or exc
                why = f"the hub was not reached ({str(cause) or type(cause).__name__})"
                advice = "Check the network and HF_ENDPOINT"
            case EntryNotFoundError():
                why, advice = "there is no such file", "Check the file's name"
            case HFValidationError():
                why, advice = str(exc), "Write hf:ORG/REPO or hf:ORG/REPO/FILE"
            case HfHubHTTPError(response=response) if response.status_code == 404:
                why, advice = "there is no such repository or file", "Check the name"
            case HfHubHTTPError(response=response):
                status = response.status_code
                why, advice = f"the hub answered {status}", "Try again later"
            case OSError() if exc.errno is None:  # size mismatch and the like
                why, advice = str(exc), "Try again"
            case _:
                return
        raise DownloadFailed(self.what, why, advice) from exc
