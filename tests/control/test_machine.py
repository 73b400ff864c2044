"""What a machine has: limits of control groups of both versions, and the term others read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.etf import decode, encode
from control.machine import (
    CgroupMemory,
    Device,
    Limits,
    Machine,
    cgroup_memory,
    differs,
    machine_of,
    read_machine,
)

MACHINE = Machine(
    total_bytes=6400,
    available_bytes=3200,
    limit_bytes=6000,
    cores=4,
    devices=(Device("cpu", "a cpu", 6400), Device("cuda", "a gpü", 80)),
    has_mlx=True,
)


def group(folder: Path, limit: str, used: int, *, version: int = 2, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_tightest_group_above_us_counts(tmp_path: Path) -> None:
    root, of = tmp_path / "cgroup", tmp_path / "of"
    of.write_text("0::/a/b\n")
    group(root / "a", "1000", 400)
    group(root / "a" / "b", "max", 10)
    assert cgroup_memory(root, of) == CgroupMemory(1000, 400)
    group(root / "a" / "b", "500", 10)
    assert cgroup_memory(root, of) == CgroupMemory(500, 10)


def test_version_1_has_its_own_files_and_a_number_for_none(tmp_path: Path) -> None:
    root, of = tmp_path / "cgroup", tmp_path / "of"
    of.write_text("9:name=systemd:/x\n4:cpu,memory:/a\n")
    group(root / "memory" / "a", str(2**63 - 4096), 5, version=1)
    assert cgroup_memory(root, of) is None
    stat = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20\n"
    group(root / "memory" / "a", "900", 100, version=1, stat=stat)
    assert cgroup_memory(root, of) == CgroupMemory(900, 50)


def test_a_container_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    root, of = tmp_path / "cgroup", tmp_path / "of"
    of.write_text("0::/docker/4711\n")
    group(root, "2000", 900, stat="inactive_file 200\nactive_file 100\n")
    assert cgroup_memory(root, of) == CgroupMemory(2000, 600)


@pytest.mark.parametrize("text", ["", "nonsense", "0::/../../etc"])
def test_without_groups_there_is_no_limit(tmp_path: Path, text: str) -> None:
    of = tmp_path / "of"
    of.write_text(text)
    assert cgroup_memory(tmp_path / "cgroup", of) is None
    assert cgroup_memory(tmp_path, tmp_path / "absent") is None


def test_the_configuration_lends_less() -> None:
    whole = read_machine(Limits())
    lent = read_machine(Limits(max_memory_bytes=2**26, max_cores=1, gpu=False))
    assert (lent.limit_bytes, lent.cores) == (2**26, 1)
    assert lent.total_bytes == whole.total_bytes >= whole.available_bytes > 0
    assert {device.kind for device in lent.devices} == {"cpu"}


def test_a_machine_passes_the_wire() -> None:
    assert machine_of(decode(encode(MACHINE.to_term()))) == MACHINE


@given(st.integers(0, 6400))
def test_others_hear_of_memory_that_moved_by_a_64th(available_bytes: int) -> None:
    other = replace(MACHINE, available_bytes=available_bytes)
    assert differs(MACHINE, other) == (abs(available_bytes - 3200) >= 100)


def test_others_hear_of_every_other_change() -> None:
    assert differs(MACHINE, replace(MACHINE, cores=5))
    assert differs(MACHINE, replace(MACHINE, devices=MACHINE.devices[:1]))
