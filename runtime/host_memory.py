"""How much memory a process on this machine can still get."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """What Linux says can be allocated without swapping (MemAvailable); None on other systems.

    A container's own limit is not in it.
    """
    try:
        lines = MEMINFO.read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.removesuffix("kB")) * 1024  # "kB" there means 1024 bytes
    return None  # a kernel older than 3.14
