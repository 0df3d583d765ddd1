# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Paged decode attention in plain XLA: groups of sequences of similar length walk their pages in lockstep.

A block of one sequence is too little work to keep several cores busy, and a batch of all sequences would walk
as far as the longest: the sequences are sorted by length and taken four at a time, and the order is undone at
the end.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..blockwise import attend_pages
from ..kv_pages import KVPages

GROUP_SIZE = 4  # sequences in lockstep; measured, as is the next
BLOCK_TOKENS = 128


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"))
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
) -> tuple[
    Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    Float[Array, "num_seqs num_queries num_q_heads"],
]:
    """As `vsurge.kernels.paged_decode_attention`; output and log-sum-exp in float32."""
    num_seqs, num_queries = queries.shape[:2]
    if num_seqs == 0:
        return jnp.zeros(queries.shape, jnp.float32), jnp.zeros(queries.shape[:3], jnp.float32)
    group_size = min(GROUP_SIZE, num_seqs)
    num_groups = -(-num_seqs // group_size)
    spare = num_groups * group_size - num_seqs

    order = jnp.argsort(kv_lens)

    def grouped(array: Array, fill: int) -> Array:
        """[num_seqs, ...] -> [num_groups, group_size, ...], by length, spare rows first."""
        padding = ((spare, 0), *((0, 0) for _ in array.shape[1:]))
        padded = jnp.pad(array[order], padding, constant_values=fill)
        return padded.reshape(num_groups, group_size, *array.shape[1:])

    group_queries, group_tables = grouped(queries, 0), grouped(page_table, 0)
    before_end = jnp.arange(-num_queries, 0, dtype=jnp.int32)
    group_positions = grouped(kv_lens[:, None] + before_end[None], -1)

    def attend_group(group: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        output, log_sum_exp = attend_pages(
            group_queries[group],
            group_positions[group],
            kv_pages,
            group_tables[group],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            block_tokens=BLOCK_TOKENS,
        )
        start = group * group_size
        return (
            lax.dynamic_update_slice_in_dim(results[0], output, start, axis=0),
            lax.dynamic_update_slice_in_dim(results[1], log_sum_exp, start, axis=0),
        )

    padded_seqs = num_groups * group_size
    results = (
        jnp.zeros((padded_seqs, *queries.shape[1:]), jnp.float32),
        jnp.zeros((padded_seqs, *queries.shape[1:3]), jnp.float32),
    )
    output, log_sum_exp = cast("tuple[Array, Array]", lax.fori_loop(0, num_groups, attend_group, results))
    place = spare + jnp.argsort(order)
    return output[place], log_sum_exp[place]
