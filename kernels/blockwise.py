# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Attention of a few queries over their sequences' pages, block by block, in plain XLA.

What moves when: a block, some pages of keys and then of values of every sequence in the batch, is copied out
of the cache; the running softmax is updated with it; then comes the next block. Nothing is kept but a
maximum, a sum and a weighted sum per query. The sequences of a batch advance in lockstep, each through its
own blocks, until the one with the most blocks is done: what is copied follows the lengths, not the page
table's width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

from .kv_pages import KEYS, VALUES, KVPages, load_block, load_scales, pages_per_block

MASKED = -1e30  # the score of a key that is not seen; finite, so that a row that sees nothing yields no NaN
LOG2_E = math.log2(math.e)
FLOAT32 = np.dtype(np.float32)


class Softmax(NamedTuple):
    """An online softmax (arXiv 1805.02867) over the keys seen so far, all float32.

    Attributes:
        highest: [batch, num_kv_heads, rows], the largest score.
        total: [batch, num_kv_heads, rows], the sum of `exp(score - highest)`.
        weighted: [batch, num_kv_heads, rows, head_dim], the sum of `exp(score - highest) * value`.
    """

    highest: Array
    total: Array
    weighted: Array


def update(
    softmax: Softmax,
    queries: Num[Array, "batch num_kv_heads rows head_dim"],
    keys: Num[Array, "batch num_kv_heads block head_dim"],
    values: Num[Array, "batch num_kv_heads block head_dim"],
    seen: Bool[Array, "batch rows block"] | None,
    scales: tuple[Float[Array, "batch num_kv_heads block"], Float[Array, "batch num_kv_heads block"]]
    | None = None,
    *,
    scale: float,
    soft_cap: float | None,
    dtype: np.dtype[Any],
) -> Softmax:
    """The softmax after one more block of keys and values.

    Args:
        dtype: of the factors of products.
        seen: which key each query row sees; None for all of them.
        scales: of quantized keys and values. They are folded into scores and weights.
    """
    scores = scale * _dot(queries.astype(dtype), keys.astype(dtype), contract=3)
    if scales is not None:
        scores *= scales[0][:, :, None]
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if seen is not None:
        scores = jnp.where(seen[:, None], scores, MASKED)
    highest = jnp.maximum(softmax.highest, scores.max(axis=-1))
    weights = jnp.exp(scores - highest[..., None])
    keep = jnp.exp(softmax.highest - highest)
    total = softmax.total * keep + weights.sum(axis=-1)
    if scales is not None:
        weights *= scales[1][:, :, None]
    return Softmax(
        highest=highest,
        total=total,
        weighted=softmax.weighted * keep[..., None]
        + _dot(weights.astype(dtype), values.astype(dtype), contract=2),
    )


def _dot(left: Array, right: Array, *, contract: int) -> Array:
    """Products in float32 of the last axis of `left` with axis `contract` of `right`, per batch and head."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((3,), (contract,)), ((0, 1), (0, 1)))
    return lax.dot_general(left, right, dimensions, precision, preferred_element_type=FLOAT32)


def product_dtype(queries: Array, kv_pages: KVPages) -> np.dtype[Any]:
    """Of the factors of products: bfloat16 if that holds queries and stored numbers, else float32."""
    both_fit = queries.dtype == jnp.bfloat16 and kv_pages.dtype != jnp.float32
    return np.dtype(jnp.bfloat16) if both_fit else FLOAT32


def attend_pages(
    queries: Float[Array, "batch tokens num_q_heads head_dim"],
    positions: Int[Array, "batch tokens"],
    kv_pages: KVPages,
    page_table: Int[Array, "batch pages_per_seq"],
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Float[Array, " num_q_heads"] | None,
    block_tokens: int,
    wide_blocks: int = 1,
) -> tuple[Float[Array, "batch tokens num_q_heads head_dim"], Float[Array, "batch tokens num_q_heads"]]:
    """Attention of some queries of each sequence of a batch.

    Products are of bfloat16 numbers if queries are bfloat16 and the cache is or has 8 bits, else of float32
    ones. On a CPU they always are: XLA has no batched bfloat16 product there and makes float32 of the factors
    itself, and of int8 ones bfloat16 before, each several times slower than this conversion (measured).

    Args:
        queries: [batch, tokens, num_q_heads, head_dim].
        positions: [batch, tokens] int32; a query sees the keys up to its own position, none if negative.
        kv_pages: one layer's cache.
        page_table: [batch, pages_per_seq] int32; entries beyond the largest position may hold anything.
        scale, sliding_window, soft_cap, sinks: as in `vsurge.kernels.ragged_paged_attention`.
        block_tokens: keys per sequence to visit at once; as many as make whole pages.
        wide_blocks: so many of these blocks at once, as long as every query of the batch sees all of them:
            larger products are faster, and need no masks. Not with a window, nor where the page table is
            too short for one.

    Returns:
        The output and its log-sum-exp, in float32; zero and -inf for a query that sees nothing.
    """
    batch, tokens, num_q_heads, _ = queries.shape
    num_kv_heads = kv_pages.num_kv_heads
    dtype = product_dtype(queries, kv_pages)
    block_pages = pages_per_block(
        kv_pages, batch, min(block_tokens, page_table.shape[1] * kv_pages.page_size)
    )
    block = block_pages * kv_pages.page_size

    rows = _rows_by_kv_head(queries, num_kv_heads)
    row_positions = jnp.repeat(positions, num_q_heads // num_kv_heads, axis=1)
    first, last = positions.min(axis=1), positions.max(axis=1)
    lowest = jnp.zeros_like(first) if sliding_window is None else jnp.maximum(first - sliding_window + 1, 0)
    first_block = lowest // block
    num_blocks = last // block + 1 - first_block

    def visit(at: Array, softmax: Softmax) -> Softmax:
        """Block number `at` of each sequence."""
        pages, kv_positions = place(at, 1)
        seen = kv_positions[:, None, :] <= row_positions[:, :, None]
        if sliding_window is not None:
            seen &= kv_positions[:, None, :] > row_positions[:, :, None] - sliding_window
        # A value that no query sees has weight 0, but 0 times what an unwritten row may hold is NaN.
        seen_by_any = (kv_positions <= last[:, None]) & (kv_positions >= lowest[:, None])
        return attend(pages, softmax, seen, seen_by_any)

    def visit_wide(step: Array, softmax: Softmax) -> Softmax:
        """The next `wide_blocks` blocks of each sequence, which all queries see."""
        pages, _ = place(step * wide_blocks, wide_blocks)
        return attend(pages, softmax, None, None)

    def place(at: Array, count: int) -> tuple[Array, Array]:
        """The pages of `count` blocks from number `at`, and the positions of their keys."""
        this_block = (first_block + at)[:, None]
        columns = this_block * block_pages + jnp.arange(count * block_pages, dtype=jnp.int32)[None]
        pages = jnp.take_along_axis(page_table, columns, axis=1, mode="clip")
        return pages, this_block * block + jnp.arange(count * block, dtype=jnp.int32)[None]

    def attend(pages: Array, softmax: Softmax, seen: Array | None, seen_by_any: Array | None) -> Softmax:
        keys = load_block(kv_pages, pages, KEYS)
        values = load_block(kv_pages, pages, VALUES, valid=seen_by_any)
        scales = None
        if kv_pages.scales is not None:
            scales = (
                load_scales(kv_pages, pages, KEYS),
                load_scales(kv_pages, pages, VALUES, valid=seen_by_any),
            )
        step = partial(update, scale=scale, soft_cap=soft_cap)
        on_cpu, elsewhere = partial(step, dtype=FLOAT32), partial(step, dtype=dtype)
        operands = softmax, rows, keys, values, seen, scales
        return cast(Softmax, lax.platform_dependent(*operands, cpu=on_cpu, default=elsewhere))

    softmax, at = _empty_softmax(rows, sinks), jnp.int32(0)
    is_long_enough = wide_blocks * block <= page_table.shape[1] * kv_pages.page_size
    if wide_blocks > 1 and sliding_window is None and is_long_enough:
        num_wide = (jnp.min(first) + 1) // (wide_blocks * block)
        softmax, at = cast(Softmax, lax.fori_loop(0, num_wide, visit_wide, softmax)), num_wide * wide_blocks
    softmax = cast(Softmax, lax.fori_loop(at, jnp.max(num_blocks), visit, softmax))
    sees_nothing = (row_positions < 0)[:, None]
    total = jnp.where(sees_nothing, 1.0, softmax.total)
    output = jnp.where(sees_nothing[..., None], 0.0, softmax.weighted / total[..., None])
    log_sum_exp = jnp.where(sees_nothing, -jnp.inf, softmax.highest + jnp.log(total))
    return _tokens_by_q_head(output, tokens, num_q_heads), _tokens_by_q_head(log_sum_exp, tokens, num_q_heads)


def _empty_softmax(rows: Array, sinks: Array | None) -> Softmax:
    """The softmax before the first key; a sink is a key seen by every query, without a value."""
    batch, num_kv_heads, num_rows, head_dim = rows.shape
    shape = (batch, num_kv_heads, num_rows)
    weighted = jnp.zeros((*shape, head_dim), jnp.float32)
    if sinks is None:
        return Softmax(jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), weighted)
    group = sinks.shape[0] // num_kv_heads
    of_row = sinks.astype(jnp.float32).reshape(num_kv_heads, group)[:, np.arange(num_rows) % group]
    return Softmax(jnp.broadcast_to(of_row[None], shape), jnp.ones(shape, jnp.float32), weighted)


def _rows_by_kv_head(queries: Array, num_kv_heads: int) -> Array:
    """[batch, tokens, num_q_heads, head_dim] -> [batch, num_kv_heads, rows, head_dim].

    A KV head's rows are its query heads of the first token, then those of the second, and so on.
    """
    batch, tokens, num_q_heads, head_dim = queries.shape
    group = num_q_heads // num_kv_heads
    rows = queries.reshape(batch, tokens, num_kv_heads, group, head_dim).swapaxes(1, 2)
    return rows.reshape(batch, num_kv_heads, tokens * group, head_dim)


def _tokens_by_q_head(rows: Array, tokens: int, num_q_heads: int) -> Array:
    """The inverse: [batch, num_kv_heads, rows, *rest] -> [batch, tokens, num_q_heads, *rest]."""
    batch, num_kv_heads, _, *rest = rows.shape
    group = num_q_heads // num_kv_heads
    by_token = rows.reshape(batch, num_kv_heads, tokens, group, *rest).swapaxes(1, 2)
    return by_token.reshape(batch, tokens, num_q_heads, *rest)
