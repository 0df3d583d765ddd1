# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The cache write in plain XLA: one scatter of rows, in place because the cache is donated.

Inside a caller's own jit it is the caller's donation that counts.
"""

from __future__ import annotations

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages, write_rows


@partial(jax.jit, donate_argnums=0)
def append_kv(
    kv_pages: KVPages,
    keys: Float[Array, "num_tokens num_kv_heads head_dim"],
    values: Float[Array, "num_tokens num_kv_heads head_dim"],
    slots: Int[Array, " num_tokens"],
) -> KVPages:
    """As `vsurge.kernels.append_kv`."""
    return write_rows(kv_pages, keys, values, slots)
