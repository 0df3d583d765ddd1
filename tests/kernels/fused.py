"""Attention that also writes the cache, held against a cache that was written before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vsurge.kernels import Implementation, KVPages, append_kv, paged_decode_attention, read_kv
from vsurge.kernels.decode import reference

from .batches import Setup, decode_batch
from .cases import TOLERANCES, assert_lse_close, assert_rows_close


def new_slots(kv_lens: Sequence[int], table: Any, num_queries: int, page_size: int) -> np.ndarray:
    """[num_seqs, num_queries], where the page table has each sequence's last tokens; -1 before its begin."""
    positions = np.asarray(kv_lens)[:, None] - num_queries + np.arange(num_queries)
    pages = np.take_along_axis(np.asarray(table), np.maximum(positions, 0) // page_size, axis=1)
    return np.where(positions < 0, -1, pages * page_size + positions % page_size)


def without(kv_pages: KVPages, slots: Any) -> tuple[KVPages, tuple[jax.Array, jax.Array]]:
    """The cache with NaN at `slots` of any shape, and the keys and values that stood there."""
    flat = jnp.asarray(slots, jnp.int32).reshape(-1)
    keys, values = read_kv(kv_pages, jnp.maximum(flat, 0))
    nothing = jnp.full_like(keys, jnp.nan)
    emptied = append_kv(kv_pages, nothing, nothing, flat, implementation="reference")
    new = (rows.reshape(*np.shape(slots), *rows.shape[1:]) for rows in (keys, values))
    return emptied, tuple(new)  # pyright: ignore[reportReturnType]


def check_fused(
    setup: Setup,
    kv_lens: Sequence[int],
    implementation: Implementation,
    *,
    num_queries: int | None = None,
    in_cache: Sequence[int] = (),
    sinks: jax.Array | None = None,
    sliding_window: int | None = None,
    **blocks: Any,
) -> None:
    """Fails unless output, log-sum-exp and cache are as with a cache that has the new tokens.

    The new tokens of the sequences `in_cache` are in the cache, those of all others are to be written.
    """
    batch = decode_batch(setup, kv_lens, num_queries=num_queries, share=False)
    queries, full, *metadata = batch.arguments
    slots = new_slots(kv_lens, metadata[1], num_queries or 1, setup.page_size)
    slots[list(in_cache)] = -1
    slots = slots if num_queries else slots[:, 0]
    emptied, new_kv = without(full, slots)
    options: dict[str, Any] = {"scale": setup.scale, "sinks": sinks, "sliding_window": sliding_window}
    output, log_sum_exp, written = paged_decode_attention(
        queries,
        emptied,
        *metadata,
        **options,
        **blocks,
        return_lse=True,
        implementation=implementation,
        new_kv=new_kv,
        slots=jnp.asarray(slots, jnp.int32),
        debug=True,
    )
    by_query = queries if num_queries else queries[:, None]
    want = reference.paged_decode_attention(by_query, full, *metadata, **options, soft_cap=None)
    assert_rows_close(output, want[0].reshape(output.shape), TOLERANCES[setup.query_dtype])
    assert_lse_close(log_sum_exp, want[1].reshape(log_sum_exp.shape))
    np.testing.assert_array_equal(written.data, full.data)
