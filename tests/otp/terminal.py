"""A program, or a stock emulator, on a terminal of its own, as a person sees it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from tests.otp.stock import Otp, kill_group

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x07\x08\r]")


class Screen:
    """``async with Screen(argv, env) as screen``; ``seen`` is all that was shown."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._argv, self._env = argv, env
        self.seen = ""
        self._unread = ""
        self._more = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        self._child = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**self._env, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kill_group(self._child.pid)
        await self._child.wait()
        asyncio.get_running_loop().remove_reader(self._master)
        os.close(self._master)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            asyncio.get_running_loop().remove_reader(self._master)
            return
        text = _CONTROL.sub("", data.decode("utf-8", "replace"))
        self.seen += text
        self._unread += text
        self._more.set()

    async def until(self, text: str, timeout_s: float = 20.0) -> str:
        """Wait until ``text`` is shown; all that was shown since the last wait, and it."""
        try:
            async with asyncio.timeout(timeout_s):
                while text not in self._unread:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no {text!r} on the terminal: {self.seen}") from None
        shown, _, self._unread = self._unread.partition(text)
        return shown + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    async def ended(self, timeout_s: float = 20.0) -> int:
        """Wait for the program's end; its exit status."""
        async with asyncio.timeout(timeout_s):
            return await self._child.wait()


class Terminal(Screen):
    """``async with Terminal(otp, port, *args) as screen``."""

    def __init__(self, otp: Otp, epmd_port: int, *args: str) -> None:
        argv = [str(otp.erl), "-start_epmd", "false", *args]
        super().__init__(argv, otp.environment(epmd_port))
