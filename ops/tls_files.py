"""Certificates of the distribution and of HTTP: what the configuration names, else self-made.

With ``node: {tls: true}`` the first start makes an authority for the cluster and a certificate for
the node, under ``<home>/keys`` (all mode 0600):

==================  ==================================================================
``dist_ca.pem``     the authority; whoever has a certificate of it may knock
``dist_ca.key``     signs certificates; may stay on one machine
``dist_node.pem``   this node's certificate, with ``dist_node.key``
``dist_ssl.conf``   the same for a stock node
==================  ==================================================================

A second machine: copy ``dist_ca.pem`` and ``dist_ca.key`` (and ``cookie``) into its home before its
first start, and it makes its own certificate; or copy ``dist_ca.pem`` and the two node files alone,
which then serve both. A stock node with ``ssl``::

    erl -name me@127.0.0.1 -proto_dist inet_tls -ssl_dist_optfile HOME/keys/dist_ssl.conf

With ``http: {tls: true}`` the HTTP endpoint has a certificate of the same authority: ``http.pem``
with ``http.key`` there. Clients need ``dist_ca.pem`` to check it (``curl --cacert``,
``SSL_CERT_FILE`` for Python); they show none, their API key says who they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bridge.errors import TlsError
from bridge.tls import TlsFiles, mode_of
from control.gateway.server import ServerTls, TlsUnusable
from ops.config import HttpTls, Tls, load
from ops.errors import HomeError
from ops.home import Home, RunInfo, write_atomically


def files_of(tls: Tls | None, home: Home) -> TlsFiles | None:
    """The files that the configuration means; None: the distribution is plain TCP."""
    if tls is None:
        return None
    if tls.ca is None:
        return own_files(home)
    return TlsFiles(ca=str(tls.ca), certificate=str(tls.certificate), key=str(tls.key))


def prepare(tls: Tls | None, home: Home, host: str) -> TlsFiles | None:
    """The files of a node that starts on ``host``, made where they are to be made.

    Raises:
        HomeError: what is there cannot be used, or nothing can be written.
    """
    files = files_of(tls, home)
    if tls is None or files is None:
        return None
    if tls.ca is None:
        from ops.certificates import make_missing  # costs 0.1 s, which plain nodes need not pay

        try:
            make_missing(files, home.keys_dir / "dist_ca.key", host)
        except (OSError, ValueError, TypeError) as exc:
            advice = "Delete the dist_* files there to get new ones, or copy a whole set."
            raise HomeError(home.keys_dir, f"TLS files cannot be used: {exc}", advice) from exc
    _write_ssl_conf(home, files)
    return files


def prepare_http(tls: HttpTls | None, home: Home, hosts: Sequence[str]) -> ServerTls | None:
    """With what the HTTP endpoint speaks TLS, if it does; made where it is to be made.

    Args:
        hosts: names and addresses that clients may say.

    Raises:
        HomeError: what is there cannot be used, or nothing can be written.
        TlsUnusable: files of the operator's own cannot be used.
    """
    if tls is None:
        return None
    if tls.certificate is not None:
        return _checked(ServerTls(str(tls.certificate), str(tls.key)))
    from ops.certificates import make_missing_http  # costs 0.1 s, as above

    keys = home.keys_dir
    pair = (keys / "http.pem", keys / "http.key")
    try:
        make_missing_http(pair, keys / "dist_ca.pem", keys / "dist_ca.key", hosts)
        return _checked(ServerTls(*map(str, pair)))
    except (OSError, ValueError, TypeError, TlsUnusable) as exc:
        advice = (
            "Copy dist_ca.pem and dist_ca.key of another node there, delete what is damaged, or "
            "name files of your own under http.tls."
        )
        raise HomeError(keys, f"HTTP cannot speak TLS: {exc}", advice) from exc


def _checked(files: ServerTls) -> ServerTls:
    """Raises TlsUnusable."""
    try:
        open_to = mode_of(files.key) & 0o077
    except TlsError as exc:
        raise TlsUnusable(files, str(exc)) from exc
    if sys.platform != "win32" and open_to:
        raise TlsUnusable(files, f"other users may read {files.key}: run `chmod 600` on it")
    files.context()
    return files


def files_for_client(home: Home, run: RunInfo | None) -> TlsFiles | None:
    """With what ``ctl`` knocks: as the home's node does, running or not.

    Raises:
        ConfigError: the configuration of the home cannot be read.
    """
    if run is not None:
        return TlsFiles(**run.tls) if run.tls else None
    if not home.config_file.exists():
        return None
    return files_of(load(home.config_file).node.tls, home)


def own_files(home: Home) -> TlsFiles:
    """Where self-made files are; nothing is made."""
    keys = home.keys_dir
    return TlsFiles(
        ca=str(keys / "dist_ca.pem"),
        certificate=str(keys / "dist_node.pem"),
        key=str(keys / "dist_node.key"),
    )


def ssl_conf(home: Home) -> Path:
    """The option file for stock nodes (``-ssl_dist_optfile``)."""
    return home.keys_dir / "dist_ssl.conf"


def _write_ssl_conf(home: Home, files: TlsFiles) -> None:
    sides = []
    for side, more in (("server", ", {fail_if_no_peer_cert, true}"), ("client", "")):
        sides.append(
            f"{{{side}, [{{cacertfile, {_erlang(files.ca)}}},\n"
            f"  {{certfile, {_erlang(files.certificate)}}},\n"
            f"  {{keyfile, {_erlang(files.key)}}},\n"
            f"  {{verify, verify_peer}}{more}]}}"
        )
    text = "[" + ",\n ".join(sides) + "].\n"
    try:
        write_atomically(ssl_conf(home), text)
    except OSError as exc:
        raise HomeError(ssl_conf(home), str(exc), "Free it, or use another --home.") from exc


def _erlang(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
