"""Self-made certificates: made once, kept, renewed; a whole node that speaks TLS alone."""

from __future__ import annotations

import asyncio
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bridge import gen_server
from bridge.errors import TlsError
from bridge.term import Atom
from bridge.text import text_of
from bridge.tls import TlsFiles
from control.gateway.server import ServerTls, TlsUnusable
from ops.client import Target, connect
from ops.config import Config, HttpTls, Tls, loads
from ops.errors import ConfigError, HomeError
from ops.home import Home, RunInfo, open_home
from ops.tls_files import files_for_client, files_of, prepare, prepare_http, ssl_conf
from tests.cluster.live_node import LiveNode, free_tcp_port
from tests.ops.ctl_harness import run_ctl

HOST = "127.0.0.1"


def made(home: Home, host: str = HOST) -> TlsFiles:
    files = prepare(Tls(), home, host)
    assert files is not None
    files.contexts()
    return files


def contents(home: Home) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.keys_dir.iterdir()}


def test_files_are_made_once_for_this_user_alone(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    files = made(home)
    first = contents(home)
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.keys_dir.iterdir()} == {0o600}
    assert made(home) == files
    assert contents(home) == first
    assert made(home, "10.1.2.3") == files  # the machine moved: a new certificate, the old CA
    second = contents(home)
    assert {name for name in first if first[name] != second[name]} == {
        "dist_node.pem",
        "dist_node.key",
    }
    names = (
        x509.load_pem_x509_certificate(second["dist_node.pem"])
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert "10.1.2.3" in {str(one) for one in names.get_values_for_type(x509.IPAddress)}
    assert files.ca in ssl_conf(home).read_text()


def test_a_second_machine_gets_the_authority_or_the_whole_set(tmp_path: Path) -> None:
    first, second, third = (open_home(tmp_path / name) for name in ("a", "b", "c"))
    made(first)
    for name in ("dist_ca.pem", "dist_ca.key"):
        shutil.copy(first.keys_dir / name, second.keys_dir)
    made(second, "10.0.0.2")
    assert contents(second)["dist_ca.pem"] == contents(first)["dist_ca.pem"]
    assert contents(second)["dist_node.pem"] != contents(first)["dist_node.pem"]
    for name in ("dist_ca.pem", "dist_node.pem", "dist_node.key"):
        shutil.copy(first.keys_dir / name, third.keys_dir)
    made(third, "10.0.0.3")
    assert contents(third)["dist_node.pem"] == contents(first)["dist_node.pem"]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    home, other = open_home(tmp_path / "a"), open_home(tmp_path / "b")
    files = made(home)
    made(other)
    Path(files.key).chmod(0o644)
    with pytest.raises(TlsError, match=r"mode 0644 .*chmod 600"):
        files.contexts()
    Path(files.key).unlink()
    with pytest.raises(TlsError, match=r"dist_node\.key: No such file"):
        files.contexts()
    shutil.copy(other.keys_dir / "dist_node.key", files.key)
    with pytest.raises(TlsError, match="no certificate with its unlocked key"):
        files.contexts()
    Path(files.ca).write_text("nonsense")
    with pytest.raises(TlsError, match="no certificate of an authority"):
        files.contexts()
    Path(files.certificate).unlink()
    with pytest.raises(HomeError, match="TLS files cannot be used"):
        prepare(Tls(), home, HOST)


def read(text: str) -> Config:
    return loads(text, "config.yaml", Path("/etc/phalanx"))


def test_one_setting_switches_it_on(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    assert files_of(read("node: {tls: false}").node.tls, home) is None
    assert files_of(read("").node.tls, home) is None
    own = files_of(read("node: {tls: true}").node.tls, home)
    assert own is not None
    assert own.ca == str(home.keys_dir / "dist_ca.pem")
    assert files_of(read("node: {tls: {}}").node.tls, home) == own
    text = "node:\n  tls:\n    ca: ca.pem\n    certificate: /abs/c.pem\n    key: k.pem\n"
    assert files_of(read(text).node.tls, home) == TlsFiles(
        ca="/etc/phalanx/ca.pem", certificate="/abs/c.pem", key="/etc/phalanx/k.pem"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node:\n  tls:\n    ca: a\n", r"config.yaml:3 node.tls.ca: .*certificate and key is miss"),
        ("node:\n  tls:\n    cert: a\n", r"config.yaml:3 node.tls.cert: unknown field"),
        ("node:\n  tls: 7\n", r"config.yaml:2 node.tls: "),
    ],
)
def test_a_wrong_section_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(text)


def test_a_client_knocks_as_the_node_of_its_home_does(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    assert files_for_client(home, None) is None
    home.config_file.write_text("node: {tls: true}\n")
    own = files_for_client(home, None)
    assert own is not None
    plain = RunInfo(node="n@h", url="", dist_port=1, epmd_port=2)
    assert files_for_client(home, plain) is None


async def spare_port(target: Target) -> str:
    """The id of a compute port, once it has said hello."""
    async with connect(target) as client, asyncio.timeout(30):
        while True:
            with client.node.open_process() as me:
                ports = await gen_server.call(me, ("ports", client.name), Atom("ports"))
            for port in ports:
                if port[Atom("connected")]:
                    return text_of(port[Atom("port_id")])
            await asyncio.sleep(0.05)  # nobody tells when it comes


@pytest.mark.slow
def test_a_whole_node_speaks_tls_alone(tmp_path: Path) -> None:
    node = LiveNode(tmp_path / "home", "tls@127.0.0.1", free_tcp_port())
    node.home.mkdir()
    (node.home / "config.yaml").write_text("node: {tls: true}\n")
    node.start("--no-model")
    try:
        assert run_ctl("status", "--home", node.home).status == 0
        # Its spare port has said hello: over TLS, since nothing else is let in.
        port = asyncio.run(spare_port(Target(Home(node.home))))
        assert port.startswith("tls_port_")
        plain = tmp_path / "plain"
        shutil.copytree(node.home, plain, ignore=shutil.ignore_patterns("keys", "config.yaml"))
        (plain / "run.json").unlink()
        told = ("--node", node.name, "--home", plain)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ERL_EPMD_PORT", str(node.epmd_port))
            found = run_ctl("status", *told)
            assert found.status == 3
            assert "tls@127.0.0.1" in found.err
            shutil.copytree(node.home / "keys", plain / "keys")
            (plain / "config.yaml").write_text("node: {tls: true}\n")
            assert run_ctl("status", *told).status == 0
    finally:
        assert node.stop() == 0


# -- HTTP -----------------------------------------------------------------------------------


def test_http_has_a_certificate_of_the_same_authority_that_opens_nothing(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    assert prepare_http(None, home, [HOST]) is None
    files = prepare_http(HttpTls(), home, [HOST, "10.1.2.3"])
    assert files is not None
    first = contents(home)
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.keys_dir.iterdir()} == {0o600}
    assert prepare_http(HttpTls(), home, ["10.1.2.3"]) == files
    assert contents(home) == first
    certificate = x509.load_pem_x509_certificate(first["http.pem"])
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]  # no node will take it for a peer's
    made(home)
    assert contents(home)["dist_ca.pem"] == first["dist_ca.pem"]
    prepare_http(HttpTls(), home, ["10.9.9.9"])  # the machine moved
    second = contents(home)
    assert {name for name in first if first[name] != second[name]} == {"http.pem", "http.key"}


def test_http_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    home, other = open_home(tmp_path / "a"), open_home(tmp_path / "b")
    prepare_http(HttpTls(), home, [HOST])
    pem, key = home.keys_dir / "http.pem", home.keys_dir / "http.key"
    own = HttpTls(certificate=pem, key=key)
    assert prepare_http(own, other, [HOST]) == ServerTls(str(pem), str(key))
    key.chmod(0o640)
    with pytest.raises(TlsUnusable, match="chmod 600"):
        prepare_http(own, other, [HOST])
    key.chmod(0o600)
    key.write_text("nonsense")
    with pytest.raises(TlsUnusable, match=r"http\.tls"):
        prepare_http(own, other, [HOST])
    shutil.copy(home.keys_dir / "dist_ca.pem", other.keys_dir)  # a machine without its key
    with pytest.raises(HomeError, match=r"dist_ca\.key is not here"):
        prepare_http(HttpTls(), other, [HOST])
