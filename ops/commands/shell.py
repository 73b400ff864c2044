"""``ctl shell``: a remote shell in Python, over the distribution protocol."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Final

import typer

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
            await _lines(functions, Terminal(whom, client), stoppable=True)
            return True
        return await _lines(functions, Pipe(), stoppable=False)


async def _lines(functions: language.Functions, reader: Reader, *, stoppable: bool) -> bool:
    """Read and do lines until the end; whether the last one was done."""
    done = True
    while True:
        try:
            line = (await reader.read()).strip()
        except KeyboardInterrupt:
            continue  # it took back the line
        except EOFError:
            return done
        if line in language.LEAVE or line.removesuffix("()") in language.LEAVE:
            return done
        if line and not line.startswith("#"):
            done = await _do(functions, line, stoppable)


async def _do(functions: language.Functions, line: str, stoppable: bool) -> bool:
    """One line and what it shows; Ctrl-C ends the waiting for it and not the shell."""
    doing = asyncio.ensure_future(language.run_line(functions, line))
    try:
        with on_interrupt(doing.cancel) if stoppable else contextlib.nullcontext():
            await asyncio.wait([doing])
    finally:
        doing.cancel()
    if doing.cancelled():
        note("(stopped)")
        return False
    try:
        shown = doing.result()
    except OpsError as exc:
        note(f"error: {str(exc).replace(chr(10), ' ')}")
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
