"""``ctl`` where there is no node or the command line is wrong; ``stop``; settings of a start."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ops.commands.options import model_ref
from ops.commands.start import decide
from ops.config import Config, loads
from ops.errors import BadUsage, ConfigError
from ops.home import Home, open_home
from ops.start_settings import StartSettings
from ops.tables import details, plain, printable
from tests.ops.ctl_harness import run_ctl, running_node

COMMANDS = ["stop", "status", "nodes", "topology", "tree", "model list", "model ps", "place m",
            "model load m", "model pull m", "model unload m", "model swap a b", "chat m -p hi",
            "chat"]  # fmt: skip


@pytest.fixture(autouse=True)
def no_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHALANX_HOME", str(tmp_path / "absent"))
    monkeypatch.delenv("ERL_EPMD_PORT", raising=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_home_that_is_not_there_is_status_3(command: str, tmp_path: Path) -> None:
    found = run_ctl(*command.split())
    assert (found.status, found.out) == (3, "")
    assert f"the home {tmp_path / 'absent'} does not exist" in found.err
    assert "ctl start" in found.err
    assert not (tmp_path / "absent").exists()


def test_a_home_without_a_running_node_is_status_3(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    home.cookie()
    found = run_ctl("status", "--home", tmp_path)
    assert found.status == 3
    assert f"{home.run_file} is not there" in found.err


def test_a_dead_node_is_status_3_and_told_from_none(tmp_path: Path) -> None:
    with running_node(tmp_path) as node:
        node.process.kill()
        node.process.wait()
        found = node.ctl("status")
    assert found.status == 3
    assert "its process is gone" in found.err


def test_a_node_that_hangs_is_status_3(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    home.cookie()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    run = {
        "node": "n@127.0.0.1",
        "url": "",
        "dist_port": port,
        "epmd_port": port,
        "os_pid": os.getpid(),
        "started_s": __import__("psutil").Process().create_time(),
    }
    home.run_file.write_text(json.dumps(run))
    found = run_ctl("status", "--home", tmp_path)
    assert found.status == 3
    assert f"n@127.0.0.1 at 127.0.0.1:{port} cannot be reached" in found.err
    assert f"Process {os.getpid()} still runs" in found.err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("nonsense", "No such command"),
        ("status --nonsense", "No such option"),
        ("model load", "Missing argument"),
        ("model load m --context many", "--context"),
        ("model load m --tensor 0", "--tensor"),
        ("model load m --shares 2,none", "--shares '2,none': write positive numbers"),
        ("chat m --temperature 3", "--temperature"),
        ("chat m -p  ", "requires an argument"),
        ("start --join other:0", "--join 'other:0': write HOST or HOST:PORT"),
        ("start --join 10.9.9.9 --name a@127.0.0.1", "listens on this machine alone"),
        ("start --no-model --model m", "--no-model and --model exclude each other"),
        ("start --name alpha", "--name 'alpha': write NAME@HOST"),
        ("start --http 52415", "--http '52415': write HOST:PORT"),
        ("start --http 127.0.0.1:99999", "--http '127.0.0.1:99999'"),
        ("start --http 0.0.0.0:52415", "say --insecure"),
        ("start --config absent.yaml", "absent.yaml: cannot be read"),
    ],
)
def test_bad_usage_is_status_2_and_names_the_flag(args: str, text: str, tmp_path: Path) -> None:
    found = run_ctl(*args.split())
    assert (found.status, found.out) == (2, "")
    assert text in found.err
    assert not (tmp_path / "absent" / "run.json").exists()


def test_a_node_name_without_a_host_is_bad_usage(tmp_path: Path) -> None:
    open_home(tmp_path).cookie()
    found = run_ctl("status", "--home", tmp_path, "--node", "alpha")
    assert found.status == 2
    assert "write NAME@HOST" in found.err


def test_a_bad_configuration_names_file_line_and_field(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("cluster_name: x\nhttp:\n  prot: 1\n")
    found = run_ctl("start", "--home", tmp_path)
    assert found.status == 2
    assert f"{tmp_path / 'config.yaml'}:3 http.prot: unknown field; did you mean port?" in found.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_home_that_cannot_be_written_is_status_2(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = run_ctl("start", "--home", tmp_path)
    assert found.status == 2
    assert str(tmp_path) in found.err


def test_a_home_below_a_file_is_status_2(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = run_ctl("start", "--home", tmp_path / "file" / "home")
    assert found.status == 2
    assert "--home" in found.err


def test_a_cookie_others_can_read_is_status_2(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    home.cookie()
    home.cookie_file.chmod(0o644)
    found = run_ctl("status", "--home", tmp_path)
    assert found.status == 2
    assert "chmod 600" in found.err


def test_a_home_in_use_is_status_2_and_untouched(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    with home.hold():
        found = run_ctl("start", "--home", tmp_path)
    assert found.status == 2
    assert "runs on it" in found.err
    assert not list(home.state_dir.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--now"]])
@pytest.mark.parametrize("by_name", [False, True])
def test_stop_returns_when_the_node_is_gone(
    flags: list[str], by_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_node(tmp_path) as node:
        monkeypatch.setenv("ERL_EPMD_PORT", str(node.epmd_port))
        if by_name:
            (tmp_path / "run.json").unlink()
            flags = [*flags, "--node", node.name]
        found = node.ctl("stop", *flags)
        assert (found.status, found.out) == (0, "stopped n@127.0.0.1\n")
        assert node.seen == [f"stop {'--now' in flags}"]
        assert node.process.wait(0 if not by_name else 10) == 0
        assert node.ctl("stop").status == 3


# --- what a start decides


def _decide(config: Config | None = None, **flags: object) -> StartSettings:
    given: dict[str, object] = {
        "name": None,
        "http": None,
        "models": (),
        "no_model": False,
        "log_json": False,
        "insecure": False,
        **flags,
    }
    return decide(Home(Path("/h")), None, config or Config(), **given)  # type: ignore[arg-type]


def test_defaults_of_a_start() -> None:
    found = _decide()
    assert (found.node, found.http_host, found.http_port) == (
        "phalanx@127.0.0.1", "127.0.0.1", 52415
    )  # fmt: skip
    assert found.models == ("smollm2-135m-instruct",)
    assert (found.no_model, found.log_json, found.epmd_port) == (False, False, 4369)


def test_flags_go_before_the_configuration() -> None:
    text = "node: {name: a@127.0.0.1, epmd_port: 5000}\nhttp: {port: 1}\nmodels: {default: [x]}\n"
    config = loads(text + "log: {format: json}\n", "c.yaml", Path("/"))
    found = _decide(config)
    assert (found.node, found.http_port, found.models) == ("a@127.0.0.1", 1, ("x",))
    assert (found.log_json, found.epmd_port) == (True, 5000)
    found = _decide(config, name="b@127.0.0.1", http="[::1]:0", models=("y", "z"))
    assert (found.node, found.http_host, found.http_port) == ("b@127.0.0.1", "::1", 0)
    assert found.models == ("y", "z")
    assert _decide(config, no_model=True).models == ()


def test_the_environment_names_the_epmd_port_as_for_stock_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ERL_EPMD_PORT", "6000")
    assert _decide().epmd_port == 6000
    monkeypatch.setenv("ERL_EPMD_PORT", "none")
    with pytest.raises(BadUsage, match="ERL_EPMD_PORT"):
        _decide()


@pytest.mark.parametrize(
    ("host", "open_"),
    [("127.0.0.1", False), ("127.8.8.8", False), ("localhost", False), ("[::1]", False),
     ("0.0.0.0", True), ("[::]", True), ("192.168.0.4", True), ("example.org", True)],
)  # fmt: skip
def test_what_lets_others_in_needs_insecure(host: str, open_: bool) -> None:
    if open_:
        with pytest.raises(BadUsage, match="insecure"):
            _decide(http=f"{host}:80")
    assert _decide(http=f"{host}:80", insecure=True).http_host == host.strip("[]")


def test_a_wide_open_configuration_needs_insecure_too() -> None:
    config = loads("http: {host: 0.0.0.0}", "c.yaml", Path("/"))
    with pytest.raises(BadUsage, match=r"http\.host"):
        _decide(config)


text = st.text(st.characters(exclude_categories=["Cs"]))
settings = st.builds(
    StartSettings,
    home=st.just(Path("/some/home")),
    config=st.sampled_from([None, Path("/etc/config.yaml")]),
    node=text,
    http_host=text,
    http_port=st.integers(0, 65535),
    models=st.lists(text).map(tuple),
    no_model=st.booleans(),
    log_json=st.booleans(),
    epmd_port=st.integers(1, 65535),
)


@hypothesis_settings(max_examples=25)
@given(made=settings)
def test_settings_come_back_from_their_file(
    made: StartSettings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.json"
    made.to_file(path)
    assert StartSettings.from_file(path) == made
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": null, "home": "x"}', None])
def test_a_broken_settings_file_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"s\.json"):
        StartSettings.from_file(path)


# --- small rules


def test_a_model_of_this_folder_becomes_a_path_the_node_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    (tmp_path / "smollm2").mkdir()
    assert model_ref("m.gguf") == str(tmp_path / "m.gguf")
    assert model_ref("./smollm2") == str(tmp_path / "smollm2")
    assert model_ref("smollm2") == "smollm2"  # a card's id
    assert model_ref("hf:a/b") == "hf:a/b"
    assert model_ref("absent/x.gguf") == "absent/x.gguf"  # it may be there for the node
    with pytest.raises(BadUsage):
        model_ref("")


@given(text=st.text())
def test_nothing_a_terminal_obeys_is_shown(text: str) -> None:
    shown = printable(text)
    assert all(c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) for c in shown)
    assert "\n" not in plain(text)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@hypothesis_settings(max_examples=40)
@given(data=nested)
def test_any_answer_has_a_form_for_people(data: object) -> None:
    details(data)


def test_help_explains_every_flag() -> None:
    from typer.main import get_command

    from ops.ctl import app

    pending = [get_command(app)]
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        assert command.help, command.name
        for param in command.params:
            assert getattr(param, "help", None), f"{command.name} {param.name}"
