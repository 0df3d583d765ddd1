"""How much memory a process on this machine can still get."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """What Linux says can be allocated without swapping; None on other systems.

    The least of what the machine has left (MemAvailable) and what the limits of the process's control groups,
    a container's for one, leave of it. Of limits, those of the second version of control groups are known.
    """
    left = [machine_available(), *groups_available()]
    return min((size for size in left if size is not None), default=None)


def machine_available() -> int | None:
    """MemAvailable, in bytes; None without Linux."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024  # "kB" there means 1024 bytes
    return None  # a kernel older than 3.14


def groups_available() -> list[int]:
    """What each limit on the process's control group and those around it leaves, in bytes.

    The group's file cache that is not in use counts as free, as it does in MemAvailable.
    """
    try:
        lines = OWN_GROUP.read_text().splitlines()
    except FileNotFoundError:
        return []
    own = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]  # the second version's
    left: list[int] = []
    for name in own:
        group = GROUPS / name
        for folder in (group, *group.parents):
            if folder.is_relative_to(GROUPS) and (folder / "memory.max").exists():
                limit = (folder / "memory.max").read_text().strip()
                if limit != "max":
                    used = int((folder / "memory.current").read_text())
                    left.append(max(0, int(limit) - used + _unused_file_cache(folder)))
    return left


def _unused_file_cache(folder: Path) -> int:
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0
