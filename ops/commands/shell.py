"""``ctl shell``: a remote shell in Python, over the distribution protocol."""

from __future__ import annotations

import asyncio
import sys
from typing import Final

import typer
from rich.console import RenderableType

from ops import shell as language
from ops.client import ClusterClient, Target, connect
from ops.commands.chat import Pipe, Reader, on_interrupt
from ops.commands.options import HomeOption, NodeOption, target
from ops.commands.output import console, note
from ops.errors import OpsError

_FAILED: Final = 1


def shell(home: HomeOption = None, node: NodeOption = None) -> None:
    """Open a Python shell on a node: `help()` lists what can be done there.

    Without a terminal it runs the lines of stdin, and ends with 1 if the last of them failed.
    """
    if not asyncio.run(_shell(target(home, node))):
        raise typer.Exit(_FAILED)


async def _shell(whom: Target) -> bool:
    """Whether the last line was done, or there was somebody to see that it was not."""
    async with connect(whom) as client:
        functions = language.Functions(client)
        if sys.stdin.isatty() and sys.stdout.isatty():
            note(f"Shell on {client.name}. help() lists the functions, Tab completes, exit leaves.")
            session = Session(functions, Terminal(whom, client))
            with on_interrupt(session.stop):
                await session.run()
            return True
        return await Session(functions, Pipe()).run()


class Session:
    """Reads and does lines until they end."""

    def __init__(self, functions: language.Functions, reader: Reader) -> None:
        self._functions, self._reader = functions, reader
        self._doing: asyncio.Future[RenderableType | None] | None = None

    def stop(self) -> None:
        """Ctrl-C: end the waiting for the line that is being done, and not the shell."""
        if self._doing is not None:
            self._doing.cancel()

    async def run(self) -> bool:
        """Whether the last line was done."""
        done = True
        while True:
            try:
                line = (await self._reader.read()).strip()
            except KeyboardInterrupt:
                continue  # it took back the line
            except EOFError:
                return done
            if line.removesuffix("()") in language.LEAVE:
                return done
            if line and not line.startswith("#"):
                done = await self._do(line)

    async def _do(self, line: str) -> bool:
        """One line and what it shows."""
        self._doing = doing = asyncio.ensure_future(language.run_line(self._functions, line))
        try:
            await asyncio.wait([doing])
        finally:
            doing.cancel()
            self._doing = None
        if doing.cancelled():
            note("(stopped)")
            return False
        try:
            shown = doing.result()
        except OpsError as exc:
            note(f"error: {' '.join(str(exc).splitlines())}")
            return False
        if shown is not None:
            console().print(shown)
            sys.stdout.flush()
        return True


class Terminal:
    """Lines with editing, completion, and the history of earlier shells."""

    def __init__(self, whom: Target, client: ClusterClient) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory

        from ops.shell_completion import ShellCompleter

        history: History = InMemoryHistory()
        if whom.home.state_dir.is_dir():
            path = whom.home.state_dir / "shell_history"
            path.touch(mode=0o600)
            history = FileHistory(str(path))
        self._prompt = f"{client.name}> "
        self._session: PromptSession[str] = PromptSession(
            history=history, completer=ShellCompleter(client), complete_while_typing=False
        )

    async def read(self) -> str:
        line: str = await self._session.prompt_async(self._prompt)
        return line
