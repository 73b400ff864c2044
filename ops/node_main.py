"""The control process of a node: started by heart as ``python -m ops.node_main --settings FILE``.

Exit statuses as ``ctl``'s: 0 asked to stop, 1 the start models cannot be served, 2 bad
configuration or an address that is taken; anything else makes heart start it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

from bridge import gen_server
from bridge.epmd import Epmd
from bridge.errors import EpmdError, TlsError
from bridge.node import Node
from bridge.process import Process
from bridge.process_errors import StartError
from bridge.term import Atom, Pid, Term
from bridge.tls import TlsFiles
from control.discovery.addresses import (
    bindable,
    is_loopback,
    listen_hosts,
    parse_ip,
    read_interfaces,
)
from control.gateway.server import AddressUnavailable, TlsUnusable, check_address
from ops import erlang_shell, logs
from ops.config import Config, load
from ops.errors import OpsError
from ops.heart_client import HeartClient
from ops.home import Home, RunInfo, open_home
from ops.life import Life
from ops.loop_guard import CRASHED, guard_loop
from ops.node_parts import make_parts
from ops.start_models import StartFailed, bring_up_models
from ops.start_settings import StartSettings
from ops.tls_files import prepare, prepare_http
from ops.tree import Parts, start_tree

log = logging.getLogger("ops.node")

STOPPED, REFUSED, BAD_CONFIGURATION = 0, 1, 2
TREE_STOP_S = 90.0
DRAIN_GRACE_S = 3.0


def main() -> None:
    """Entry of the control process."""
    parser = argparse.ArgumentParser(prog="python -m ops.node_main", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="file written by `ctl start`")
    settings = StartSettings.from_file(parser.parse_args().settings)
    try:
        status = _run_in_home(settings)
    except OpsError as exc:
        status = _say(exc, BAD_CONFIGURATION)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of libraries must not keep a node that has stopped


def _run_in_home(settings: StartSettings) -> int:
    config = load(settings.config) if settings.config else Config()
    home = open_home(settings.home)
    logs.configure(
        style="json" if settings.log_json else config.log.format,
        level=config.log.level,
        folder=home.logs_dir,
        max_file_bytes=config.log.max_file_bytes,
        num_files=config.log.num_files,
    )
    logs.hide(home.cookie())
    with home.hold():
        return asyncio.run(_run(settings, config, home))


async def _run(settings: StartSettings, config: Config, home: Home) -> int:
    heart = HeartClient.from_env()
    beat = asyncio.create_task(heart.beat())
    host = settings.node.partition("@")[2]
    try:
        tls = prepare(config.node.tls, home, host)
        http_tls = prepare_http(config.http.tls, home, _http_hosts(settings.http_host))
        node = Node(
            settings.node,
            home.cookie(),
            net_ticktime_s=config.node.ticktime_s,
            tls=tls.contexts() if tls else None,
        )
        erlang_shell.install(node)
        hosts, dist_port = [host], config.node.dist_port
        if not is_loopback(host):
            hosts, dist_port = bindable(listen_hosts(host, read_interfaces()), dist_port)
        epmd = Epmd(tcp_port=settings.epmd_port, serve_hosts=hosts)
        await node.start(listen=(hosts, dist_port), epmd=epmd)
    except (OSError, EpmdError, TlsError, TlsUnusable) as exc:
        return _say(exc, BAD_CONFIGURATION)
    stopping = _StopRequest()
    stopping.on_signals()
    life, first = Life.begin(home.state_dir / "life.json")
    settings = replace(settings, http_port=settings.http_port or life.http_port)
    try:
        await check_address(settings.http_host, settings.http_port)
    except AddressUnavailable as exc:
        await node.stop()
        return _say(exc, BAD_CONFIGURATION)
    parts = make_parts(
        node, settings, config, home, tls, hosts, http_tls=http_tls, stop=stopping.ask
    )
    watch = guard_loop()
    try:
        with node.open_process(label="node main") as me:
            me.trap_exit = True
            status = await _serve(me, parts, settings, home, tls, heart, stopping, life, first)
    finally:
        watch.stop()
        beat.cancel()
        heart.close()
        home.remove_run()
        await node.stop()
    return status


def _http_hosts(host: str) -> list[str]:
    """What clients may call the HTTP endpoint on ``host``."""
    ip = parse_ip(host)
    if ip is None or not ip.is_unspecified:
        return [host]
    return [one.address for one in read_interfaces()]


async def _serve(
    me: Process,
    parts: Parts,
    settings: StartSettings,
    home: Home,
    tls: TlsFiles | None,
    heart: HeartClient,
    stopping: _StopRequest,
    life: Life,
    first: bool,
) -> int:
    """Start the tree, load the start models, wait for the end; the exit status."""
    try:
        root = await start_tree(me, parts)
    except StartError as exc:
        return _start_failed(exc)
    assert me.node.address is not None
    run = RunInfo(
        node=settings.node,
        url=parts.address.url,
        dist_port=me.node.address[1],
        epmd_port=settings.epmd_port,
        tls=asdict(tls) if tls else None,
    )
    try:
        home.write_run(run)
    except OpsError as exc:  # a full disk hides the node from ctl; it serves all the same
        log.error("%s", exc)
    life = replace(life, http_port=parts.address.port)
    life.write(home.state_dir / "life.json")
    models = asyncio.create_task(bring_up_models(me.node, settings, first_life=first))
    ends = [
        asyncio.create_task(stopping.wait()),
        asyncio.create_task(heart.gone.wait()),
        asyncio.create_task(_ended(me.node, root)),
    ]
    try:
        await asyncio.wait([models, *ends], return_when=asyncio.FIRST_COMPLETED)
        if models.done():
            try:
                models.result()
            except StartFailed as exc:
                await _end_tree(me, root, drain_s=0.0)
                return _say(exc, REFUSED)
            heart.ready()
            print(f"ready: {settings.node} {parts.address.url}", flush=True)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if ends[2].done():
            return _say(f"the supervision tree ended: {ends[2].result()!r:.500}", CRASHED)
        if ends[1].done():
            log.warning("heart is gone; the node stops")
        drain_s = 0.0 if stopping.now or ends[1].done() else parts.drain_s
        await _end_tree(me, root, drain_s=drain_s)
        return STOPPED
    finally:
        for task in (models, *ends):
            task.cancel()


async def _ended(node: Node, root: Pid) -> Term:
    """The reason of the tree's end, once it has ended."""
    with node.open_process(label="watch root_sup") as me:
        monitor = me.monitor(root)
        return await me.receive(lambda m: m[4] if m[:2] == ("DOWN", monitor) else None)


async def _end_tree(me: Process, root: Pid, *, drain_s: float) -> None:
    """Let running requests finish, then stop everything in reverse order.

    OS children are gone afterwards.
    """
    gen_server.cast(me, Atom("scheduler"), Atom("stopping"))
    if drain_s:
        with contextlib.suppress(gen_server.CallError):  # no gateway: nothing to finish
            await gen_server.call(
                me, Atom("gateway"), Atom("drain"), timeout_s=drain_s + DRAIN_GRACE_S
            )
    me.exit(root, Atom("shutdown"))
    try:
        async with asyncio.timeout(TREE_STOP_S):
            await _ended(me.node, root)
    except TimeoutError:
        log.error("the tree did not end within %.0f s; it is killed", TREE_STOP_S)


def _start_failed(error: StartError) -> int:
    """Say what hinders the tree. An address in use is for the operator to change."""
    reason = error.reason
    while isinstance(reason, tuple) and len(reason) in (2, 3):
        if reason[0] == "address_unavailable":
            return _say(reason[1], BAD_CONFIGURATION)
        if reason[0] == "bad_state_file" or reason[0] == "BadDesired":
            return _say(reason[1], BAD_CONFIGURATION)
        reason = reason[-1] if len(reason) == 3 else reason[1]
    return _say(f"the supervision tree did not start: {error.reason!r:.800}", CRASHED)


def _say(what: object, status: int) -> int:
    text = what.decode("utf-8", "replace") if isinstance(what, bytes) else str(what)
    print(f"ctl start: {text}", file=sys.stderr, flush=True)
    return status


class _StopRequest:
    """SIGTERM, Ctrl-C and ``ctl stop``, all meaning: drain, then end."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self.now = False

    def ask(self, now: bool) -> None:
        self.now = self.now or now
        self._asked.set()

    async def wait(self) -> None:
        await self._asked.wait()

    def on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGBREAK", signal.SIGTERM)]
        for number in numbers:
            try:
                loop.add_signal_handler(number, self.ask, False)
            except NotImplementedError:  # Windows: handlers run between two steps of the loop
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.ask, False))


if __name__ == "__main__":
    main()
