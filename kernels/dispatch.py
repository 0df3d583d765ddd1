"""Which implementation of a kernel runs."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, get_args

import jax

Implementation = Literal["mosaic_tpu", "mosaic_gpu", "triton", "xla", "reference"]
AVAILABLE: tuple[Implementation, ...] = ("xla", "reference")

logger = logging.getLogger("vsurge.kernels")


def choose_implementation(kernel: str, implementation: Implementation | None) -> Implementation:
    """`implementation`, or for None the best one for JAX's default backend.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: an implementation that this kernel does not have yet.
    """
    if implementation is None:
        platform = jax.default_backend()
        if platform != "cpu":
            _log_fallback_once(kernel, platform)
        return "xla"
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r}: must be one of {get_args(Implementation)} or None"
        )
    if implementation not in AVAILABLE:
        raise NotImplementedError(
            f"implementation={implementation!r} of {kernel} is not there yet; available: {AVAILABLE}"
        )
    return implementation


@cache
def _log_fallback_once(kernel: str, platform: str) -> None:
    logger.warning("%s: no kernel written for %r yet, falling back to 'xla'", kernel, platform)
