"""The ``ctl`` command: its list of commands, and the one place where errors become statuses.

0 done, 1 the cluster said no, 2 bad usage or configuration, 3 no node answers; 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Final

import typer

from ops import heart
from ops.commands import bench, chat, cluster, doctor, keys, models, remsh, shell, start, stop
from ops.commands.output import note
from ops.errors import BadUsage, ConfigError, HomeError, NoNode, OpsError, Refused

STATUS_OF: Final[dict[type[OpsError], int]] = {
    Refused: heart.REFUSED,
    BadUsage: heart.BAD_CONFIGURATION,
    ConfigError: heart.BAD_CONFIGURATION,
    HomeError: heart.BAD_CONFIGURATION,
    NoNode: heart.NO_NODE,
}

app = typer.Typer(
    name="ctl",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 the cluster said no, 2 bad usage or configuration, "
    "3 no node answers.",
)
app.command()(start.start)
app.command()(stop.stop)
app.command()(cluster.status)
app.command()(cluster.nodes)
app.command()(cluster.topology)
app.command()(cluster.tree)
app.command()(cluster.place)
app.add_typer(models.app, name="model")
app.add_typer(keys.app, name="key")
app.command()(chat.chat)
app.command()(shell.shell)
app.command()(remsh.remsh)
app.command()(bench.bench)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(version("phalanx"))
        except PackageNotFoundError:
            typer.echo("not installed: run from its source")
        raise typer.Exit


@app.callback()
def ctl(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run and steer a cluster that serves language models."""


def main() -> None:
    """Entry of ``ctl``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an old terminal shows ? where it lacks a letter
    try:
        app()
    except OpsError as exc:
        note(f"ctl: {exc}")
        sys.exit(next(STATUS_OF[kind] for kind in type(exc).__mro__ if kind in STATUS_OF))


if __name__ == "__main__":
    main()
