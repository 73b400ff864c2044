"""Which node people mean. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from control.errors import UnknownNode


def pick_node(name: str, known: Sequence[str]) -> str:
    """The one of ``known`` whose name, or the part before or behind its ``@``, is ``name``.

    Raises:
        UnknownNode: none is meant, or more than one.
    """
    wanted = name.lower()
    if name in known:
        return name
    found = {one for one in known if wanted in one.lower().split("@")}
    if len(found) != 1:
        raise UnknownNode(name, tuple(known))
    return found.pop()
