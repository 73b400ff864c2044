"""The home folder: everything a node writes lives under it (cookie, keys, models, state, logs)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import string
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import filelock
import psutil

from ops.errors import HomeBusy, HomeError

COOKIE_CHARACTERS = 32
MAX_COOKIE_BYTES = 255  # an Erlang cookie is an atom
CLOCK_STEP_S = 5.0  # start times are kept relative to a wall clock that may be set


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a running node tells the commands that want to speak to it.

    Attributes:
        node: distribution name, ``NAME@HOST``.
        url: base of the HTTP endpoint; empty where none is open.
        dist_port: TCP port of the distribution listener.
        epmd_port: TCP port of the EPMD that knows the node.
        tls: the paths of ``bridge.tls.TlsFiles`` where the node speaks TLS.
        os_pid: the control process; ``started_s`` is the system's start time of it
            (seconds since 1970), so that a reused pid is told apart.
    """

    node: str
    url: str
    dist_port: int
    epmd_port: int
    tls: dict[str, str] | None = None
    os_pid: int = field(default_factory=os.getpid)
    started_s: float = field(default_factory=lambda: psutil.Process().create_time())

    def is_alive(self) -> bool:
        """Whether the very process that wrote this still runs."""
        try:
            process = psutil.Process(self.os_pid)
            return (
                abs(process.create_time() - self.started_s) < CLOCK_STEP_S
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # somebody else's process: it exists, more cannot be seen
            return True


class Home:
    """Paths of one node's files, and the few of them that need care."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cookie_file = root / "cookie"
        self.keys_dir = root / "keys"
        self.models_dir = root / "models"
        self.state_dir = root / "state"
        self.logs_dir = root / "logs"
        self.cache_dir = root / "cache"
        self.run_file = root / "run.json"
        self.config_file = root / "config.yaml"
        self.desired_file = self.state_dir / "desired.json"

    def cookie(self) -> str:
        """The shared secret of the cluster; made at the first call, mode 0600.

        Raises:
            HomeError: unreadable, empty, or open to other users; or it cannot be made.
        """
        try:
            if not self.cookie_file.exists():
                alphabet = string.ascii_uppercase + string.digits
                made = "".join(secrets.choice(alphabet) for _ in range(COOKIE_CHARACTERS))
                create_secret_file(self.cookie_file, made)
        except OSError as exc:
            advice = "Free some space or mend its folder, or give another --home."
            raise HomeError(self.cookie_file, _why(exc), advice) from exc
        try:
            mode = self.cookie_file.stat().st_mode
            text = self.cookie_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise HomeError(self.cookie_file, _why(exc), "Delete it to get a new one.") from exc
        if sys.platform != "win32" and stat.S_IMODE(mode) & 0o077:
            raise HomeError(
                self.cookie_file,
                f"mode {stat.S_IMODE(mode):04o} lets other users read the cookie",
                f"Run `chmod 600 {self.cookie_file}`.",
            )
        if not 0 < len(text) <= MAX_COOKIE_BYTES:
            raise HomeError(
                self.cookie_file,
                f"a cookie has 1 to {MAX_COOKIE_BYTES} characters, this one {len(text)}",
                "Delete it to get a new one.",
            )
        return text

    def write_run(self, info: RunInfo) -> None:
        """Replace the run file in one step. Raises HomeError."""
        try:
            write_atomically(self.run_file, json.dumps(asdict(info), indent=1) + "\n")
        except OSError as exc:
            raise HomeError(self.run_file, _why(exc), "Free it, or use another --home.") from exc

    def read_run(self) -> RunInfo | None:
        """The node that runs on this home; None where none does or its file is stale."""
        try:
            info = RunInfo(**json.loads(self.run_file.read_text(encoding="utf-8")))
            return info if info.is_alive() else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError):  # half a file of a machine that lost power
            return None
        except OSError as exc:
            raise HomeError(self.run_file, _why(exc), "Give it to your user.") from exc

    def remove_run(self) -> None:
        """Forget the run file, as the last act of a node that ends."""
        with contextlib.suppress(FileNotFoundError):
            self.run_file.unlink()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Own the home until the block ends or this process dies.

        Raises:
            HomeBusy: another process owns it.
        """
        lock = filelock.FileLock(self.root / "lock", mode=0o600)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as exc:
            other = self.read_run()
            who = f"node {other.node} (process {other.os_pid})" if other else "another node"
            raise HomeBusy(
                self.root,
                f"{who} runs on it",
                f"Stop it with `ctl stop --home {self.root}`, or give this one another --home.",
            ) from exc
        except OSError as exc:
            raise HomeError(self.root, _why(exc), "Give it to your user.") from exc
        try:
            yield
        finally:
            lock.release()


def default_root() -> Path:
    """``$PHALANX_HOME``, else ``~/.phalanx``."""
    told = os.environ.get("PHALANX_HOME")
    return Path(told).expanduser().absolute() if told else Path.home() / ".phalanx"


def find_home(root: Path | None = None) -> Home:
    """The home of commands that only look; nothing is made."""
    return Home(root.expanduser().absolute() if root else default_root())


def open_home(root: Path | None = None) -> Home:
    """The home of a node: its folders are made, for this user only.

    Raises:
        HomeError: a folder cannot be made or written to.
    """
    home = find_home(root)
    folders = (home.root, home.keys_dir, home.models_dir, home.state_dir, home.logs_dir)
    for path in folders:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # os.access lies on network mounts
                pass
        except OSError as exc:
            advice = "Give it to your user, or choose a folder with --home or PHALANX_HOME."
            raise HomeError(path, _why(exc), advice) from exc
    return home


def create_secret_file(path: Path, text: str) -> None:
    """Make a file that only this user can read, whole or not at all.

    The file of a faster process is kept: both then read the same secret.
    """
    with _temporary(path, text) as new:
        try:
            os.link(new, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(new, path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file (mode 0600) so that a reader sees the old or the new text, never half."""
    with _temporary(path, text) as new:
        os.replace(new, path)


@contextlib.contextmanager
def _temporary(path: Path, text: str) -> Iterator[Path]:
    """A synced file beside ``path``, mode 0600, gone after the block unless it was moved."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _why(exc: Exception) -> str:
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
