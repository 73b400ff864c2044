"""What ``erl -remsh`` finds here: a shell over the Erlang I/O protocol that inspects this node.

The client's terminal stays with the client: it edits, remembers and tokenises lines. We send it
prompts and text, and evaluate what it read; nothing but the given commands can be run.

Source: the requests of stock clients, measured with OTP 25 and 28; "The Erlang I/O Protocol".
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from bridge import rpc
from bridge.erl_eval import Commands, EvalError, Evaluator
from bridge.erl_format import format_term
from bridge.erl_parse import parse
from bridge.erl_scan import ErlangSyntaxError, from_erlang
from bridge.exit_signals import NORMAL, is_atom
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import CallError, Exit
from bridge.rpc import ErlangError, Throw
from bridge.runner import crash_reason
from bridge.show import show
from bridge.sys_messages import chars
from bridge.term import Atom, Pid, Term
from bridge.text import text_of

_log: Final = logging.getLogger("bridge.remote_shell")

CLIENT_S: Final = 5.0

_IO_REQUEST: Final = Atom("io_request")
_UNICODE: Final = Atom("unicode")
_OK: Final = Atom("ok")


@dataclass(frozen=True, slots=True)
class Printed:
    """What a command returns to have ``text`` shown as it is, and ``ok`` as its value."""

    text: str


class Quit(Exception):
    """Raise in a command: this shell session ends, the node does not."""


def install(node: Node, commands: Commands, *, help_text: str, version: str) -> None:
    """Let stock clients open a shell on ``node``.

    Args:
        commands: what can be called without a module; ``node/0``, ``nodes/0``, ``self/0``,
            ``help/0`` and ``q/0`` are there anyhow. Functions of ``node.functions`` can be
            called with their module.
        help_text: shown by ``help()``, before a line on each of the above that is not replaced.
        version: shown when the shell opens.
    """
    all_commands = {**_builtins(help_text, commands), **commands}

    async def start(me: Process) -> Term:
        leader = me.group_leader
        if leader is None:
            raise ErlangError(Atom("badarg"))
        session = _Session(node, leader, all_commands)
        process = node.spawn_process(session.run, label="remote shell")
        process.group_leader = leader
        return process.pid

    async def expand(me: Process, before: Term, *options: Term) -> Term:
        common, found = _expand(before, all_commands, node)
        if not found:
            return Atom("no"), [], []
        names: Term = [chars(name) for name in found] if len(found) > 1 else []
        if names and options:  # OTP 26 and later; those before want the names alone
            elements: Term = [(name, []) for name in names]
            group = {"title": chars("commands"), "elems": elements, "options": []}
            names = [{Atom(key): value for key, value in group.items()}]
        return Atom("yes"), chars(common), names

    async def ensure_loaded(me: Process, module: Term) -> Term:
        if is_atom(module, "shell"):
            return Atom("module"), module
        return Atom("error"), Atom("nofile")

    async def get_net_ticktime(me: Process) -> Term:
        return max(1, round(node.net_ticktime_s))

    async def system_info(me: Process, item: Term) -> Term:
        if is_atom(item, "system_version"):
            return chars(f"{version}\n")
        if is_atom(item, "otp_release"):
            return chars("28")  # the surface that we speak
        raise ErlangError(Atom("badarg"))

    async def get_env(me: Process, application: Term, key: Term, default: Term) -> Term:
        return default

    node.functions.update(
        {
            ("code", "ensure_loaded", 1): ensure_loaded,
            ("net_kernel", "get_net_ticktime", 0): get_net_ticktime,
            ("erlang", "system_info", 1): system_info,
            ("application", "get_env", 3): get_env,
            ("shell", "start", 0): start,
            ("edlin_expand", "expand", 1): expand,
            ("edlin_expand", "expand", 2): expand,
        }
    )


def _builtins(help_text: str, replaced: Commands) -> Commands:
    async def own_node(me: Process) -> Term:
        return me.node.name

    async def nodes(me: Process) -> Term:
        return me.node.nodes()

    async def self_pid(me: Process) -> Term:
        return me.pid

    async def show_help(me: Process) -> Term:
        texts = {
            "node": "this node's name",
            "nodes": "the nodes it is connected to",
            "self": "the process that evaluates",
            "q": "leave this shell; the node goes on",
        }
        lines = [f"{n}().".ljust(26) + t for n, t in texts.items() if (n, 0) not in replaced]
        return Printed("\n".join((help_text.rstrip(), *lines)).lstrip() + "\n")

    async def leave(me: Process) -> Term:
        raise Quit

    return {
        ("node", 0): own_node,
        ("nodes", 0): nodes,
        ("self", 0): self_pid,
        ("help", 0): show_help,
        ("h", 0): show_help,
        ("q", 0): leave,
        ("exit", 0): leave,
    }


class _Session:
    """One client's shell. ``leader`` is the client's process that has the terminal."""

    def __init__(self, node: Node, leader: Pid, commands: Commands) -> None:
        self._node = node
        self._leader = leader
        self._evaluator = Evaluator(commands, node.functions)
        self._count = 1
        self._me: Process

    async def run(self, me: Process) -> None:
        """Read, evaluate, print, until the input ends or the client is gone."""
        self._me = me
        me.trap_exit = True
        me.link(self._leader)
        _log.info("a remote shell opens for %s", self._leader.node)
        try:
            while await self._one():
                pass
        finally:
            _log.info("the remote shell of %s ends", self._leader.node)

    async def _one(self) -> bool:
        """One prompt; False at the end of input."""
        prompt = f"({self._node.name}){self._count}> ".encode()
        start: Term = [(1, 1)]
        read = (Atom("get_until"), _UNICODE, prompt, Atom("erl_scan"), Atom("tokens"), start)
        match await self._ask(read):
            case ("ok", tokens, _):
                self._count += 1
                try:
                    expressions = parse(from_erlang(tokens))
                except ErlangSyntaxError as exc:
                    await self._print(f"{exc}\n")
                    return True
                if not expressions:
                    return True
                text, goes_on = await self._evaluate(expressions)
                await self._print(text)
                return goes_on
            case ("error", (where, _, what), _):
                line, column = where if isinstance(where, tuple) else (where, 1)
                await self._print(f"* {line}:{column}: {_scan_error(what)}\n")
                return True
            case ("error", "interrupted"):
                return True
            case ("eof", _) | "eof" | ("error", _):
                return False
            case other:
                _log.info("%s answers a prompt with %s", self._leader.node, show(other))
                return False

    async def _evaluate(self, expressions: Term) -> tuple[str, bool]:
        """What to print, and whether the session goes on.

        The work runs in a process of its own, so that the client can interrupt it.
        """
        outcome: asyncio.Future[tuple[str, bool]] = asyncio.get_running_loop().create_future()

        async def work(worker: Process) -> None:
            worker.group_leader = self._leader
            result = await self._outcome(worker, expressions)
            if not outcome.done():
                outcome.set_result(result)

        pid = self._me.spawn(work, label="remote shell command")
        ref = self._me.monitor(pid)

        def ended(message: Term) -> Term | None:
            match message:
                case ("EXIT", sender, _) if sender == self._leader:
                    return message
                case ("DOWN", found, _, _, _) if found == ref:
                    return message
            return None

        message = await self._me.receive(ended)
        if message[0] == "EXIT":
            self._me.exit(pid, Atom("kill"))
            self._me.demonitor(ref)
            if not is_atom(message[2], "interrupt"):
                raise Exit(NORMAL)
            return "** exception exit: interrupt\n", True
        if outcome.done():
            return outcome.result()
        return f"** exception exit: {self._text(message[4])}\n", True

    async def _outcome(self, worker: Process, expressions: Term) -> tuple[str, bool]:
        try:
            value = await self._evaluator.evaluate(worker, expressions)
        except Quit:
            await self._end_client(worker)
            return "", False
        except EvalError as exc:
            return f"{exc}\n", True
        except Throw as exc:
            return f"** exception throw: {self._text(exc.value)}\n", True
        except Exit as exc:
            return f"** exception exit: {self._text(exc.reason)}\n", True
        except ErlangError as exc:
            return f"** exception error: {self._text(exc.reason)}\n", True
        except Exception as exc:  # noqa: BLE001 -- shown to the one who typed it
            _log.info("a remote shell's command failed", exc_info=exc)
            kind, text, _ = crash_reason(exc)
            return f"** exception error: {self._text((kind, text))}\n", True
        if isinstance(value, Printed):
            return f"{value.text.rstrip()}\nok\n", True
        return f"{self._text(value)}\n", True

    async def _end_client(self, worker: Process) -> None:
        """End an emulator that is nothing but our client; others only lose this shell.

        At the end of its shell alone, a client would wait for a command to open another.
        """
        client = self._leader.node
        try:
            asked = await rpc.call(
                worker, client, "init", "get_argument", [Atom("remsh")], timeout_s=CLIENT_S
            )
            if asked == (_OK, [[chars(self._node.name)]]):
                await rpc.call(worker, client, "init", "stop", [], timeout_s=CLIENT_S)
        except (CallError, rpc.ErlangError, Throw) as exc:
            _log.info("the client %s could not be ended: %s", client, exc)

    def _text(self, term: Term) -> str:
        return format_term(term, node=self._node.name)

    async def _print(self, text: str) -> None:
        if text:
            await self._ask((Atom("put_chars"), _UNICODE, text.encode("utf-8", "replace")))

    async def _ask(self, request: Term) -> Term:
        """One request to the client's terminal. Raises Exit when the client is gone."""
        ref = self._me.make_ref()
        self._me.send(self._leader, (_IO_REQUEST, self._me.pid, ref, request))

        def answer(message: Term) -> Term | None:
            match message:
                case ("io_reply", found, _) if found == ref:
                    return message
                case ("EXIT", sender, _) if sender == self._leader:
                    return message
            return None

        while (message := await self._me.receive(answer))[0] == "EXIT":
            if not is_atom(message[2], "interrupt"):  # of which there is nothing to stop here
                raise Exit(NORMAL)
        return message[2]


def _scan_error(what: Term) -> str:
    match what:
        case ("illegal", kind):
            return f"illegal {text_of(kind)}"
        case ("unterminated", kind, *_):
            return f"unterminated {text_of(kind)}"
        case _:
            return text_of(what)


def _expand(before: Term, commands: Commands, node: Node) -> tuple[str, list[str]]:
    """Tab completion: what all matches add to the text before the cursor, and the matches.

    Args:
        before: characters, the last one first.

    Source: OTP ``edlin_expand.erl``, ``expand/2``.
    """
    word = ""
    for code in before if isinstance(before, list) else []:
        char = chr(code) if isinstance(code, int) and 0 <= code < 0x110000 else " "
        if not (char.isalnum() or char in "_@:"):
            break
        word = char + word
    known = [(f"{name}", arity) for name, arity in commands]
    known += [(f"{m}:{f}", arity) for m, f, arity in node.functions if m == "phalanx"]
    names = {f"{name}(" if arity else f"{name}()" for name, arity in known}
    found = sorted(name for name in names if word and name.startswith(word))
    return (_common_prefix(found)[len(word) :] if found else ""), found


def _common_prefix(names: list[str]) -> str:
    first, last = names[0], names[-1]
    size = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[:size]
