"""How kernels are compiled, and where the compiled code is kept between processes."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def _cache_folder() -> Path:
    """A folder named after the kernels' source: in ``PHALANX_CACHE_DIR`` (a port's is in its
    node's home), else among the user's caches.

    numba only notices a change of the file that holds the cached function, not of what it
    calls; a name made from all sources keeps stale code from being used.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    told = os.environ.get("PHALANX_CACHE_DIR")
    if told:
        root = Path(told)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or tempfile.gettempdir())
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"kernels-{digest.hexdigest()[:16]}"
    try:
        folder = root / name if told else root / "phalanx" / name
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    return folder if usable else Path(tempfile.mkdtemp(prefix=f"phalanx-{name}-"))


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(_cache_folder())  # type: ignore[attr-defined]

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "boundscheck": False,
    "fastmath": False,
}


def inner(function: F) -> F:
    """Compile a function that only kernels call; it becomes part of its callers."""
    compiled: F = numba.njit(**_OPTIONS)(function)
    return compiled


def inner_of(kind: int) -> Callable[[F], F]:
    """As :func:`inner`, for a function that a factory makes once for each kind of weights.

    The kind becomes part of the name. Machine code from the cache is linked by name, and numba
    only tells functions of one name apart within the process that compiled them.
    """

    def decorate(function: F) -> F:
        function.__qualname__ = f"{function.__qualname__}_{kind}"
        return inner(function)

    return decorate


def entry(function: F) -> F:
    """Compile a function that Python calls, without the interpreter lock, and keep the code."""
    compiled: F = numba.njit(cache=True, **_OPTIONS)(function)
    return compiled


def callback(function: Callable[..., None], *, num_arguments: int) -> Any:
    """Compile a function of 64-bit integers to machine code with an ``address``, and keep it."""
    signature = numba.void(*[numba.int64] * num_arguments)
    return numba.cfunc(signature, cache=True, **_OPTIONS)(function)
