# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write, one row at a time in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages


def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`, but on a copy; outside jit only."""
    data = np.array(kv_pages.data)
    stored_as = data.dtype
    if stored_as != kv_pages.dtype:
        data = data.view(kv_pages.dtype)
    key_rows, value_rows = np.asarray(keys).astype(data.dtype), np.asarray(values).astype(data.dtype)
    for token, slot in enumerate(np.asarray(slots).tolist()):
        if 0 <= slot < kv_pages.num_pages * kv_pages.page_size:
            page, offset = divmod(slot, kv_pages.page_size)
            data[page, 0, :, offset] = key_rows[token]
            data[page, 1, :, offset] = value_rows[token]
    stored = jnp.asarray(data.view(stored_as))
    return KVPages(jax.device_put(stored), kv_pages.scales, kv_pages.dtype, kv_pages.page_size)
