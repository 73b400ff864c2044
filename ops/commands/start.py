"""``ctl start``: check everything that can be checked, then run the node under heart."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import psutil
import typer
from pydantic import ValidationError

import ops
from bridge.epmd import epmd_port
from bridge.errors import EpmdError
from control.desired import BadDesired, read_desired
from control.discovery.addresses import is_loopback
from ops import heart
from ops.commands.options import model_ref
from ops.config import Config, Http, Node, load
from ops.errors import BadUsage, HomeError
from ops.home import Home, open_home
from ops.joining import check_peer, choose_node_name
from ops.start_settings import StartSettings


def start(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="config.yaml in the home, if there is one",
            help="Configuration of the node and its cluster.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            show_default="phalanx@127.0.0.1",
            help="Distribution name, NAME@HOST; two nodes of one machine need two. Beyond this "
            "machine HOST is an address of it that the others reach.",
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            envvar="PHALANX_HOME",
            metavar="DIR",
            show_default="~/.phalanx",
            help="Folder for everything the node writes: cookie, models, state, logs.",
        ),
    ] = None,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default="127.0.0.1:52415",
            help="Where the HTTP API listens; port 0 takes a free one.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            show_default="smollm2-135m-instruct",
            help="Model to load before the node is ready, as MODEL of `ctl model load`; may be "
            "given several times. The first is the one called `default`.",
        ),
    ] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Start with no model, not even those of last time.")
    ] = False,
    join: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Join the cluster of this machine, by its EPMD or the port of its distribution; "
            "may be given several times. Both need the same cookie and cluster_name.",
        ),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log to stderr as JSON, one object a line.")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Open the HTTP API to everybody while there is no API key: where it listens "
            "beyond this machine, and where every key was revoked.",
        ),
    ] = False,
) -> None:
    """Run a node in the foreground, supervised, until SIGTERM or Ctrl-C.

    Prints one line beginning `ready:` with the node's name and URL once a chat is answered.
    """
    peers = tuple(check_peer(peer) for peer in join or ())
    opened = open_home(home)
    file = config.expanduser().absolute() if config else None
    if file is None and opened.config_file.exists():
        file = opened.config_file
    settings = decide(
        opened,
        file,
        load(file) if file else Config(),
        name=name,
        http=http,
        models=tuple(model or ()),
        no_model=no_model,
        log_json=log_json,
        insecure=insecure,
        join=peers,
    )
    opened.cookie()
    with opened.hold():  # the node holds it itself; here only to say at once that it cannot
        _remove_stale(opened)
    path = opened.state_dir / f"start-{os.getpid()}.json"
    try:
        settings.to_file(path)
    except OSError as exc:
        raise HomeError(path, exc.strerror or str(exc), "Free it, or use another --home.") from exc
    try:
        status = heart.run(_argv(path), env=_env())
    finally:
        path.unlink(missing_ok=True)
    raise typer.Exit(status)


def decide(
    home: Home,
    config_file: Path | None,
    config: Config,
    *,
    name: str | None,
    http: str | None,
    models: tuple[str, ...],
    no_model: bool,
    log_json: bool,
    insecure: bool,
    join: tuple[str, ...] = (),
) -> StartSettings:
    """Flags over configuration over defaults. Raises BadUsage naming the flag or field."""
    if no_model and models:
        raise BadUsage("--no-model and --model exclude each other")
    host, port = _http(http) if http is not None else (config.http.host, config.http.port)
    if not insecure and not is_loopback(host) and not _has_keys(home):
        where = f"--http {http}" if http is not None else f"{config_file} http.host: {host}"
        raise BadUsage(
            f"{where} lets other machines in, and this home knows no API key that would keep "
            f"strangers out. Start it on 127.0.0.1, run `ctl key create`, and start it again so; "
            f"or say --insecure to open it to everybody."
        )
    chosen = () if no_model else models or config.models.default
    return StartSettings(
        home=home.root,
        config=config_file,
        node=choose_node_name(None if name is None else _node_name(name), config, join),
        http_host=host,
        http_port=port,
        models=tuple(model_ref(one) for one in chosen),
        no_model=no_model or not chosen,
        log_json=log_json or config.log.format == "json",
        epmd_port=_epmd_port(config),
        join=join,
        insecure=insecure,
    )


def _has_keys(home: Home) -> bool:
    """Whether the cluster had an API key when this node was last a part of it."""
    try:
        return bool(read_desired(home.desired_file).keys)
    except BadDesired as exc:
        raise BadUsage(str(exc)) from exc


def _node_name(name: str) -> str:
    try:
        return Node(name=name).name
    except ValidationError as exc:
        raise BadUsage(f"--name {name!r}: write NAME@HOST, such as phalanx@127.0.0.1") from exc


def _http(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if not colon or not (port.isascii() and port.isdigit()):
            raise ValueError("no port")
        checked = Http(host=host, port=int(port))
    except ValueError as exc:  # pydantic's ValidationError is one
        raise BadUsage(
            f"--http {text!r}: write HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:52415"
        ) from exc
    return checked.host, checked.port


def _epmd_port(config: Config) -> int:
    """The environment's, as for stock Erlang nodes, else the configuration's."""
    if "ERL_EPMD_PORT" not in os.environ:
        return config.node.epmd_port
    try:
        return epmd_port()
    except EpmdError as exc:
        raise BadUsage(str(exc)) from exc


def _argv(settings_file: Path) -> list[str]:
    # -P: a folder `ops` where the user happens to stand must not be taken for ours.
    return [sys.executable, "-P", "-m", "ops.node_main", "--settings", str(settings_file)]


def _env() -> dict[str, str]:
    """The node runs the very code that this command does, installed or not."""
    root = str(Path(ops.__file__).parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _remove_stale(home: Home) -> None:
    """Settings of starts that were killed."""
    for path in home.state_dir.glob("start-*.json"):
        number = path.stem.partition("-")[2]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            path.unlink(missing_ok=True)
