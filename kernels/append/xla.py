"""The cache write as one XLA scatter.

One scatter of rows for keys and values together. On a CPU its cost is the rows' bytes only because the cache
holds integers there (see kv_pages); everywhere it is in place only if the cache is donated.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages, encode_bits


@partial(jax.jit, donate_argnums=0)
def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`."""
    rows = encode_bits(kv_pages, jnp.stack([keys, values], axis=1))  # [num_tokens, 2, num_kv_heads, head_dim]
    page = jnp.where(slots < 0, kv_pages.num_pages, slots // kv_pages.page_size)  # out of range: dropped
    offset = slots % kv_pages.page_size
    data = kv_pages.data.at[page, :, :, offset].set(rows, mode="drop")
    return KVPages(data, kv_pages.scales, kv_pages.dtype, kv_pages.page_size)
