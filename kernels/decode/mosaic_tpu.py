# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Paged decode attention on a TPU: the call of the kernel, whose body is in `kernel.py`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ..block_sizes import Key
from ..blockwise import LOG2_E, MASKED, product_dtype
from ..kv_pages import KVPages, encode
from ..tpu.fetcher import fetcher_scratch, vmem_bytes_per_row, vmem_bytes_per_token
from ..tpu.launch import check_pages, in_hbm, tpu_call, vmem_bytes
from ..tpu.shapes import LANES, padded
from ..tpu.streams import Products
from ..tpu.units import TABLE_TILE, Units, most_seqs
from .blocks import DecodeBlocks, tuned_or_default_blocks
from .kernel import Copied, Inputs, Outputs, kernel
from .new_rows import new_rows_bytes, new_rows_scratch
from .rows import by_kv_head, by_query, seq_bytes
from .softmax import Softmax, State
from .step import Attention


@partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes"))
def paged_decode_attention(
    queries: Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs num_queries num_q_heads head_dim"],
    Float[Array, "num_seqs num_queries num_q_heads"],
]:
    """As `vsurge.kernels.paged_decode_attention`, with the options of `_attend`."""
    output, log_sum_exp, _ = _attend(queries, kv_pages, kv_lens, page_table, None, **options)
    return output, log_sum_exp


@partial(
    jax.jit,
    static_argnames=("scale", "sliding_window", "soft_cap", "block_sizes"),
    donate_argnames="kv_pages",
)
def append_and_attend(
    queries: Float[Array, "num_seqs one num_q_heads head_dim"],
    kv_pages: KVPages,
    kv_lens: Int[Array, " num_seqs"],
    page_table: Int[Array, "num_seqs pages_per_seq"],
    keys: Float[Array, "num_seqs num_kv_heads head_dim"],
    values: Float[Array, "num_seqs num_kv_heads head_dim"],
    slots: Int[Array, " num_seqs"],
    **options: Any,
) -> tuple[
    Float[Array, "num_seqs one num_q_heads head_dim"],
    Float[Array, "num_seqs one num_q_heads"],
    KVPages,
]:
    """`paged_decode_attention` of one query per sequence that also writes the cache, see `NewRows`."""
    rows, _ = encode(kv_pages, jnp.stack([keys, values], axis=1))
    inside = slots < kv_pages.num_pages * kv_pages.page_size
    new = rows, jnp.where(inside, slots, -1)
    output, log_sum_exp, data = _attend(queries, kv_pages, kv_lens, page_table, new, **options)
    return output, log_sum_exp, replace(kv_pages, data=data)


def _attend(
    queries: Array,
    kv_pages: KVPages,
    kv_lens: Array,
    page_table: Array,
    new: tuple[Array, Array] | None,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Array | None,
    block_sizes: DecodeBlocks | None = None,
) -> tuple[Array, Array, Array]:
    """Runs the kernel.

    Args:
        new: the rows [num_seqs, 2, num_kv_heads, head_dim] as the cache stores them, and their slots
            [num_seqs], to be written as well.

    Returns:
        Output, log-sum-exp and the cache's data.

    Raises:
        ValueError: the pages hold no whole tiles, or the block sizes fit neither cache nor device.
    """
    num_seqs, num_queries, num_q_heads, head_dim = queries.shape
    if num_seqs == 0:
        return queries, jnp.zeros(queries.shape[:3], jnp.float32), kv_pages.data
    check_pages(kv_pages)
    new_tokens = 0 if new is None else 1
    num_kv_heads, page_size, pages_per_seq = kv_pages.num_kv_heads, kv_pages.page_size, page_table.shape[1]
    rows, group = num_queries * num_q_heads, num_queries * num_q_heads // num_kv_heads
    token_bytes, vmem = vmem_bytes_per_token(kv_pages), vmem_bytes()
    each = seq_bytes(rows, head_dim, queries.dtype.itemsize)
    if new is not None:
        each += 2 * vmem_bytes_per_row(kv_pages)  # of two groups
        vmem -= new_rows_bytes(kv_pages)
    blocks = block_sizes or tuned_or_default_blocks(
        Key.of("decode", queries, kv_pages),
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        pages_per_seq=pages_per_seq,
        most_seqs=most_seqs(pages_per_seq, num_seqs * (1 + new_tokens)),
        token_bytes=token_bytes,
        seq_bytes=each,
        vmem_bytes=vmem if num_queries == 1 else vmem * 3 // 4,  # the scores of many rows take room as well
        num_queries=num_queries,
    )
    blocks.check(
        page_size=page_size,
        token_bytes=token_bytes,
        seq_bytes=each,
        vmem_bytes=vmem,
        num_queries=num_queries,
    )
    seqs = blocks.seqs(num_queries)
    num_groups = -(-num_seqs // seqs)
    units = Units(
        seqs=seqs,
        num_groups=num_groups,
        table_row=padded(pages_per_seq, TABLE_TILE // math.gcd(TABLE_TILE, seqs)),
        lanes=blocks.lanes,
        pages=blocks.kv_tokens // page_size,
        page_size=page_size,
        depth=blocks.depth,
        sliding_window=sliding_window,
        queries=num_queries,
        new_tokens=new_tokens,
    )
    units.check()
    products = Products(group, head_dim, product_dtype(queries, kv_pages))
    attention = Attention(rows, num_queries, products, scale, soft_cap, sliding_window)

    spare = num_groups * seqs - num_seqs

    def by_sequence(array: Array, filling: int = 0) -> Array:
        return jnp.pad(array, ((0, spare), *((0, 0) for _ in array.shape[1:])), constant_values=filling)

    def integers(array: Array, filling: int) -> Array:
        """[num_groups * seqs] and more, so that it is whole tiles."""
        more = -array.shape[0] % TABLE_TILE
        return jnp.pad(array, (0, more), constant_values=filling)

    kv_lens = by_sequence(kv_lens)
    last = jnp.max(jnp.where(kv_lens > 0, jnp.arange(1, kv_lens.shape[0] + 1, dtype=jnp.int32), 0))
    used_groups = ((last + seqs - 1) // seqs)[None]
    sink = jnp.full(num_q_heads, MASKED) if sinks is None else sinks.astype(jnp.float32) * LOG2_E
    sink = by_kv_head(jnp.broadcast_to(sink, (1, num_queries, num_q_heads)), num_kv_heads)[0]
    table = jnp.pad(by_sequence(page_table), ((0, 0), (0, units.table_row - pages_per_seq)))
    inputs = Inputs(
        kv_pages,
        integers(kv_lens, 0),
        table.reshape(-1),
        by_sequence(by_kv_head(queries, num_kv_heads)),
        jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (rows, LANES)),
        *(() if new is None else (integers(by_sequence(new[1], -1), -1), by_sequence(new[0]))),
    )

    def two_groups(array: Array) -> Any:
        return pltpu.VMEM((2, seqs, *array.shape[1:]), array.dtype)

    def scalars(array: Array) -> Any:
        return pltpu.SMEM(array.shape, jnp.int32)

    two = pltpu.SemaphoreType.DMA((2,))
    copied = Copied(
        scalars(inputs.kv_lens),
        two_groups(inputs.queries),
        pltpu.VMEM((rows, LANES), jnp.float32),
        None if new is None else scalars(inputs.slots),
        None if new is None else two_groups(inputs.new_rows),
        pltpu.SemaphoreType.DMA((3,)),
        two,
        None if new is None else two,
    )

    def by_group(numbers: int) -> pl.BlockSpec:
        return pl.BlockSpec((seqs, rows, numbers), lambda group, *_: (group, 0, 0))  # pyright: ignore

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    data = kv_pages.data
    outputs = Outputs(
        jax.ShapeDtypeStruct(inputs.queries.shape, queries.dtype),
        jax.ShapeDtypeStruct((*inputs.queries.shape[:2], LANES), jnp.float32),
        None if new is None else jax.ShapeDtypeStruct(data.shape, data.dtype),
    )
    (output, log_sum_exp, written) = tpu_call(
        partial(kernel, attention, units, jax.eval_shape(lambda: kv_pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_groups,),
            in_specs=[in_hbm(inputs)],
            out_specs=[Outputs(by_group(head_dim), by_group(LANES), None if new is None else anywhere)],
            scratch_shapes=[
                copied,
                Softmax(
                    State.scratch(seqs + 1, rows, head_dim=head_dim), State.scratch(rows, head_dim=head_dim)
                ),
                [] if new is None else new_rows_scratch(kv_pages),
                fetcher_scratch(units, kv_pages),
            ],
        ),
        out_shape=[outputs],
        input_output_aliases={} if new is None else {1: 2},  # the cache's data
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem_bytes()),
        name="paged_decode_attention",
    )(used_groups, inputs)[0]
    return (
        by_query(output[:num_seqs], num_queries, num_kv_heads),
        by_query(log_sum_exp[:num_seqs, :, 0], num_queries, num_kv_heads),
        data if new is None else written,
    )
