"""Paged decode attention in float64 NumPy: the oracle, one plain loop over the sequences."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float, Int

from ..kv_pages import KVPages
from ..ragged.reference import Float64, attend, read_cache, slots_of


def paged_decode_attention(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[Float64, Float64]:
    """As `vsurge.kernels.paged_decode_attention`, outside jit only."""
    all_queries = np.asarray(queries, np.float64)
    keys, values = read_cache(kv_pages)
    lengths, table = np.asarray(kv_lens, np.int64), np.asarray(page_table, np.int64)
    output = np.zeros_like(all_queries)
    log_sum_exp = np.full(all_queries.shape[:3], -np.inf)
    for sequence, kv_len in enumerate(lengths.tolist()):
        if kv_len == 0:
            continue
        slots = slots_of(table[sequence], kv_len, kv_pages.page_size)
        tokens = sequence, slice(max(0, all_queries.shape[1] - kv_len), None)  # at positions from 0 on
        output[tokens], log_sum_exp[tokens] = attend(
            all_queries[tokens],
            keys[slots],
            values[slots],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=None if sinks is None else np.asarray(sinks, np.float64),
        )
    return output, log_sum_exp
