"""Putting a fault into a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Patch = pytest.MonkeyPatch


def changed(patch: Patch, place: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a function f of a module or class by one that calls change(f, ...)."""
    original = getattr(place, name)
    patch.setattr(place, name, lambda *args, **options: change(original, *args, **options))


def named(
    kernel: str,
    check: Callable[[], None],
    faults: dict[str, Callable[[Patch], None]],
    sample: set[str] | None = None,
) -> list[Any]:
    """A case for each fault; of those in `sample` alone (None: of all) in a run without the slow tests."""
    return [
        pytest.param(
            check,
            fault,
            id=f"{kernel}-{name}",
            marks=() if sample is None or name in sample else pytest.mark.slow,
        )
        for name, fault in faults.items()
    ]
