"""config.yaml: the contract's example, every default documented, errors with file, line, field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ops.config import UNITS, Config, Role, Section, load, loads
from ops.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "ops" / "config.example.yaml"

CONTRACT = """\
cluster_name: engineering_cluster
devices:
  - hostname: system-a.local
    roles: [coordinator, storage]
    max_memory: 128GB
    max_cores: 16
    gpu: false
  - hostname: system-b.local
    roles: [compute]
    max_memory: 128GB
    max_cores: 16
    gpu: true
network:
  discovery: auto      # or: static, with peers: [host[:port], ...]
"""


def read(text: str) -> Config:
    return loads(text, "config.yaml", Path("/etc/phalanx"))


def test_the_contracts_example_is_valid_as_it_stands() -> None:
    config = read(CONTRACT)
    assert config.cluster_name == "engineering_cluster"
    assert config.devices[0].roles == {Role.COORDINATOR, Role.STORAGE}
    assert config.devices[0].max_memory_bytes == 128 * 10**9
    assert config.devices[1].gpu is True
    assert config.device("SYSTEM-B.local") is config.devices[1]
    assert config.device("elsewhere") is None


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert read("") == read("# nothing\n") == read("{}") == Config()
    path = tmp_path / "config.yaml"
    path.write_text("models: {dir: weights, cards: [more, /abs]}\n")
    models = load(path).models
    assert models.dir == tmp_path / "weights"
    assert models.cards == (tmp_path / "more", Path("/abs"))


def test_the_documented_example_lists_every_field_with_its_default() -> None:
    text = EXAMPLE.read_text()
    assert load(EXAMPLE) == Config()

    def names(section: type[Section]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, field in section.model_fields.items():
            kind = field.annotation
            nested = isinstance(kind, type) and issubclass(kind, Section)
            found[field.alias or name] = names(kind) if nested else None  # type: ignore[arg-type]
        return found

    def keys(data: object) -> Any:
        return {k: keys(v) for k, v in data.items()} if isinstance(data, dict) else None

    assert keys(yaml.safe_load(text)) == names(Config)
    for field in ("hostname", "roles", "max_memory", "max_cores", "gpu"):
        assert f"#    {field}:" in text or f"#  - {field}:" in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cluster: x", "1 cluster: unknown field; did you mean cluster_name?"),
        ("\nhttp:\n  prt: 1", "3 http.prt: unknown field; did you mean port?"),
        ("http:\n  zzz: 1", "2 http.zzz: unknown field; known: cors_origins, host, port, tls"),
        ("devices:\n- roles: [compute]", "2 devices[0].hostname: is required"),
        (
            "devices:\n- hostname: a\n  max_memory: 128Gb",
            "3 devices[0].max_memory: '128Gb' is not a size with a unit",
        ),
        (
            "devices:\n- hostname: a\n  max_memory: 128",
            "3 devices[0].max_memory: 128 is not a size",
        ),
        (
            "devices:\n- hostname: a\n  max_memory: 1MB",
            '3 devices[0].max_memory: "1MB": 1000000 bytes is impossible',
        ),
        ("devices:\n- {hostname: a, max_cores: 0}", "2 devices[0].max_cores: 0: input should be"),
        ("devices:\n- {hostname: a, max_cores: '8'}", "2 devices[0].max_cores: a whole number is"),
        ("devices:\n- {hostname: a, gpu: 1}", "2 devices[0].gpu: true or false is expected, not 1"),
        ("devices:\n- {hostname: a, roles: []}", "2 devices[0].roles: must not be empty"),
        (
            "devices:\n- hostname: a\n  roles:\n  - compute\n  - boss",
            '5 devices[0].roles[1]: "boss" is none of',
        ),
        ("devices:\n- hostname: a b", '2 devices[0].hostname: "a b" is not a valid hostname'),
        (
            "devices:\n- hostname: a\n- hostname: A",
            "3 devices[1].hostname: A is listed twice, first as devices[0]",
        ),
        ("devices: a", "1 devices: a list is expected"),
        ("network:\n  discovery: static", "2 network.discovery: discovery: static needs peers"),
        ("network: {discovery: mdns}", '1 network.discovery: "mdns" is none of'),
        (
            "network: {discovery: epmd, peers: [a]}",
            "1 network.peers: peers are used with discovery: static only",
        ),
        (
            "devices:\n- hostname: a\nnetwork:\n  tie_breaker: b",
            "4 network.tie_breaker: b is none of the devices",
        ),
        ("network:\n  peers: [a]", "2 network.peers: peers are used with discovery: static only"),
        (
            "network:\n  discovery: static\n  peers:\n  - a\n  - b:99999",
            "5 network.peers[1]: 'b:99999' is not HOST or HOST:PORT",
        ),
        (
            "devices:\n- {hostname: a, roles: [compute]}\nnetwork: {discovery: static, peers: [b]}",
            "1 devices: no device has the role coordinator",
        ),
        ("node: {name: phalanx}", '1 node.name: "phalanx" is not a valid name'),
        ("http:\n  port: 70000", "2 http.port: 70000: input should be less than"),
        ("http: 8080", "1 http: fields are expected here, not 8080"),
        ("cluster_name: 7", "1 cluster_name: text is expected, not 7"),
        ("cluster_name:", "1 cluster_name: text is expected, not nothing"),
        ("models: {default: [a, a]}", "1 models.default: 'a' is listed twice"),
        ("limits: {drain_timeout_s: .inf}", "1 limits.drain_timeout_s: .inf is not a number"),
        ("limits:\n  max_body: 3 parsecs", "2 limits.max_body: '3 parsecs' is not a size"),
        ("a: 1\na: 2", "2 a: written twice, first in line 1"),
        ("a: [1\nb: 2", "2: not valid YAML"),
        ("- a", "1: fields are expected"),
        ("just text", "1: fields are expected"),
        ("a: &x [1]\nb: *x", "2: aliases"),
        ("a: !!python/object:os.system x", "1 a: 'x' is read as"),
        ("cluster_name: 2026-01-01", "1 cluster_name: '2026-01-01' is read as"),
        ("a: " + "[" * 3000, "1: nested more than 20 deep"),
        ("a: " + "9" * 5000, "1: not valid YAML"),
        ("limits: {max_body: " + "9" * 4000 + "MB}", "1 limits.max_body"),
        ("a: \x00", "1"),
    ],
)
def test_an_error_names_file_line_and_field(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(f"config.yaml:{problem}"), str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read("cluster_name: ''\nhttp:\n  port: x\nlog:\n  level: loud\n")
    assert [p.split(":")[1] for p in caught.value.problems] == [
        "1 cluster_name",
        "3 http.port",
        "5 log.level",
    ]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"cluster_name: \xe9\n")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load(tmp_path / "latin.yaml")


@given(st.integers(1, 1000), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes_mean_what_their_unit_says(number: int, unit: str, space: str) -> None:
    size = number * UNITS[unit]
    text = f"devices:\n- hostname: a\n  max_memory: {number}{space}{unit}\n"
    if 64 * 2**20 <= size <= 2**50:
        assert read(text).devices[0].max_memory_bytes == size
    else:
        with pytest.raises(ConfigError, match="impossible"):
            read(text)


@given(st.text(max_size=200))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        read(text)
    except ConfigError as exc:
        problems = exc.problems
    else:
        problems = ()
    assert all(problem.startswith("config.yaml:") for problem in problems)
