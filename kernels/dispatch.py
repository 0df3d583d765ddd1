"""Which implementation of a kernel runs."""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache
from typing import Literal

import jax

from .block_sizes import Key, tuned_implementation

Implementation = Literal["mosaic_tpu", "triton", "xla", "reference"]

# The best implementation for a platform, of the kernels that have it. For a GPU the tables say which was the
# fastest. None is committed, as Triton's kernels have not been timed yet: `vsurge tune` does it.
PREFERRED: dict[str, Implementation] = {"cpu": "xla", "tpu": "mosaic_tpu"}

logger = logging.getLogger("vsurge.kernels")


def choose_implementation(
    kernel: str,
    implementation: Implementation | None,
    available: Collection[Implementation],
    *,
    tuned: tuple[Key, int] | None = None,
    refused: str | None = None,
) -> Implementation:
    """`implementation`, or for None the best one for JAX's default backend.

    Args:
        kernel: its public name.
        implementation: what the caller asked for.
        available: the implementations that this kernel has.
        tuned: the call's key in the tables and the tokens of the longest sequence that it has room for; None
            for a kernel that they do not have.
        refused: why a GPU's kernels cannot have the call, which is logged if they would be chosen; else None.

    Raises:
        ValueError: the kernel has no such implementation, or a table's file is corrupt.
    """
    if implementation is None:
        platform = jax.default_backend()
        preferred = PREFERRED.get(platform)
        if preferred is not None and preferred in available:
            return preferred
        if platform == "gpu" and tuned is not None:
            chosen = tuned_implementation(*tuned) or "xla"
            if chosen == "triton" and refused is not None:
                _log_refusal_once(kernel, refused)
                return "xla"
            return chosen
        if platform != "gpu":  # there it is no fallback: XLA scatters rows in place
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


@cache
def _log_refusal_once(kernel: str, refused: str) -> None:
    logger.warning("%s: 'xla' in the place of 'triton': %s", kernel, refused)
