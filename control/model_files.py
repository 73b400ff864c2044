"""Where the files of a model are in the cluster, and how they come to where they are needed.

The calls are those of ``model_store``, which does the work on each machine. Files come from
outside once, to one machine; all others take what they need from peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge import gen_server
from bridge.node import Node
from bridge.term import Atom, Term
from bridge.text import text_of
from control.errors import ControlError

ASK_S: Final = 5.0
FETCH_S: Final = 7 * 24 * 3600.0  # the store gives up on a stalled download itself
Roles = Mapping[str, frozenset[str]]  # of the machines that are up, by node


class NoFiles(ControlError):
    """A machine could not get the files; ``kind`` is its store's."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Located:
    """One machine's answer.

    Attributes:
        path: what to load; None where nothing is here.
        whole: all of it is.
    """

    node: str
    path: Path | None
    whole: bool


async def locate(node: Node, ref: str, nodes: Sequence[str]) -> dict[str, Located]:
    """Ask ``nodes`` at once; one that does not answer in time has nothing."""

    async def ask(name: str) -> Located:
        try:
            answer = await _store(node, name, (Atom("locate"), ref), ASK_S)
        except gen_server.CallError:
            return Located(name, None, False)
        match answer:
            case ("ok", {"whole": whole, "path": str() | bytes() as path}) if path != "undefined":
                return Located(name, Path(text_of(path)), bool(whole))
            case _:
                return Located(name, None, False)

    found = await asyncio.gather(*(ask(name) for name in nodes))
    return {one.node: one for one in found}


def best_sources(located: Mapping[str, Located], roles: Roles, here: str) -> list[str]:
    """Machines with all of a model: this one, then those that keep files for others."""
    whole = [name for name, one in located.items() if one.whole]
    return sorted(whole, key=lambda n: (n != here, "storage" not in roles.get(n, ()), n))


def best_fetcher(roles: Roles, here: str) -> str:
    """Who fetches from outside: this machine if it keeps files, else one that does, else it."""
    keepers = sorted(name for name, has in roles.items() if "storage" in has)
    return here if here in keepers or not keepers else keepers[0]


async def fetch(node: Node, name: str, ref: str) -> Path:
    """Have the machine ``name`` fetch a model from outside. Raises NoFiles."""
    return _path(await _ensure(node, name, (Atom("ensure"), ref)))


async def bring(node: Node, name: str, ref: str, sources: Sequence[str], part: Term) -> Path:
    """Have the machine ``name`` take what it lacks of ``part`` from ``sources``. Raises NoFiles.

    Args:
        part: ``whole``, ``header``, or ``{ranges, #{File => [{Start, Stop}]}}``.
    """
    options: dict[Any, Term] = {
        Atom("from"): [Atom(source) for source in sources],
        Atom("part"): part,
    }
    return _path(await _ensure(node, name, (Atom("ensure"), ref, options)))


async def header(
    node: Node, ref: str, located: Mapping[str, Located], sources: Sequence[str]
) -> Path:
    """What this machine opens a model with, brought here where it is not whole. Raises NoFiles."""
    here = str(node.name)
    own = located.get(here)
    if own is not None and own.whole and own.path is not None:
        return own.path
    return await bring(node, here, ref, sources, Atom("header"))


async def _ensure(node: Node, name: str, request: Term) -> Term:
    try:
        return await _store(node, name, request, FETCH_S)
    except gen_server.CallError as exc:
        text = f"the model store of {name} was lost while it fetched: {exc}"
        raise NoFiles("model_store_lost", text) from exc


async def _store(node: Node, name: str, request: Term, timeout_s: float) -> Term:
    dest = (Atom("model_store"), Atom(name))
    return await gen_server.node_call(node, dest, request, timeout_s=timeout_s)


def _path(answer: Term) -> Path:
    match answer:
        case ("ok", path):
            return Path(text_of(path))
        case ("error", kind, text):
            raise NoFiles(str(kind), text_of(text))
        case other:
            raise NoFiles("model_store", repr(other)[:300])
