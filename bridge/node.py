"""A node: its processes and its links to other nodes."""

from __future__ import annotations

from bridge.local_node import LocalNode


class Node(LocalNode):
    """An Erlang node. Without ``start()`` it is on its own."""

    def __init__(
        self,
        name: str,
        cookie: str,
        *,
        hidden: bool = False,
        creation: int | None = None,
        net_ticktime_s: float = 60.0,
    ) -> None:
        super().__init__(name, creation)
        self.hidden = hidden
        self.net_ticktime_s = net_ticktime_s
        self._cookie = cookie
