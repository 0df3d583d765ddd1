"""jax's persistent compilation cache, whose settings are those of the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@contextmanager
def cache_reset() -> Iterator[None]:
    """What is set within is undone afterwards."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
