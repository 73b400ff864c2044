"""A small Hugging Face hub: the endpoints that ``huggingface_hub`` really calls, on loopback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from tests.control.file_server import FileServer

COMMIT = "c0ffee00" * 5
LARGE_BYTES = 1000  # files above are stored as LFS, with a sha256


def add_repo(server: FileServer, repo: str, files: Mapping[str, bytes]) -> None:
    """Serve ``files`` as the repository's only commit, called ``main`` too."""
    siblings = []
    for name, data in files.items():
        sha256 = hashlib.sha256(data).hexdigest()
        entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
        if len(data) > LARGE_BYTES:
            entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
        siblings.append(entry)
        large = len(data) > LARGE_BYTES
        headers = {"X-Repo-Commit": COMMIT}
        headers["ETag"] = f'"{sha256 if large else hashlib.sha1(data).hexdigest()}"'
        if large:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
        server.add(f"/{repo}/resolve/{COMMIT}/{name}", data, headers=headers)
    info = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "siblings": siblings}
    body = json.dumps(info | {"tags": [], "downloads": 0, "likes": 0, "_id": "1"}).encode()
    for revision in ("main", COMMIT):
        path = f"/api/models/{repo}/revision/{revision}"
        server.add(path, body, content_type="application/json", etag=False)
