"""Paged decode attention, interim."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages
from ..ragged.xla import ragged_paged_attention


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"))
def paged_decode_attention(queries, kv_pages, kv_lens, page_table, *, scale, sliding_window, soft_cap, sinks):
    starts = jnp.arange(queries.shape[0] + 1, dtype=jnp.int32)
    return ragged_paged_attention(
        queries,
        kv_pages,
        kv_lens,
        page_table,
        starts,
        jnp.asarray([queries.shape[0]], jnp.int32),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
