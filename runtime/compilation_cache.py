# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""jax's persistent cache of compiled programs, in a folder of the engine's choice."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

# jax has one such cache for the whole process, so no two engines may set it at a time.
_lock = threading.Lock()


@contextmanager
def compilation_cache(folder: Path | None) -> Generator[None, None, None]:
    """What is compiled within is read from a folder, or kept there; afterwards jax's settings are as before.

    What other threads of the process compile meanwhile goes there too.

    Args:
        folder: made if it does not exist; None leaves jax's own setting (`jax_compilation_cache_dir`) alone.

    Raises:
        OSError: the folder cannot be made.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        "jax_enable_compilation_cache": True,
        # By default only what took a second to compile is kept.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with _lock:
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            _set(settings)
            yield
        finally:
            _set(before)


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # it opens a folder once, and then looks at the setting no more
