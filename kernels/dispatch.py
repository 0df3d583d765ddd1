"""Which implementation of a kernel runs."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from typing import Literal

import jax

Implementation = Literal["mosaic_tpu", "triton", "xla", "reference"]

# The best implementation for a platform, of the kernels that have it. "triton" has not been run on a GPU yet:
# who wants it asks for it.
PREFERRED: dict[str, Implementation] = {"cpu": "xla", "tpu": "mosaic_tpu"}

logger = logging.getLogger("vsurge.kernels")


def choose_implementation(
    kernel: str, implementation: Implementation | None, available: Collection[Implementation]
) -> Implementation:
    """`implementation`, or for None the best one for JAX's default backend.

    Args:
        kernel: its public name.
        implementation: what the caller asked for.
        available: the implementations that this kernel has.

    Raises:
        ValueError: the kernel has no such implementation.
    """
    if implementation is None:
        platform = jax.default_backend()
        preferred = PREFERRED.get(platform)
        if preferred is not None and preferred in available:
            return preferred
        _log_fallback_once(kernel, platform)
        return "xla"
    if implementation not in available:
        raise ValueError(
            f"implementation={implementation!r}: {kernel} has {', '.join(map(repr, available))}; "
            "None chooses one of them"
        )
    return implementation


@cache
def _log_fallback_once(kernel: str, platform: str) -> None:
    logger.warning("%s: no kernel is chosen on %r by itself yet, falling back to 'xla'", kernel, platform)
