"""``ctl chat``: talk to a model in the terminal; each answer appears as it is generated."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol

import typer

from bridge.process import Process
from bridge.process_errors import ReceiveTimeout
from bridge.term import Atom, Ref, Term
from bridge.text import text_of
from control.json_view import to_json
from ops.client import ClusterClient, Target, connect
from ops.commands.options import HomeOption, NodeOption, model_ref, target
from ops.commands.output import note
from ops.errors import BadUsage, NoNode, Refused
from ops.tables import plain, printable

OPEN_S: Final = 660.0  # a model that is loading or recovering is waited for
DEFAULT: Final = "default"  # the model that the node started with
TOKEN_S: Final = 660.0  # the cluster gives up before, and says why
HELP: Final = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="As for `ctl model load`; without it, the model that the node started with.",
        ),
    ] = DEFAULT,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Print one answer to this and leave."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told to be.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Longest answer; without it, the room left."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0.0, max=2.0, help="0 takes the likeliest token each time."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Choose among the likeliest of this sum."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="The same seed gives the same answer."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer before this; may be given repeatedly."),
    ] = None,
    home: HomeOption = None,
    node: NodeOption = None,
) -> None:
    """Chat with a model in the terminal, streaming; with -p, print one answer."""
    if prompt is not None and not prompt.strip():
        raise BadUsage("--prompt is empty: give it a text")
    given: dict[str, Term] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    talk = Conversation(
        model_ref(model), {Atom(k): v for k, v in given.items() if v is not None}, system
    )
    asyncio.run(_chat(target(home, node), talk, prompt))


async def _chat(whom: Target, talk: Conversation, prompt: str | None) -> None:
    async with connect(whom) as client:
        if prompt is None:
            await _interactive(client, talk, _reader(whom))
            return
        finished = await talk.ask(client, prompt, write)
        if finished.text and not finished.text.endswith("\n"):
            write("\n")
        if finished.reason == "cancelled":
            raise Refused("cancelled", "the generation was cancelled by the cluster")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole. ``reason``: stop, length or cancelled."""

    text: str
    reason: str


@dataclass(slots=True)
class Conversation:
    """What was said so far, and how answers are made."""

    model: str
    options: dict[Term, Term]
    system: str | None = None
    turns: list[dict[Term, Term]] = field(default_factory=list)

    async def ask(self, client: ClusterClient, text: str, on_text: Callable[[str], None]) -> Answer:
        """Say ``text``; the model's answer, which ``on_text`` gets piece by piece.

        A cancelled or failed answer leaves the conversation as it was. Ending this early ends
        the process that the tokens go to, which cancels the generation.

        Raises:
            Refused: unknown model, not ready, bad option, or the generation failed.
            NoNode: the node went away.
        """
        head = [] if self.system is None else [_message("system", self.system)]
        asked = [*head, *self.turns, _message("user", text)]
        prompt: Term = text if len(asked) == 1 else asked
        with client.node.open_process(label="chat") as me:
            request = (
                Atom("generate"),
                self.model,
                prompt,
                {**self.options, Atom("stream_to"): me.pid},
            )
            try:
                ref = await client.call_from(me, request, timeout_s=OPEN_S)
            except Refused as exc:
                if exc.kind == "unknown_model" and self.model == DEFAULT:
                    text = f"{client.name} was started without a model: name one of `ctl model ps`"
                    raise Refused(exc.kind, text) from exc
                raise
            if not isinstance(ref, Ref):
                raise Refused("protocol", f"{client.name} answered {ref!r:.80} to generate")
            answer = await _receive(client, me, ref, on_text)
        self.turns += [_message("user", text), _message("assistant", answer.text)]
        return answer


async def _receive(
    client: ClusterClient, me: Process, ref: Ref, on_text: Callable[[str], None]
) -> Answer:
    monitor = me.monitor(client.server)
    parts: list[str] = []

    def mine(message: Term) -> Term | None:
        match message:
            case ("phalanx", found, what) if found == ref:
                return what
            case ("DOWN", found, _, _, _) if found == monitor:
                return message
            case _:
                return None

    while True:
        try:
            message = await me.receive(mine, timeout_s=TOKEN_S)
        except ReceiveTimeout as exc:
            raise Refused("timeout", f"no token from {client.name} for {TOKEN_S:.0f} s") from exc
        match message:
            case ("token", _, text):
                parts.append(text_of(text))
                on_text(parts[-1])
            case ("done", "error", usage):
                facts = to_json(usage)
                raise Refused("generation", str(facts.get("error") or "the generation failed"))
            case ("done", reason, _):
                return Answer("".join(parts), str(reason))
            case ("DOWN", _, _, _, reason):
                raise NoNode(
                    f"lost node {client.name} in the middle of the answer: "
                    f"{plain(to_json(reason))}. Look with `ctl status`, then ask again."
                )


def _message(role: str, content: str) -> dict[Term, Term]:
    return {Atom("role"): Atom(role), Atom("content"): content}


def write(text: str) -> None:
    """A piece of an answer on stdout, at once; on a terminal without what it would obey."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Reader(Protocol):
    async def read(self) -> str:
        """One line. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""
        ...


class Terminal:
    """Lines with editing and the history of earlier chats."""

    def __init__(self, whom: Target) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory

        folder = whom.home.state_dir
        history: History = InMemoryHistory()
        if folder.is_dir():
            path = folder / "chat_history"
            path.touch(mode=0o600)
            history = FileHistory(str(path))
        self._session: PromptSession[str] = PromptSession(history=history)

    async def read(self) -> str:
        line: str = await self._session.prompt_async("> ")
        return line


class Pipe:
    """Lines of a stdin that is no terminal."""

    async def read(self) -> str:
        line: str = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def _reader(whom: Target) -> Reader:
    return Terminal(whom) if sys.stdin.isatty() and sys.stdout.isatty() else Pipe()


async def _interactive(client: ClusterClient, talk: Conversation, reader: Reader) -> None:
    if isinstance(reader, Terminal):
        note(f"chat with {talk.model} on {client.name}. {HELP}")
    while True:
        try:
            line = (await reader.read()).strip()
        except KeyboardInterrupt:
            continue  # it took back the line
        except EOFError:
            return
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/clear":
                talk.turns.clear()
            case _ if line.startswith("/"):
                note(HELP)
            case _:
                await _turn(client, talk, line)


async def _turn(client: ClusterClient, talk: Conversation, line: str) -> None:
    """One question and its answer; Ctrl-C ends the answer and not the chat."""
    asking = asyncio.ensure_future(talk.ask(client, line, write))
    with on_interrupt(asking.cancel):
        await asyncio.wait([asking])
    write("\n")
    if asking.cancelled():
        note("(stopped)")
        return
    try:
        if asking.result().reason == "length":
            note("(cut: no more tokens were allowed)")
    except Refused as exc:
        note(f"error: {exc}")


@contextmanager
def on_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """Run ``action`` in the loop on Ctrl-C, instead of ending the program."""
    loop = asyncio.get_running_loop()
    before = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(action))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
