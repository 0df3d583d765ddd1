# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention in plain XLA: one block of one sequence's queries after the other.

A query block walks its own sequence's pages, up to the last position that it sees, and its rows are written
to the result. The blocks of all sequences are numbered through, so that one loop with as many trips as there
are blocks serves any mix of lengths. Sequences with a single new token, of which a block would be mostly
empty, are decoded together.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..blockwise import attend_pages
from ..decode.xla import paged_decode_attention
from ..kv_pages import KVPages

QUERY_BLOCK = 128  # tokens; measured, as are the next three
BLOCK_TOKENS = 128
WIDE_BLOCKS = 4
WIDE_BLOCKS_OF_FEW = 8  # of fewer queries than QUERY_BLOCK, whose products are small


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"))
def ragged_paged_attention(
    queries: Float[Array, "num_tokens num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " max_seqs"],
    page_table: Int[Array, "max_seqs pages_per_seq"],
    query_starts: Int[Array, " max_seqs+1"],
    num_seqs: Int[Array, " 1"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
) -> tuple[Float[Array, "num_tokens num_q_heads head_dim"], Float[Array, "num_tokens num_q_heads"]]:
    """As `vsurge.kernels.ragged_paged_attention`; output and log-sum-exp in float32."""
    num_tokens, num_q_heads, _ = queries.shape
    max_seqs = kv_lens.shape[0]
    query_block = max(1, min(QUERY_BLOCK, num_tokens))
    in_use = jnp.arange(max_seqs, dtype=jnp.int32) < num_seqs
    new_tokens = jnp.where(in_use, query_starts[1:] - query_starts[:-1], 0)
    decodes = new_tokens == 1
    new_tokens = jnp.where(decodes, 0, new_tokens)
    blocks_until = jnp.cumsum(
        (new_tokens + query_block - 1) // query_block
    )  # this sequence's blocks included
    padded_queries = jnp.pad(queries, ((0, query_block), (0, 0), (0, 0)))  # the last block may reach beyond

    def attend_block(block: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        sequence = jnp.sum(blocks_until <= block)
        blocks_before = jnp.where(sequence > 0, blocks_until[sequence - 1], 0)
        offset = (block - blocks_before) * query_block  # of the block within the sequence's new tokens
        start = query_starts[sequence] + offset
        kv_len = kv_lens[sequence]
        positions = kv_len - new_tokens[sequence] + offset + jnp.arange(query_block, dtype=jnp.int32)
        output, log_sum_exp = attend_pages(
            lax.dynamic_slice_in_dim(padded_queries, start, query_block)[None],
            jnp.minimum(positions, kv_len - 1)[None],
            kv_pages,
            page_table[sequence][None],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            block_tokens=BLOCK_TOKENS,
            wide_blocks=WIDE_BLOCKS if query_block == QUERY_BLOCK else WIDE_BLOCKS_OF_FEW,
        )
        # Rows beyond the sequence's end fall on the next one, whose own blocks come later and replace them.
        return (
            lax.dynamic_update_slice_in_dim(results[0], output[0], start, axis=0),
            lax.dynamic_update_slice_in_dim(results[1], log_sum_exp[0], start, axis=0),
        )

    # What is there at first is replaced. Not zeros: XLA would make one array of zeros for all layers of a
    # model and copy it for each before the first layer runs, and hold all of that memory.
    results = (
        padded_queries.astype(jnp.float32),
        jnp.full((num_tokens + query_block, num_q_heads), -jnp.inf, jnp.float32),
    )
    output, log_sum_exp = cast(
        "tuple[Array, Array]", lax.fori_loop(0, blocks_until[-1], attend_block, results)
    )
    row = jnp.minimum(query_starts[:-1], num_tokens - 1)
    options = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks}
    decoded = cast(
        "tuple[Array, Array]",
        paged_decode_attention(
            queries[row][:, None], kv_pages, jnp.where(decodes, kv_lens, 0), page_table, **options
        ),
    )
    row = jnp.where(decodes, row, num_tokens + query_block)  # outside: the others' are dropped
    output = output.at[row].set(decoded[0][:, 0], mode="drop")
    log_sum_exp = log_sum_exp.at[row].set(decoded[1][:, 0], mode="drop")
    return output[:num_tokens], log_sum_exp[:num_tokens]
