"""From a fresh clone to a running node or a test run: makes ``.venv``, installs, goes on.

    python3 ops/up.py start [arguments of `ctl start`]
    python3 ops/up.py test  [arguments of pytest]

Standard library only, and written so that an old Python can still read it and say so.
A stamp inside ``.venv`` records what was installed; while it holds, nothing is done. A
marker beside it is there from the first change until the stamp: who finds it knows that
a run was cut short, and starts over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "phalanx-stamp.json"
MARKER = VENV / "phalanx-incomplete"
LOCK = ROOT / ".venv.lock"
WINDOWS = sys.platform == "win32"
SCRIPTS = VENV / ("Scripts" if WINDOWS else "bin")
PYTHON = SCRIPTS / ("python.exe" if WINDOWS else "python")
CTL = SCRIPTS / ("ctl.exe" if WINDOWS else "ctl")
NEEDED = (3, 11)
LOCK_TIMEOUT_S = 3600.0
TAIL_LINES = 20
# Two tests at a time, each file by one process; arguments that come later win (`-n 0`).
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile")

CAUSES = (  # what pip prints -> what the user can do; the first match counts
    (
        ("No space left on device", "Errno 28", "not enough space on the disk"),
        "the disk is full: free some space (an installation takes 2 to 8 GB, the temporary folder"
        " as much for a while; TMPDIR chooses another), then run the same command again",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "SSLCertVerificationError", "SSLError"),
        "the package index's certificate is not trusted here: point PIP_CERT to your proxy's"
        " certificate, then run the same command again",
    ),
    (
        (
            "NewConnectionError",
            "Connection refused",
            "Connection broken",
            "Name or service not known",
            "Temporary failure in name resolution",
            "nodename nor servname",
            "getaddrinfo failed",
            "Network is unreachable",
            "No route to host",
            "ReadTimeoutError",
            "ConnectTimeoutError",
            "ProxyError",
        ),
        "the package index was not reached: check the network and the proxy (HTTPS_PROXY;"
        " PIP_INDEX_URL names another index), then run the same command again",
    ),
    (
        ("ensurepip is not available", "No module named ensurepip", "No module named venv"),
        "this Python came without venv: on Debian and Ubuntu run `apt install python3-venv`,"
        " then the same command again",
    ),
    (
        ("Permission denied", "Errno 13", "WinError 5", "Access is denied"),
        "a file may not be written: give this folder to your user, end programs that use .venv,"
        " then run the same command again",
    ),
    (
        ("No matching distribution found", "requires a different Python"),
        "a pinned package does not exist for this Python or platform: try another Python"
        " (3.11 to 3.13), 64 bits",
    ),
)


class UpError(Exception):
    """A step failed: which one, what was seen, what to do."""

    def __init__(self, step: str, seen: str, advice: str) -> None:
        super().__init__(step, seen, advice)
        self.step, self.seen, self.advice = step, seen, advice

    def __str__(self) -> str:
        shown = "".join("\n    | " + line for line in self.seen.splitlines())
        return f"FAILED while {self.step}{shown}\n    what to do: {self.advice}"


def say(text: str) -> None:
    print("up: " + text, file=sys.stderr, flush=True)


def advice_for(output: str) -> str:
    """The next step for the user, from what a failed tool printed."""
    for signs, advice in CAUSES:
        if any(sign in output for sign in signs):
            return advice
    return "read the lines above; removing .venv and running the same command starts over"


# -- is there anything to do? ----------------------------------------------------------------


def fingerprint() -> str:
    """Hash of everything that decides what is installed."""
    seen = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", ROOT / "ops" / "constraints.txt"):
        seen.update(path.read_bytes() if path.exists() else b"")
        seen.update(b"\0")
    return seen.hexdigest()


def venv_version() -> str | None:
    """Version of the environment's interpreter; None where it does not run."""
    try:
        done = subprocess.run(
            [str(PYTHON), "-I", "-S", "-c", "import sys; print(sys.version)"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_stamp() -> dict[str, object]:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def site_packages() -> Path:
    found = sorted(VENV.glob("Lib/site-packages" if WINDOWS else "lib/python*/site-packages"))
    return found[-1] if found else VENV / "lib"


def installed() -> set[str]:
    """Names with versions of all installed packages, from their metadata folders."""
    try:
        return {n for n in os.listdir(site_packages()) if n.endswith(".dist-info")}
    except OSError:
        return set()


def is_ready(extras: tuple[str, ...]) -> bool:
    """Whether ``.venv`` is what this source tree asks for. Takes some 30 ms."""
    stamp = read_stamp()
    packages, had = stamp.get("packages"), stamp.get("extras")
    return (
        isinstance(packages, list)
        and isinstance(had, list)
        and stamp.get("fingerprint") == fingerprint()
        and stamp.get("root") == str(ROOT)
        and set(extras) <= set(had)
        and set(packages) <= installed()
        and CTL.exists()
        and not MARKER.exists()
        and stamp.get("python") == venv_version()
    )


# -- making it so ----------------------------------------------------------------------------


@contextlib.contextmanager
def lock() -> Iterator[int]:
    """Hold the only right to change ``.venv``; the system takes it back if we die."""
    try:
        held = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as exc:
        raise UpError("locking .venv", str(exc), advice_for(str(exc))) from exc
    try:
        deadline_s, told = time.monotonic() + LOCK_TIMEOUT_S, False
        while not try_lock(held):
            if not told:
                say("another run is preparing .venv; waiting for it")
                told = True
            if time.monotonic() > deadline_s:
                raise UpError(
                    "waiting for another run that prepares .venv",
                    f"it has held {LOCK} for {LOCK_TIMEOUT_S:.0f} s",
                    "end that run, then run the same command again",
                )
            time.sleep(0.2)
        yield held
    finally:
        os.close(held)  # lets go of the lock too


def try_lock(held: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(held, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def run_step(step: str, command: list[str], held: int) -> None:
    """Run one tool, show its main lines. Raises UpError with its last lines if it fails."""
    foreign = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    env = {k: v for k, v in os.environ.items() if k not in foreign}
    env.update(PIP_USER="0", PIP_NO_INPUT="1", PYTHONUNBUFFERED="1", PYTHONUTF8="1")
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=env,
            cwd=str(ROOT),
            # if we are killed, a pip that lives on still holds the lock
            pass_fds=() if WINDOWS else (held,),
        )
    except OSError as exc:
        raise UpError(step, str(exc), advice_for(str(exc))) from exc
    assert child.stdout is not None
    seen = ""
    try:
        for line in child.stdout:
            tail.append(line.rstrip())
            seen = (seen + line)[-200_000:]
            text = line.strip()
            if text.startswith("Installing collected") or " MB)" in text or " GB)" in text:
                say("  " + (text if len(text) <= 100 else text[:99] + "…"))
        status = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if status:
        raise UpError(f"{step} (status {status})", "\n".join(tail), advice_for(seen))


def remove_venv() -> None:
    try:
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        elif VENV.exists():
            shutil.rmtree(VENV)
    except OSError as exc:
        raise UpError("removing the broken .venv", str(exc), advice_for(str(exc))) from exc


def why_rebuild() -> str | None:
    """Why ``.venv`` cannot be repaired by installing into it, or None."""
    if not VENV.exists() and not VENV.is_symlink():
        return "there is none yet"
    if MARKER.exists():
        return "an earlier run was cut short"
    if venv_version() is None:
        return "its Python does not run"
    if read_stamp().get("root", str(ROOT)) != str(ROOT):
        return "it was made in another folder"
    pip = subprocess.run(
        [str(PYTHON), "-I", "-m", "pip", "--version"], capture_output=True, timeout=300
    )
    return "its pip does not run" if pip.returncode else None


def install(extras: tuple[str, ...], held: int) -> None:
    """Make or repair ``.venv`` and stamp it. Raises UpError."""
    began_s = time.monotonic()
    had = read_stamp().get("extras")
    wanted = sorted({*extras, *(had if isinstance(had, list) else ())})
    reason = why_rebuild()
    if reason is not None:
        say(f"making {VENV} ({reason})")
        remove_venv()
    try:
        VENV.mkdir(exist_ok=True)
        MARKER.touch()
        STAMP.unlink(missing_ok=True)
    except OSError as exc:
        raise UpError("making .venv", str(exc), advice_for(str(exc))) from exc
    if reason is not None:
        # not sys.executable: that may be a Python inside the .venv just removed
        base = getattr(sys, "_base_executable", None) or sys.executable
        run_step("making .venv", [base, "-m", "venv", str(VENV)], held)
    say("installing the dependencies (the first time this takes minutes)")
    target = ".[{}]".format(",".join(wanted)) if wanted else "."
    command = [str(PYTHON), "-I", "-m", "pip", "install", "--disable-pip-version-check"]
    constraints = ROOT / "ops" / "constraints.txt"
    if constraints.exists():
        command += ["-c", str(constraints)]
    run_step("installing the dependencies", [*command, "-e", target], held)
    stamp = {
        "fingerprint": fingerprint(),
        "root": str(ROOT),
        "python": venv_version(),
        "extras": wanted,
        "packages": sorted(installed()),
    }
    try:
        with tempfile.NamedTemporaryFile("w", dir=VENV, delete=False, encoding="utf-8") as new:
            json.dump(stamp, new)
        os.replace(new.name, STAMP)
        MARKER.unlink()
    except OSError as exc:
        raise UpError("writing the stamp", str(exc), advice_for(str(exc))) from exc
    say(f"ready after {time.monotonic() - began_s:.0f} s")


def prepare(extras: tuple[str, ...]) -> None:
    """``.venv`` as the source tree wants it, whoever else asks for it at the same time."""
    if is_ready(extras):
        return
    with lock() as held:
        if not is_ready(extras):  # the one we waited for may have done it
            install(extras, held)


# -- going on --------------------------------------------------------------------------------


def run_child(command: list[str], cwd: Path | None = None) -> int:
    """Run to the end; Ctrl-C and SIGTERM are the child's to answer."""
    child = subprocess.Popen(command, cwd=cwd)

    def forward(signum: int, _frame: FrameType | None) -> None:
        # Ctrl-C reached the child as well: the terminal sends it to the whole group
        if signum != signal.SIGINT:
            child.send_signal(signum)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(arguments: list[str]) -> int:
    prepare(())
    command = [str(CTL), "start", *arguments]
    if not WINDOWS:
        os.execv(command[0], command)
    return run_child(command)


def test(arguments: list[str]) -> int:
    """Format, lint, types, tests: all four always run; pytest's summary is the last line."""
    prepare(("dev",))
    checks = {
        "ruff format": ["ruff", "format", "--check", "."],
        "ruff check": ["ruff", "check", "."],
        "mypy": ["mypy"],
    }
    failed = []
    for name, module in checks.items():
        say(name)
        if run_child([str(PYTHON), "-m", *module], ROOT):
            failed.append(name)
    if failed:
        say("FAILED: {} (see above); this run ends with status 1".format(", ".join(failed)))
    say("pytest")
    status = run_child([str(PYTHON), "-m", "pytest", *SIDE_BY_SIDE, *arguments], ROOT)
    return status or int(bool(failed))


def end(signum: int, _frame: FrameType | None) -> None:
    """SIGTERM ends us as Ctrl-C does: the tool that runs is ended too, the marker stays."""
    say("ended by a signal; the same command goes on from here")
    sys.exit(128 + signum)


def main(arguments: list[str]) -> int:
    if sys.version_info < NEEDED:
        say(
            "FAILED: this is Python {}.{}, Phalanx needs {}.{} or newer\n    what to do: install"
            " one from python.org or your system's packages, then run e.g. `python3.13 {}`".format(
                *sys.version_info[:2], *NEEDED, " ".join(sys.argv)
            )
        )
        return 1
    commands = {"start": start, "test": test}
    if not arguments or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    signal.signal(signal.SIGTERM, end)
    try:
        return commands[arguments[0]](arguments[1:])
    except UpError as exc:
        say(str(exc))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
