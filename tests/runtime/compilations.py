"""Hears whatever jax compiles or traces in this process, the smallest helper programs too."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def heard() -> Generator[list[str], None, None]:
    """The names of the events, as they come."""
    events: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "compile" in event or "trace" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
