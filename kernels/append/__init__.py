"""Writing the keys and values of new tokens into the paged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import Implementation, choose_implementation
from ..kv_pages import KVPages
from ..slots import check_written_when_run
from ..validation import check_rows
from . import reference, xla

__all__ = ["append_kv"]


def _mosaic_tpu(*arguments: Any, **options: Any) -> KVPages:
    from . import mosaic_tpu  # importing Pallas takes longer than all else here

    return cast(KVPages, mosaic_tpu.append_kv(*arguments, **options))


def _triton(*arguments: Any, **options: Any) -> KVPages:
    from . import triton

    return cast(KVPages, triton.append_kv(*arguments, **options))


IMPLEMENTATIONS: dict[Implementation, Callable[..., KVPages]] = {
    "mosaic_tpu": _mosaic_tpu,
    "triton": _triton,
    "xla": xla.append_kv,
    "reference": reference.append_kv,
}


def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
    *,
    implementation: Implementation | None = None,
    debug: bool = False,
) -> KVPages:
    """Writes one row of keys and values per token, in place: `kv_pages` is donated.

    Args:
        kv_pages: one layer's cache; not to be used after the call.
        keys: [num_tokens, num_kv_heads, head_dim], bfloat16 or float32, cast to the cache's dtype.
        values: like `keys`.
        slots: [num_tokens] int32, `page * page_size + offset`; slots outside the pool are skipped, negative
            ones mark padding. Two tokens may not share a slot.
        implementation: "xla", "mosaic_tpu", "triton" or "reference"; None for the best one.
        debug: also check that slots lie in the pool (or are negative) and differ (slow: a round trip to the
            host).

    Returns:
        The cache with the rows written.

    Raises:
        ValueError: shapes that do not belong together, a dtype that is not allowed, more heads than a
            TPU's memory has room for, or no such implementation; the message names the argument.
    """
    if slots.ndim != 1 or slots.dtype != jnp.int32:
        raise ValueError(f"slots: {slots.dtype}{list(slots.shape)}, expected int32[num_tokens]")
    num_tokens = slots.shape[0]
    expected = (num_tokens, kv_pages.num_kv_heads, kv_pages.head_dim)
    for name, rows in (("keys", keys), ("values", values)):
        check_rows(name, rows, expected)
    if debug:
        check_written_when_run(kv_pages, slots)
    append = IMPLEMENTATIONS[choose_implementation("append_kv", implementation, IMPLEMENTATIONS)]
    return append(kv_pages, keys, values, slots)
