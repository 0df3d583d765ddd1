"""What a process can still get is the least of what the machine and the control groups around it leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsurge.runtime import host_memory

KIB = 1024


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """1000 KiB left on the machine; the process in the group outer/inner, neither of which has a limit."""
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 1000 kB\n")
    (tmp_path / "own").write_text("4:memory:/old\n0::/outer/inner\n")
    for folder in (tmp_path / "groups" / "outer", tmp_path / "groups" / "outer" / "inner"):
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text("max\n")
        (folder / "memory.current").write_text(f"{300 * KIB}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {100 * KIB}\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def test_without_limits_it_is_what_the_machine_has_left(machine: Path) -> None:
    assert host_memory.available_bytes() == 1000 * KIB


@pytest.mark.parametrize("group", ["outer", "outer/inner"])
def test_a_limit_leaves_what_is_not_used_and_the_file_cache_that_is_not_in_use(
    machine: Path, group: str
) -> None:
    (machine / group / "memory.max").write_text(f"{500 * KIB}\n")
    assert host_memory.available_bytes() == (500 - 300 + 100) * KIB
    (machine / group / "memory.max").write_text(f"{150 * KIB}\n")
    assert host_memory.available_bytes() == 0
    (machine / group / "memory.max").write_text(f"{5000 * KIB}\n")
    assert host_memory.available_bytes() == 1000 * KIB


def test_other_systems_do_not_say(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MEMINFO", machine / "none")
    monkeypatch.setattr(host_memory, "OWN_GROUP", machine / "none")
    assert host_memory.available_bytes() is None
