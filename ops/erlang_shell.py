"""What an Erlang engineer finds on a node: the commands of ``erl -remsh``, and module ``phalanx``.

Both shells, this one and ``ctl shell``, offer the same functions.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from bridge import remote_shell
from bridge.erl_eval import Commands
from bridge.erl_format import format_term
from bridge.node import Node
from bridge.process import Process
from bridge.remote_shell import Printed
from bridge.rpc import ErlangError
from bridge.term import Atom, Pid, Term
from bridge.text import text_of
from control import inspection, phalanx_module
from control.errors import ControlError

HELP: Final = """\
An inspection shell: calls of these functions, terms and variables; each line ends with a dot.
Names are atoms, models and text are "..." or <<"...">>, options are #{slots => 4}.

status().                 the cluster: machines, leader, instances
nodes().                  the machines, and what is free on them
topology().               the links between them
instances().              running models and their ranks
leader().                 who leads
tree().                   the live supervision tree, with restarts
state(Name).              the state of a registered process, or of a pid
kill(Name).               ends a process; see its supervisor start it again
pid(0, N, 0).             a pid that tree() shows as <0.N.0>
load(Model).              places and loads; load(Model, #{slots => 4}).
unload(Id).               lets an instance finish and unloads it
swap(Old, New).           loads New, then unloads Old: no request fails
generate(Model, Prompt).  one answer; generate(Model, Prompt, #{max_tokens => 20}).
phalanx:status().         likewise for rpc and erpc: status, leader, nodes, topology, instances,
                          load/1,2, unload/1, swap/2, generate/3
"""

_PID_TEXT: Final = re.compile(r"<0\.(\d{1,10})\.(\d{1,10})>")


def install(node: Node) -> None:
    """Let peers call ``phalanx`` and open shells on ``node``."""
    node.functions.update(phalanx_module.functions())
    banner = f"{_version()}: help(). shows what can be done, q(). leaves."
    remote_shell.install(node, COMMANDS, help_text=HELP, version=banner)


def _version() -> str:
    try:
        return f"Phalanx {version('phalanx')}"
    except PackageNotFoundError:
        return "Phalanx"


async def _tree(me: Process) -> Term:
    found = await phalanx_module.ask(me, Atom("tree"))
    return Printed(tree_text(found, me.node.name)) if isinstance(found, dict) else found


async def _state(me: Process, who: Term) -> Term:
    try:
        return await inspection.state_of(me, me.node.name, _who(me.node, who))
    except ControlError as exc:
        return _error(exc)


async def _kill(me: Process, who: Term) -> Term:
    try:
        return (Atom("ok"), await inspection.kill(me, me.node.name, _who(me.node, who)))
    except ControlError as exc:
        return _error(exc)


async def _pid(me: Process, node: Term, number: Term, serial: Term) -> Term:
    if node != 0 or not isinstance(number, int) or not isinstance(serial, int):
        raise ErlangError(Atom("badarg"))
    return _local_pid(me.node, number, serial)


COMMANDS: Final[Commands] = {
    ("status", 0): phalanx_module.status,
    ("leader", 0): phalanx_module.leader,
    ("nodes", 0): phalanx_module.nodes,
    ("topology", 0): phalanx_module.topology,
    ("instances", 0): phalanx_module.instances,
    ("tree", 0): _tree,
    ("state", 1): _state,
    ("kill", 1): _kill,
    ("pid", 3): _pid,
    ("load", 1): phalanx_module.load,
    ("load", 2): phalanx_module.load,
    ("unload", 1): phalanx_module.unload,
    ("swap", 2): phalanx_module.swap,
    ("generate", 2): phalanx_module.generate_attended,
    ("generate", 3): phalanx_module.generate_attended,
}


def _who(node: Node, who: Term) -> str | Pid:
    """A pid, a pid as it is printed, or a name. Raises ErlangError(badarg)."""
    if isinstance(who, Pid):
        return who
    name = phalanx_module.text(who).decode("utf-8", "replace")
    shown = _PID_TEXT.fullmatch(name)
    return _local_pid(node, int(shown[1]), int(shown[2])) if shown else name


def _local_pid(node: Node, number: int, serial: int) -> Pid:
    if not (0 <= number < 1 << 32 and 0 <= serial < 1 << 32):
        raise ErlangError(Atom("badarg"))
    return Pid(node.name, number, serial, node.creation)


def _error(exc: ControlError) -> Term:
    return (Atom("error"), Atom(exc.kind), str(exc))


def tree_text(tree: dict[Any, Term], node: str) -> str:
    """A supervision tree, a process a line, children indented under their supervisor.

    Plain ASCII: a terminal of any locale shows it as it is.
    """
    rows: list[tuple[str, str, str]] = []
    pending = [(0, tree)]
    while pending:
        depth, record = pending.pop()
        name = text_of(record.get(Atom("id"), record.get(Atom("name"), "-")))
        pid = format_term(record.get(Atom("pid")), node=node)
        rows.append(("  " * depth + name, pid, _remarks(record)))
        children = record.get(Atom("children"), [])
        pending += [(depth + 1, child) for child in reversed(children)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = (f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)
    return "\n".join(line.rstrip() for line in lines)


def _remarks(record: dict[Any, Term]) -> str:
    found = []
    if Atom("strategy") in record:
        found.append(text_of(record[Atom("strategy")]))
    if (state := record.get(Atom("state"))) not in (None, "running"):
        found.append(text_of(state))
    if restarts := record.get(Atom("restarts")):
        found.append(f"restarts {restarts}")
    return ", ".join(found)
