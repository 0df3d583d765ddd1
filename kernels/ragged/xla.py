# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Ragged paged attention in plain XLA: one block of one sequence's queries after the other.

A query block walks its own sequence's pages, up to the last position that it sees, and its rows are written
to the result. The blocks of all sequences are numbered through, so that one loop with as many trips as there
are blocks serves any mix of lengths. There are two such loops, over large blocks and over small ones: what is
left of a sequence after its large blocks, or all of a short one, would leave most of a large block empty.
Sequences with a single new token are decoded together.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..blockwise import attend_pages
from ..decode.xla import paged_decode_attention
from ..kv_pages import KVPages

QUERY_BLOCK = 128  # tokens; measured, as are the next four
SMALL_QUERY_BLOCK = 32  # or half of a step that has fewer than 64 tokens
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
    large = max(1, min(QUERY_BLOCK, num_tokens))
    small = min(SMALL_QUERY_BLOCK, max(1, large // 2))
    in_use = jnp.arange(max_seqs, dtype=jnp.int32) < num_seqs
    new_tokens = jnp.where(in_use, query_starts[1:] - query_starts[:-1], 0)
    decodes = new_tokens == 1
    new_tokens = jnp.where(decodes, 0, new_tokens)
    # Two small blocks take as long as a large one: what fills more of it than they would gets a large one.
    num_large = (new_tokens + (large - 1) // 2) // large
    in_large = jnp.minimum(num_large * large, new_tokens)
    padded_queries = jnp.pad(queries, ((0, large), (0, 0), (0, 0)))  # the last block may reach beyond
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
        "sinks": sinks,
    }

    def attend_blocks(
        results: tuple[Array, Array],
        size: int,
        wide_blocks: int,
        first: Int[Array, " max_seqs"],
        end: Int[Array, " max_seqs"],
    ) -> tuple[Array, Array]:
        """The results with those of each sequence's new tokens from number `first` to `end`."""
        blocks_until = jnp.cumsum((end - first + size - 1) // size)  # this sequence's blocks included

        def attend_block(block: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
            sequence = jnp.sum(blocks_until <= block)
            blocks_before = jnp.where(sequence > 0, blocks_until[sequence - 1], 0)
            offset = first[sequence] + (block - blocks_before) * size  # within the sequence's new tokens
            start = query_starts[sequence] + offset
            kv_len = kv_lens[sequence]
            positions = kv_len - new_tokens[sequence] + offset + jnp.arange(size, dtype=jnp.int32)
            found = attend_pages(
                lax.dynamic_slice_in_dim(padded_queries, start, size)[None],
                jnp.minimum(positions, kv_len - 1)[None],
                kv_pages,
                page_table[sequence][None],
                block_tokens=BLOCK_TOKENS,
                wide_blocks=wide_blocks,
                **options,
            )
            count = end[sequence] - offset
            return (
                _put(results[0], found[0][0], start, count),
                _put(results[1], found[1][0], start, count),
            )

        return cast("tuple[Array, Array]", lax.fori_loop(0, blocks_until[-1], attend_block, results))

    # What is there at first is replaced. Not zeros: XLA would make one array of zeros for all layers of a
    # model and copy it for each before the first layer runs, and hold all of that memory.
    results = (
        padded_queries.astype(jnp.float32),
        jnp.full((num_tokens + large, num_q_heads), -jnp.inf, jnp.float32),
    )
    wide_blocks = WIDE_BLOCKS if large == QUERY_BLOCK else WIDE_BLOCKS_OF_FEW
    results = attend_blocks(results, large, wide_blocks, jnp.zeros_like(in_large), in_large)
    if small < large:  # not where there is a single token
        results = attend_blocks(results, small, 1, in_large, new_tokens)
    output, log_sum_exp = results
    row = jnp.minimum(query_starts[:-1], num_tokens - 1)
    decoded = cast(
        "tuple[Array, Array]",
        paged_decode_attention(
            queries[row][:, None], kv_pages, jnp.where(decodes, kv_lens, 0), page_table, **options
        ),
    )
    row = jnp.where(decodes, row, num_tokens + large)  # outside: the others' are dropped
    output = output.at[row].set(decoded[0][:, 0], mode="drop")
    log_sum_exp = log_sum_exp.at[row].set(decoded[1][:, 0], mode="drop")
    return output[:num_tokens], log_sum_exp[:num_tokens]


def _put(
    result: Float[Array, "num_tokens ..."],
    rows: Float[Array, "size ..."],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> Float[Array, "num_tokens ..."]:
    """The result with the first `count` of some rows at `start`; what lies beyond is another block's."""
    before = lax.dynamic_slice_in_dim(result, start, rows.shape[0])
    is_ours = jnp.arange(rows.shape[0], dtype=jnp.int32) < count
    is_ours = is_ours.reshape(-1, *(1 for _ in rows.shape[1:]))
    return lax.dynamic_update_slice_in_dim(result, jnp.where(is_ours, rows, before), start, axis=0)
