"""What can be typed into ``ctl shell``: calls of known functions with literal arguments.

The line is parsed, never evaluated as Python.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, ValidationError, validate_call
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from bridge.process_errors import CallError
from bridge.term import Atom, Term
from bridge.text import text_of
from control import inspection
from control.errors import ControlError
from control.json_view import to_json
from ops import tables
from ops.client import ClusterClient
from ops.commands.chat import Conversation, write
from ops.commands.models import LOAD_S, SWAP_S, UNLOAD_S
from ops.commands.options import load_options, model_ref
from ops.commands.output import note
from ops.commands.progress import until_ready
from ops.errors import BadUsage, NoNode, Refused

MAX_LINE_CHARS: Final = 20_000
LEAVE: Final = frozenset({"exit", "quit"})

Count = Annotated[int, Field(ge=1)]


class ShellError(BadUsage):
    """What was typed cannot be done; one line says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was typed."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]


def parse(line: str) -> Call:
    """Read ``name(literal, ..., option=literal)``. Raises ShellError."""
    if len(line) > MAX_LINE_CHARS:
        raise ShellError(f"a line has up to {MAX_LINE_CHARS} characters, this one {len(line)}")
    line = line.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on its own syntax
            body = ast.parse(line, mode="eval").body
    except SyntaxError as exc:
        where = f" at column {exc.offset}" if exc.offset else ""
        raise ShellError(f"syntax error{where}: {exc.msg}. Write name(argument, ...)") from exc
    except (ValueError, MemoryError, RecursionError) as exc:
        raise ShellError(f"cannot be read: {str(exc) or 'it is nested too deep'}") from exc
    match body:
        case ast.Call(func=ast.Name(id=name)):
            args = tuple(_literal(line, arg) for arg in body.args)
            options = {
                str(k.arg): _literal(line, k.value) for k in body.keywords if k.arg is not None
            }
            if len(options) < len(body.keywords):
                raise ShellError(f"{name}: write each option as name=value, once")
            return Call(name, args, options)
        case ast.Name(id=name):
            return Call(name, (), {}) if name in LEAVE else _not_called(name)
        case _:
            raise ShellError("only calls of this shell's functions, such as status(); see help()")


def _not_called(name: str) -> Call:
    raise ShellError(f"{name} is not called: write {name}(), with what it needs; see help()")


def _literal(line: str, node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as exc:
        typed = line.encode()[node.col_offset : node.end_col_offset].decode("utf-8", "replace")
        raise ShellError(
            f"{' '.join(typed.split())[:60]} is no literal: write text in quotes, numbers, True, "
            "False or lists of them"
        ) from exc


class Functions:
    """The functions of the shell, on one node. Each gives what is to be shown.

    The first line of a docstring is its help. Raises Refused, NoNode, BadUsage, ShellError.
    """

    def __init__(self, client: ClusterClient) -> None:
        self._client = client

    async def status(self) -> RenderableType:
        """The cluster: machines, leader, instances."""
        return tables.status(await self._ask("status"))

    async def nodes(self) -> RenderableType:
        """The machines, and what is free on them."""
        return tables.nodes(await self._ask("nodes"))

    async def topology(self) -> RenderableType:
        """The links between machines."""
        return tables.topology(await self._ask("topology"))

    async def instances(self) -> RenderableType:
        """Running models and their ranks."""
        return tables.instances(await self._ask("instances"))

    async def leader(self) -> RenderableType:
        """Who leads."""
        return Text(tables.plain(await self._ask("leader")))

    async def tree(self) -> RenderableType:
        """The live supervision tree, with restarts."""
        return tables.tree(await self._ask("tree"))

    async def state(self, name: str) -> RenderableType:
        """The state of a registered process."""
        with self._client.node.open_process(label="shell") as me:
            return tables.details(to_json(await inspection.state_of(me, self._client.name, name)))

    async def kill(self, name: str) -> RenderableType:
        """End a registered process; see its supervisor start it again."""
        with self._client.node.open_process(label="shell") as me:
            pid = await inspection.kill(me, self._client.name, name)
        return Text(f"killed {name} {pid!r}")

    async def load(
        self,
        model: str,
        *,
        tensor: Count | None = None,
        pipeline: Count | None = None,
        shares: list[Count] | None = None,
        experts: str | None = None,
        engine: str | None = None,
        context: Count | None = None,
        slots: Count | None = None,
        threads: Count | None = None,
        device: str | None = None,
        goal: str | None = None,
        replicas: Count | None = None,
        priority: Annotated[int, Field(ge=-100, le=100)] | None = None,
    ) -> RenderableType:
        """Place and load a model, and wait until it answers."""
        options = load_options(
            tensor=tensor,
            pipeline=pipeline,
            shares=",".join(map(str, shares)) if shares else None,
            experts=experts,
            engine=engine,
            context=context,
            slots=slots,
            threads=threads,
            device=device,
            goal=goal,
            replicas=replicas,
            priority=priority,
        )
        request = (Atom("load"), model_ref(model), options)
        instance = text_of(await self._client.call(request, timeout_s=LOAD_S))
        return tables.instances([await until_ready(self._client, instance)])

    async def unload(self, instance: str) -> RenderableType:
        """Let the requests of an instance finish, then unload it."""
        await self._client.call((Atom("unload"), instance), timeout_s=UNLOAD_S)
        return Text(f"unloaded {instance}")

    async def swap(self, old: str, new: str) -> RenderableType:
        """Load NEW, let it take over, then unload OLD: no request fails."""
        request = (Atom("swap"), model_ref(old), model_ref(new))
        instance = text_of(await self._client.call(request, timeout_s=SWAP_S))
        return tables.instances([await until_ready(self._client, instance)])

    async def generate(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: Count | None = None,
        temperature: Annotated[float, Field(ge=0, le=2)] | None = None,
        top_p: Annotated[float, Field(gt=0, le=1)] | None = None,
        seed: Annotated[int, Field(ge=0)] | None = None,
        stop: str | list[str] | None = None,
    ) -> RenderableType | None:
        """One answer, as it is made; Ctrl-C cancels it."""
        given: dict[str, Term] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stop": stop,
        }
        options: dict[Term, Term] = {Atom(k): v for k, v in given.items() if v is not None}
        answer = await Conversation(model_ref(model), options).ask(self._client, prompt, write)
        write("\n")
        if answer.reason == "cancelled":
            raise Refused("cancelled", "the generation was cancelled by the cluster")
        if answer.reason == "length":
            note("(cut: no more tokens were allowed)")
        return None

    async def help(self) -> RenderableType:
        """This list."""
        made = Table(box=None, show_header=False, pad_edge=False)
        for name in NAMES:
            function = getattr(self, name)
            made.add_row(Text(f"{name}({_parameters(function)})"), Text(_summary(function)))
        made.add_row(Text("exit"), Text("Leave; the node goes on."))
        return made

    async def _ask(self, what: str) -> Any:
        return to_json(await self._client.call(Atom(what)))


NAMES: Final = tuple(
    name
    for name, value in vars(Functions).items()
    if inspect.iscoroutinefunction(value) and not name.startswith("_")
)


def option_names(name: str) -> list[str]:
    """The options of the function ``name``."""
    parameters = inspect.signature(getattr(Functions, name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _parameters(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return ", ".join([*plain, *(f"{p.name}=" for p in parameters if p.kind is p.KEYWORD_ONLY)])


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


async def run_line(functions: Functions, line: str) -> RenderableType | None:
    """Do what a line says; what to show. ``exit`` is the caller's to know.

    Raises:
        ShellError: the line is no call of a known function with arguments that fit.
        Refused, NoNode, BadUsage: as the function.
    """
    call = parse(line)
    if call.name not in NAMES:
        raise ShellError(f"no function {call.name}; there are: {', '.join(NAMES)}")
    function = getattr(functions, call.name)
    checked = validate_call(config=ConfigDict(strict=True))(function)
    try:
        pending: Awaitable[RenderableType | None] = checked(*call.args, **call.options)
        return await pending
    except ValidationError as exc:
        raise ShellError(f"{call.name}: {_problems(exc)}. It is {_usage(function)}") from exc
    except ControlError as exc:
        raise Refused(exc.kind, str(exc)) from exc
    except CallError as exc:
        raise NoNode(f"lost the node while it worked on this: {exc.why!r}") from exc


def _usage(function: Callable[..., Any]) -> str:
    return f"{function.__name__}({_parameters(function)})"


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
    )
